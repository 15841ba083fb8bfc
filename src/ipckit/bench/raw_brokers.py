"""The raw contenders on a client library, called from threads: NATS, Redis Streams, gRPC."""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from time import perf_counter_ns
from typing import Any

from .._url import parse
from .wires import End, Wire

#: A consumed stream is cut back when so many messages, or bytes, have been read since the last time.
_TRIM_MESSAGES, _TRIM_BYTES = 256, 4 << 20


def place(address: str) -> tuple[str, str]:
    """The server's URL, and the name to meet at: `nats://127.0.0.1:4222/name`."""
    server, _, name = address.rpartition("/")
    return server, name


# -- NATS ---------------------------------------------------------------------------------------------------------


@contextmanager
def nats(end: End) -> Iterator[Wire]:
    """nats-py, publish and subscribe, its loop run for each call: there is no synchronous client."""
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    client, outward, arrived = run(nats_client(end))
    try:
        yield Wire(
            lambda data: run(client.publish(outward, data)),
            lambda: run(arrived.get()),
            flush=lambda: run(client.flush()),
        )
    finally:
        run(client.close())
        loop.close()


async def nats_client(end: End) -> tuple[Any, str, asyncio.Queue[bytes]]:
    """A connected client, the subject to publish to, and the queue that what comes in lands in."""
    import nats

    server, name = place(end.address)
    names = (f"{name}.echo", f"{name}.drive")
    inward, outward = names if end.side == "echo" else reversed(names)
    arrived: asyncio.Queue[bytes] = asyncio.Queue()

    async def take(message: Any) -> None:
        arrived.put_nowait(message.data)

    client = await nats.connect(server, allow_reconnect=False)
    await client.subscribe(inward, cb=take, pending_msgs_limit=1 << 24, pending_bytes_limit=1 << 30)
    await client.flush()
    if end.side == "echo":
        end.announce(end.address)
    return client, outward, arrived


# -- Redis --------------------------------------------------------------------------------------------------------


def redis_arguments(end: End) -> tuple[dict[str, Any], str, str]:
    """Arguments for `Redis(...)`, and the streams to read and to write."""
    server, name = place(end.address)
    url = parse(server)
    arguments: dict[str, Any] = {"username": url.user, "password": url.password}
    if url.scheme == "redis+unix":
        arguments["unix_socket_path"] = url.path
    else:
        arguments |= {"host": url.host.name, "port": url.host.port or 6379}
    names = (f"{name}.echo", f"{name}.drive")
    inward, outward = names if end.side == "echo" else reversed(names)
    return arguments, inward, outward


class RedisReader:
    """What stands between XREAD and one message at a time; the answer is asked for by the caller, awaited or not."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.last: bytes | str = "0"
        self.messages: deque[bytes] = deque()
        self._count = self._bytes = 0

    def take(self, answer: Any) -> bool:
        """Keep what XREAD answered. True: time to cut the stream back to `last`."""
        entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
        self.messages.extend(fields[b"d"] for _, fields in entries)
        self.last = entries[-1][0]
        self._count += len(entries)
        self._bytes += sum(len(fields[b"d"]) for _, fields in entries)
        if self._count < _TRIM_MESSAGES and self._bytes < _TRIM_BYTES:
            return False
        self._count = self._bytes = 0
        return True


@contextmanager
def redis(end: End) -> Iterator[Wire]:
    """redis-py, XADD and XREAD, a stream for each direction."""
    import redis

    arguments, inward, outward = redis_arguments(end)
    reader = RedisReader(inward)
    with redis.Redis(**arguments) as client:
        client.ping()
        if end.side == "echo":
            end.announce(end.address)

        def recv() -> bytes:
            if not reader.messages and reader.take(client.xread({inward: reader.last}, 100, 0)):
                client.xtrim(inward, minid=reader.last, approximate=False)
            return reader.messages.popleft()

        try:
            yield Wire(lambda data: client.xadd(outward, {"d": data}), recv)
        finally:
            client.delete(inward)


# -- gRPC ---------------------------------------------------------------------------------------------------------

#: Messages of any size, as ours.
GRPC_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
GRPC_METHOD = "/ipckit.bench/Exchange"


@contextmanager
def grpc(end: End) -> Iterator[Wire]:
    """grpcio, one bidirectional stream; the server answers inside its handler."""
    if end.side == "echo":
        yield from _grpc_server(end)
    else:
        yield from _grpc_client(end)


def _grpc_server(end: End) -> Iterator[Wire]:
    import grpc

    orders: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[int] = queue.SimpleQueue()

    def exchange(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        while (order := orders.get()) is not None:
            kind, count = order
            if kind == "echo":
                yield from islice(requests, count)
            else:
                deque(islice(requests, count), maxlen=0)
            done.put(perf_counter_ns())

    def obey(kind: str, count: int) -> int:
        orders.put((kind, count))
        return done.get()

    server = grpc.server(
        ThreadPoolExecutor(1),
        [
            grpc.method_handlers_generic_handler(
                "ipckit.bench", {"Exchange": grpc.stream_stream_rpc_method_handler(exchange)}
            )
        ],
        options=GRPC_OPTIONS,
    )
    port = server.add_insecure_port(end.address)
    server.start()
    end.announce(end.address if end.address.startswith("unix:") else f"{end.address.rpartition(':')[0]}:{port}")
    try:
        yield Wire(_not_here, _not_here, echo=partial(obey, "echo"), drain=partial(obey, "drain"))
    finally:
        orders.put(None)
        server.stop(0).wait()


def _not_here(*_: object) -> Any:
    raise AssertionError("the handler does it")


def _grpc_client(end: End) -> Iterator[Wire]:
    import grpc

    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(end.address, GRPC_OPTIONS) as channel:
        call: Any = channel.stream_stream(GRPC_METHOD)(iter(outbox.get, None))  # type: ignore[arg-type]
        try:
            yield Wire(outbox.put, partial(next, call))
        finally:
            outbox.put(None)
            call.cancel()
