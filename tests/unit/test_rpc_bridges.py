"""Streams between threads and loops: in order, a little ahead, with their errors, and closed when nobody reads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest

from ipckit.rpc._bridges import AHEAD, FromLoop, FromThread, OnLoop
from ipckit.testing.conformance._base import eventually


class Source:
    """An endless stream that knows how far it got, in both forms."""

    def __init__(self, raises_at: int = 1 << 30) -> None:
        self.given = 0
        self.raises_at = raises_at
        self.closed = threading.Event()

    def items(self) -> Iterator[int]:
        try:
            while True:
                if self.given == self.raises_at:
                    raise KeyError("mine")
                self.given += 1
                yield self.given
        finally:
            self.closed.set()

    async def aitems(self) -> AsyncIterator[int]:
        try:
            for value in self.items():
                yield value
        finally:
            self.closed.set()


def on_thread(work) -> None:
    threading.Thread(target=work, daemon=True).start()


def test_from_thread_works_ahead_a_little_and_is_closed() -> None:
    async def main() -> None:
        source = Source()
        stream = FromThread(source.items(), on_thread)
        assert [await anext(stream) for _ in range(100)] == [*range(1, 101)]
        assert await asyncio.to_thread(eventually, lambda: source.given == 100 + AHEAD)
        assert source.given == 100 + AHEAD
        await stream.aclose()
        assert await asyncio.to_thread(source.closed.wait, 10)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_from_thread_gives_what_came_before_an_error() -> None:
    async def main() -> None:
        stream = FromThread(Source(raises_at=3).items(), on_thread)
        assert [await anext(stream) for _ in range(3)] == [1, 2, 3]
        with pytest.raises(KeyError, match="mine"):
            await anext(stream)

    asyncio.run(main())


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    made.call_soon_threadsafe(made.stop)
    thread.join(10)
    made.close()


def test_from_loop_works_ahead_a_little_and_is_cancelled(loop: asyncio.AbstractEventLoop) -> None:
    source, tasks = Source(), []
    stream = FromLoop(loop, source.aitems(), lambda _: tasks.append(asyncio.current_task()))
    assert [next(stream) for _ in range(100)] == [*range(1, 101)]
    assert source.given <= 100 + AHEAD
    assert len(tasks) == 1
    stream.close()
    assert source.closed.wait(10)


def test_from_loop_gives_what_came_before_an_error(loop: asyncio.AbstractEventLoop) -> None:
    stream = FromLoop(loop, Source(raises_at=3).aitems(), lambda _: None)
    assert [next(stream) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(KeyError, match="mine"):
        next(stream)


def test_on_loop_fetches_and_ends(loop: asyncio.AbstractEventLoop) -> None:
    async def three() -> AsyncIterator[int]:
        for number in range(3):
            yield number

    assert list(OnLoop(three(), loop)) == [0, 1, 2]
