"""The raw contenders for asyncio: streams, and the client libraries that have an awaited form."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter_ns
from typing import Any

from .raw import host_port
from .raw_brokers import GRPC_METHOD, GRPC_OPTIONS, RedisReader, nats_client, redis_arguments
from .wires import AsyncWire, End

_LENGTH = struct.Struct("!I")


@asynccontextmanager
async def inproc(end: End) -> AsyncIterator[AsyncWire]:
    """asyncio.Queue, one for each direction, between two tasks."""
    if end.side == "echo":
        _QUEUES[:] = [asyncio.Queue(), asyncio.Queue()]
        end.announce("")
        yield AsyncWire(_QUEUES[1].put, _QUEUES[0].get)
    else:
        yield AsyncWire(_QUEUES[0].put, _QUEUES[1].get)


_QUEUES: list[asyncio.Queue[bytes]] = []


@asynccontextmanager
async def streams(end: End) -> AsyncIterator[AsyncWire]:
    """Streams of asyncio over a Unix socket or TCP (asyncio sets TCP_NODELAY), with the same framing."""
    async with stream_pair(end) as (reader, writer):
        yield framed(reader, writer)


@asynccontextmanager
async def stream_pair(end: End) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connected streams; the address is a path, or host:port."""
    host, _, port = end.address.rpartition(":")
    if end.side == "echo":
        arrived: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()

        def take(*both: Any) -> None:
            arrived.set_result(both)

        if host:
            server = await asyncio.start_server(take, host, int(port))
            end.announce(host_port(server.sockets[0]))
        else:
            server = await asyncio.start_unix_server(take, end.address)
            end.announce(end.address)
        reader, writer = await arrived
        server.close()
    elif host:
        reader, writer = await asyncio.open_connection(host, int(port))
    else:
        reader, writer = await asyncio.open_unix_connection(end.address)
    yield reader, writer
    writer.close()
    await writer.wait_closed()


def framed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncWire:
    """Whole messages over them."""

    async def send(data: bytes) -> None:
        writer.write(_LENGTH.pack(len(data)) + data)
        await writer.drain()

    async def recv() -> bytes:
        return await reader.readexactly(_LENGTH.unpack(await reader.readexactly(4))[0])

    return AsyncWire(send, recv)


@asynccontextmanager
async def zmq(end: End) -> AsyncIterator[AsyncWire]:
    """The asyncio sockets of pyzmq, PAIR."""
    import zmq
    import zmq.asyncio

    with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        if end.side == "echo":
            sock.bind(end.address)
            end.announce(sock.getsockopt_string(zmq.LAST_ENDPOINT))
        else:
            sock.connect(end.address)
        yield AsyncWire(sock.send, sock.recv)


@asynccontextmanager
async def nats(end: End) -> AsyncIterator[AsyncWire]:
    """nats-py, publish and subscribe."""
    client, outward, arrived = await nats_client(end)
    try:
        yield AsyncWire(partial(client.publish, outward), arrived.get, flush=client.flush)
    finally:
        await client.close()


@asynccontextmanager
async def redis(end: End) -> AsyncIterator[AsyncWire]:
    """redis.asyncio, XADD and XREAD, a stream for each direction."""
    from redis.asyncio import Redis

    arguments, inward, outward = redis_arguments(end)
    reader = RedisReader(inward)
    async with Redis(**arguments, socket_timeout=None) as client:
        await client.ping()
        if end.side == "echo":
            end.announce(end.address)

        async def recv() -> bytes:
            if not reader.messages and reader.take(await client.xread({inward: reader.last}, 100, 0)):
                await client.xtrim(inward, minid=reader.last, approximate=False)
            return reader.messages.popleft()

        async def send(data: bytes) -> None:
            await client.xadd(outward, {"d": data})

        try:
            yield AsyncWire(send, recv)
        finally:
            await client.delete(inward)


@asynccontextmanager
async def grpc(end: End) -> AsyncIterator[AsyncWire]:
    """grpc.aio, one bidirectional stream; the server answers inside its handler."""
    if end.side == "drive":
        async with _grpc_aio().insecure_channel(end.address, GRPC_OPTIONS) as channel:
            call = channel.stream_stream(GRPC_METHOD)()
            try:
                yield AsyncWire(call.write, call.read)
            finally:
                call.cancel()
        return

    import grpc

    orders: asyncio.Queue[tuple[str, int] | None] = asyncio.Queue()
    done: asyncio.Queue[int] = asyncio.Queue()

    async def exchange(_: Any, context: Any) -> None:
        while (order := await orders.get()) is not None:
            for _turn in range(order[1]):
                message = await context.read()
                if order[0] == "echo":
                    await context.write(message)
            done.put_nowait(perf_counter_ns())

    async def obey(kind: str, count: int) -> int:
        orders.put_nowait((kind, count))
        return await done.get()

    async def _not_here(*_: object) -> Any:
        raise AssertionError("the handler does it")

    handler: Any = grpc.stream_stream_rpc_method_handler(exchange)
    server = _grpc_aio().server(
        handlers=[grpc.method_handlers_generic_handler("ipckit.bench", {"Exchange": handler})], options=GRPC_OPTIONS
    )
    port = server.add_insecure_port(end.address)
    await server.start()
    end.announce(end.address if end.address.startswith("unix:") else f"{end.address.rpartition(':')[0]}:{port}")
    try:
        yield AsyncWire(_not_here, _not_here, echo=partial(obey, "echo"), drain=partial(obey, "drain"))
    finally:
        orders.put_nowait(None)
        await server.stop(0)


def _grpc_aio() -> Any:
    import grpc.aio

    return grpc.aio
