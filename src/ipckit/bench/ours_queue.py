"""ipckit as a contender: a queue, and topics, opened by their URL, in either shell.

The echo of a queue receives, and has the name where the transport gives one to a side. The driving end of topics publishes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

from .. import aio, pubsub, queue
from .loops import aturning, turning
from .ours import target
from .wires import QUIET, AsyncWire, End, Wire, not_here

_OPEN = 15.0  # seconds; an audience of sixteen takes some


def _queue(end: End, ack: queue.Ack) -> Iterator[Wire]:
    if end.side == "drive":
        with queue.sender(target(end), timeout=_OPEN) as jobs:
            yield Wire(jobs.send, not_here, jobs.send_many)
        return
    work = queue.receiver(end.address, listen=True, ack=ack, timeout=_OPEN)

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
        end.announce(work.url.reveal())
        yield Wire(not_here, recv, recv_many=recv_many)
    finally:
        work.close()  # at once: what is left is nobody's


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


@contextmanager
def topics(end: End) -> Iterator[Wire]:
    """A publisher, or one subscriber."""
    if end.side == "drive":
        with pubsub.publisher(end.address, timeout=_OPEN) as prices:
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


@asynccontextmanager
async def awaited_topics(end: End) -> AsyncIterator[AsyncWire]:
    """`topics`, awaited."""
    if end.side == "drive":
        prices: aio.Publisher[bytes] = await aio.publisher(end.address, timeout=_OPEN)
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
