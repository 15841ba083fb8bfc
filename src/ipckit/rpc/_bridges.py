"""Streams across the border between threads and an event loop: iterators whose items are made on the other side.

| class | is | over |
|---|---|---|
| `FromThread` | an asynchronous iterator | an iterator, advanced on a thread |
| `FromLoop` | an iterator | an asynchronous iterator, advanced by a task of a loop |
| `OnLoop` | an iterator | an asynchronous iterator that belongs to a task which is busy elsewhere |

The first two work ahead by `AHEAD` items, so that a stream does not change threads for each; a reader that is slow holds them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

AHEAD = 16


class FromThread(AsyncIterator[Any]):
    """`submit` runs a function on a thread. Begun by its first reader; to be closed (`close` from anywhere, or `aclose`)."""

    def __init__(self, items: Iterator[Any], submit: Callable[[Callable[[], None]], object]) -> None:
        self._source, self._submit = items, submit
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._begun = self._over = self._closed = False
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reader: asyncio.Future[None] | None = None

    def _pump(self) -> None:
        error: BaseException | None = None
        try:
            for value in self._source:
                with self._changed:
                    self._items.append(value)
                    self._tell()
                    self._changed.wait_for(lambda: len(self._items) < AHEAD or self._closed)
                    if self._closed:
                        break
        except BaseException as raised:
            error = raised
        try:
            close = getattr(self._source, "close", None)
            if close is not None:
                close()
        except BaseException as raised:
            error = error or raised
        with self._changed:
            self._error, self._over = error, True
            self._tell()

    def _tell(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_end, reader)

    async def __anext__(self) -> Any:
        if not self._begun:
            self._begun = True
            self._loop = asyncio.get_running_loop()
            self._submit(self._pump)
        while True:
            with self._changed:
                if self._items:
                    self._changed.notify()
                    return self._items.popleft()
                if self._over or self._closed:
                    error, self._error = self._error, None
                    if error is not None:
                        raise error
                    raise StopAsyncIteration
                reader = self._reader = asyncio.get_running_loop().create_future()
            await reader

    def close(self) -> None:
        """Nobody reads any more. The iterator is closed on its thread, when that comes back from it."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
            self._tell()

    async def aclose(self) -> None:
        self.close()


class FromLoop(Iterator[Any]):
    """`results` is iterated by one task of `loop`, which calls `started(loop)` first. To be closed."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        results: Any,
        started: Callable[[asyncio.AbstractEventLoop], None],
    ) -> None:
        self._loop = loop
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._room = asyncio.Event()
        self._pumping = asyncio.run_coroutine_threadsafe(self._pump(results, started), loop)

    async def _pump(self, results: Any, started: Callable[[asyncio.AbstractEventLoop], None]) -> None:
        try:
            started(self._loop)
            try:
                async for value in results:
                    with self._changed:
                        self._items.append(value)
                        self._changed.notify()
                    self._room.clear()
                    while len(self._items) >= AHEAD:
                        await self._room.wait()
                        self._room.clear()
            finally:
                await results.aclose()
        except BaseException as error:
            self._error = error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._changed:
                self._over = True
                self._changed.notify()

    def __next__(self) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._over)
            if not self._items:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopIteration
            value = self._items.popleft()
            room = len(self._items) == AHEAD - 1
        if room:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._room.set)
        return value

    def close(self) -> None:
        """Nobody reads any more: the task is cancelled."""
        self._pumping.cancel()


class OnLoop(Iterator[Any]):
    """Each item is fetched from the loop: for a handler on a thread that reads what its caller streams."""

    def __init__(self, items: AsyncIterator[Any], loop: asyncio.AbstractEventLoop) -> None:
        self._items, self._loop = items, loop

    def __next__(self) -> Any:
        found = asyncio.run_coroutine_threadsafe(self._fetch(), self._loop).result()
        if found is self:
            raise StopIteration
        return found

    async def _fetch(self) -> Any:
        try:
            return await anext(self._items)
        except StopAsyncIteration:
            return self


def _end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
