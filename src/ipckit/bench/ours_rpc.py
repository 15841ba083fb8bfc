"""ipckit as a contender: calls of a service, in either shell.

A round trip is a unary call. A flow is a server stream of as many items, which the driving end asks for and consumes; that it
has them all it says with one more call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from .. import aio, opening
from ..rpc.client import client as call
from ..rpc.contract import Service, rpc
from ..rpc.server import Server
from .ours import target
from .raw_rpc import Asked, Tally
from .wires import AsyncWire, End, Wire, not_here

_OPEN = 15.0  # seconds
_CROWD = 100


class Bench(Service):
    """What is called."""

    def __init__(self) -> None:
        self.tally = Tally()

    @rpc(inline=True)
    def echo(self, data: bytes) -> bytes:
        self.tally.count()
        return data

    def items(self, count: int, size: int) -> Iterator[bytes]:
        item = bytes(size)
        for _ in range(count):
            yield item

    @rpc(inline=True)
    def complete(self) -> None:
        self.tally.complete()


class AsyncBench(Bench):
    """The same, with a stream that a loop can run."""

    async def items(self, count: int, size: int) -> AsyncIterator[bytes]:  # type: ignore[override]
        item = bytes(size)
        for _ in range(count):
            yield item


def _called(client: Any) -> Wire:
    asked = Asked()
    echo: Callable[[bytes], bytes] = client.echo

    def flush() -> None:
        count, size = asked.all()
        received = sum(1 for _ in client.items(count, size))
        if received != count:
            raise ValueError(f"asked for {count} items, got {received}")
        client.complete()

    return Wire(asked.put, lambda: echo(asked.take()), flush=flush)


@contextmanager
def sync(end: End) -> Iterator[Wire]:
    """`Server` and `client`."""
    if end.side == "drive":
        with call(target(end), Bench, target="bench", timeout=_OPEN) as client:
            yield _called(client)
        return
    service = Bench()
    with Server(end.address, service, timeout=_OPEN) as server:
        end.announce(server.url.reveal())
        yield Wire(not_here, not_here, echo=service.tally.wait, drain=service.tally.wait_complete)


@contextmanager
def inherited(end: End) -> Iterator[Wire]:
    """The same, over an end of a pair that our parent made."""
    if end.side == "echo":
        end.announce("")
    given = opening.connect(end.address, timeout=_OPEN)
    if end.side == "drive":
        with call(given, Bench, target="bench", timeout=_OPEN) as client:
            yield _called(client)
        return
    service = Bench()
    with Server(given, service):
        yield Wire(not_here, not_here, echo=service.tally.wait, drain=service.tally.wait_complete)


@asynccontextmanager
async def awaited(end: End) -> AsyncIterator[AsyncWire]:
    """`aio.Server` and `aio.client`."""
    async with _awaited(end) as (client, wire):
        if client is not None:
            asked = Asked()
            wire = AsyncWire(asked.aput, lambda: client.echo(asked.take()), flush=lambda: _consume(client, asked))
        yield wire


@asynccontextmanager
async def crowd(end: End) -> AsyncIterator[AsyncWire]:
    """A hundred tasks that call at once; a round trip is one call of each."""
    async with _awaited(end, _CROWD) as (client, wire):
        if client is not None:
            asked = Asked()

            async def recv() -> bytes:
                data = asked.take()
                return (await asyncio.gather(*(client.echo(data) for _ in range(_CROWD))))[0]  # type: ignore[no-any-return]

            wire = AsyncWire(asked.aput, recv)
        yield wire


@asynccontextmanager
async def _awaited(end: End, times: int = 1) -> AsyncIterator[tuple[Any, AsyncWire]]:
    if end.side == "drive":
        client: Any = await aio.client(target(end), AsyncBench, target="bench", timeout=_OPEN)
        async with client:
            yield client, AsyncWire(not_here, not_here)
        return
    service = AsyncBench()
    server = aio.Server(end.address, timeout=_OPEN)
    async with server:
        server.expose("bench", service)
        end.announce(server.url.reveal())
        tally = service.tally
        yield (
            None,
            AsyncWire(
                not_here, not_here, echo=lambda n: tally.await_count(n * times), drain=lambda n: tally.await_complete(n)
            ),
        )


async def _consume(client: Any, asked: Asked) -> None:
    count, size = asked.all()
    received = 0
    async for _ in client.items(count, size):
        received += 1
    if received != count:
        raise ValueError(f"asked for {count} items, got {received}")
    await client.complete()
