"""ipckit as a contender: a queue, and topics, opened by their URL, in either shell.

The echo of a queue receives, and has the name where the transport gives one to a side. The driving end of topics publishes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial

from .. import aio, channel, opening, pubsub, queue
from .._spi import OnFull
from .._url import Url
from .loops import aturning, turning
from .ours import target
from .wires import QUIET, AsyncWire, End, Wire, not_here

Place = str | Url | channel.Channel[bytes]
_OPEN = 15.0  # seconds; an audience of sixteen takes some


def _sending(place: Place) -> Iterator[Wire]:
    with queue.sender(place, timeout=_OPEN) as jobs:
        yield Wire(jobs.send, not_here, jobs.send_many)


def _receiving(place: Place, ack: queue.Ack, announce: Callable[[str], None]) -> Iterator[Wire]:
    work = queue.receiver(place, ack=ack, timeout=_OPEN)

    def recv() -> bytes:
        message = work.recv()
        if ack == "manual":
            message.ack()
        return message.value

    def recv_many(limit: int) -> list[bytes]:
        messages = work.recv_many(limit)
        if ack == "manual":
            for message in messages:
                message.ack()
        return [message.value for message in messages]

    try:
        announce(work.url.reveal())
        yield Wire(not_here, recv, recv_many=recv_many)
    finally:
        work.close()  # at once: what is left is nobody's


def _queue(end: End, ack: queue.Ack) -> Iterator[Wire]:
    return _sending(target(end)) if end.side == "drive" else _receiving(end.address, ack, end.announce)


@turning
@contextmanager
def auto(end: End) -> Iterator[Wire]:
    """A message is acknowledged when the next one is asked for; nothing waits for it."""
    yield from _queue(end, "auto")


@turning
@contextmanager
def manual(end: End) -> Iterator[Wire]:
    """Each message is acknowledged at once, and that it was noted is waited for."""
    yield from _queue(end, "manual")


@contextmanager
def inherited(end: End) -> Iterator[Wire]:
    """`auto`, on an end of a pair that our parent made; and a loop over a pair of our own."""
    with ExitStack() as stack:

        def enter(wire: Iterator[Wire]) -> Wire:
            return stack.enter_context(contextmanager(lambda: wire)())

        ours = opening.connect(end.address, timeout=_OPEN)
        if end.side == "echo":
            yield enter(_receiving(ours, "auto", end.announce))
            return
        wire = enter(_sending(ours))
        left, right = opening.pair(end.loop)
        out, inward = enter(_sending(left)), enter(_receiving(right, "auto", lambda _: None))

        def turn(data: bytes) -> bytes:
            out.send(data)
            return inward.recv()

        yield replace(wire, turn=turn)


@aturning
@asynccontextmanager
async def awaited(end: End) -> AsyncIterator[AsyncWire]:
    """`auto`, awaited."""
    if end.side == "drive":
        jobs: aio.Sender[bytes] = await aio.sender(target(end), timeout=_OPEN)
        async with jobs:
            yield AsyncWire(jobs.send, not_here, jobs.send_many)
        return
    work: aio.Receiver[bytes] = await aio.receiver(end.address, listen=True, timeout=_OPEN)

    async def recv() -> bytes:
        return (await work.recv()).value

    async def recv_many(limit: int) -> list[bytes]:
        return [message.value for message in await work.recv_many(limit)]

    try:
        end.announce(work.url.reveal())
        yield AsyncWire(not_here, recv, recv_many=recv_many)
    finally:
        await work.close()


def _topics(end: End, on_full: OnFull) -> Iterator[Wire]:
    if end.side == "drive":
        with pubsub.publisher(end.address, on_full=on_full, timeout=_OPEN) as prices:
            end.announce(prices.url.reveal())
            prices.wait_for_subscribers(end.audience, timeout=_OPEN)
            yield Wire(prices.publish, not_here, prices.publish_many)
        return
    with pubsub.subscriber(target(end), timeout=_OPEN) as news:

        def recv(timeout: float | None = None) -> bytes:
            return news.recv(timeout).value

        def recv_many(limit: int) -> list[bytes]:
            return [message.value for message in news.recv_many(limit)]

        yield Wire(not_here, recv, recv_many=recv_many, recv_soon=partial(recv, QUIET))


@contextmanager
def topics(end: End) -> Iterator[Wire]:
    """A publisher that waits for the slowest, or one subscriber."""
    yield from _topics(end, "block")


@contextmanager
def dropping(end: End) -> Iterator[Wire]:
    """A publisher that waits for nobody, or one subscriber; where the transport cannot wait."""
    yield from _topics(end, "drop_new")


@asynccontextmanager
async def awaited_topics(end: End) -> AsyncIterator[AsyncWire]:
    """`topics`, awaited."""
    async with _awaited_topics(end, "block") as wire:
        yield wire


@asynccontextmanager
async def awaited_dropping(end: End) -> AsyncIterator[AsyncWire]:
    """`dropping`, awaited."""
    async with _awaited_topics(end, "drop_new") as wire:
        yield wire


@asynccontextmanager
async def _awaited_topics(end: End, on_full: OnFull) -> AsyncIterator[AsyncWire]:
    if end.side == "drive":
        prices: aio.Publisher[bytes] = await aio.publisher(end.address, on_full=on_full, timeout=_OPEN)
        async with prices:
            end.announce(prices.url.reveal())
            await prices.wait_for_subscribers(end.audience, timeout=_OPEN)
            yield AsyncWire(prices.publish, not_here, prices.publish_many)
        return
    news: aio.Subscriber[bytes] = await aio.subscriber(target(end), timeout=_OPEN)
    async with news:

        async def recv() -> bytes:
            return (await news.recv()).value

        async def recv_many(limit: int) -> list[bytes]:
            return [message.value for message in await news.recv_many(limit)]

        yield AsyncWire(not_here, recv, recv_many=recv_many)
