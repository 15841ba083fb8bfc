"""The raw contenders of calls: grpcio, nats-py's request, a REQ and REP pair of pyzmq; and how a call becomes a wire.

The clock sends and receives; a call does both. So what is sent is kept until the answer is asked for (`Asked`), and then called
with. The server counts its calls, and says when they were as many as there should be (`Tally`).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from time import perf_counter_ns
from typing import Any

from .raw_brokers import GRPC_OPTIONS, place
from .wires import AsyncWire, End, Wire, not_here


class Asked:
    """What was sent, and is still to be called with."""

    def __init__(self) -> None:
        self._count = 0
        self._data = b""

    def put(self, data: bytes) -> None:
        self._count += 1
        self._data = data

    async def aput(self, data: bytes) -> None:
        self.put(data)

    def take(self) -> bytes:
        self._count = 0
        return self._data

    def all(self) -> tuple[int, int]:
        """How many were sent, and of what size."""
        count, self._count = self._count, 0
        return count, len(self._data)


class Tally:
    """Calls that a server has answered. One thread, or one loop, counts."""

    def __init__(self) -> None:
        self._made = self._due = 0
        self._changed = threading.Event()
        self._completed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._tell: asyncio.Event | None = None

    def count(self) -> None:
        self._made += 1
        if self._made >= self._due:
            self._changed.set()
            if self._tell is not None:
                self._tell.set()

    def complete(self) -> None:
        """The other end has received a stream."""
        self._completed.put(perf_counter_ns())
        if self._tell is not None:
            self._tell.set()

    def wait(self, count: int) -> None:
        self._due += count
        while self._made < self._due:
            self._changed.wait()
            self._changed.clear()

    def wait_complete(self, count: int) -> int:
        return self._completed.get()

    async def await_count(self, count: int) -> None:
        self._due += count
        while self._made < self._due:
            await self._told()

    async def await_complete(self, count: int) -> int:
        while self._completed.empty():
            await self._told()
        return self._completed.get()

    async def _told(self) -> None:
        self._tell = asyncio.Event()
        if self._made < self._due or self._completed.empty():
            await self._tell.wait()
        self._tell = None


# -- grpcio ---------------------------------------------------------------------------------------------------------

_SERVICE = "ipckit.bench"
_ECHO, _ITEMS, _COMPLETE = (f"/{_SERVICE}/{name}" for name in ("Echo", "Items", "Complete"))


def _request(asked: Asked) -> tuple[int, bytes]:
    count, size = asked.all()
    return count, count.to_bytes(8, "big") + size.to_bytes(8, "big")


def _wanted(request: bytes) -> tuple[int, bytes]:
    return int.from_bytes(request[:8], "big"), bytes(int.from_bytes(request[8:], "big"))


def _where(end: End, port: int) -> str:
    return end.address if end.address.startswith("unix:") else f"{end.address.rpartition(':')[0]}:{port}"


@contextmanager
def grpc(end: End) -> Iterator[Wire]:
    """grpcio: unary calls, and a server stream; bytes as they are, without protobuf."""
    import grpc

    if end.side == "drive":
        with grpc.insecure_channel(end.address, GRPC_OPTIONS) as channel:
            asked = Asked()
            echo: Any = channel.unary_unary(_ECHO)
            items: Any = channel.unary_stream(_ITEMS)
            complete: Any = channel.unary_unary(_COMPLETE)

            def flush() -> None:
                count, request = _request(asked)
                if sum(1 for _ in items(request)) != count:
                    raise ValueError("items were lost")
                complete(b"")

            yield Wire(asked.put, lambda: echo(asked.take()), flush=flush)
        return
    tally = Tally()

    def echoed(data: bytes, context: Any) -> bytes:
        tally.count()
        return data

    def streamed(request: bytes, context: Any) -> Iterator[bytes]:
        count, item = _wanted(request)
        for _ in range(count):
            yield item

    def completed(data: bytes, context: Any) -> bytes:
        tally.complete()
        return data

    handlers: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echoed),
        "Items": grpc.unary_stream_rpc_method_handler(streamed),
        "Complete": grpc.unary_unary_rpc_method_handler(completed),
    }
    generic = grpc.method_handlers_generic_handler(_SERVICE, handlers)
    server = grpc.server(ThreadPoolExecutor(4), [generic], options=GRPC_OPTIONS)
    port = server.add_insecure_port(end.address)
    server.start()
    end.announce(_where(end, port))
    try:
        yield Wire(not_here, not_here, echo=tally.wait, drain=tally.wait_complete)
    finally:
        server.stop(0).wait()


@asynccontextmanager
async def agrpc(end: End) -> AsyncIterator[AsyncWire]:
    """grpc.aio, likewise."""
    async with _agrpc(end) as wire:
        yield wire


@asynccontextmanager
async def agrpc_crowd(end: End) -> AsyncIterator[AsyncWire]:
    """grpc.aio, a hundred calls at once."""
    async with _agrpc(end, 100) as wire:
        yield wire


@asynccontextmanager
async def _agrpc(end: End, crowd: int = 1) -> AsyncIterator[AsyncWire]:
    import grpc

    if end.side == "drive":
        async with grpc.aio.insecure_channel(end.address, GRPC_OPTIONS) as channel:
            asked = Asked()
            echo: Any = channel.unary_unary(_ECHO)
            items: Any = channel.unary_stream(_ITEMS)
            complete: Any = channel.unary_unary(_COMPLETE)

            async def recv() -> bytes:
                data = asked.take()
                if crowd == 1:
                    return await echo(data)  # type: ignore[no-any-return]
                return (await asyncio.gather(*(echo(data) for _ in range(crowd))))[0]  # type: ignore[no-any-return]

            async def flush() -> None:
                count, request = _request(asked)
                received = 0
                async for _ in items(request):
                    received += 1
                if received != count:
                    raise ValueError("items were lost")
                await complete(b"")

            yield AsyncWire(asked.aput, recv, flush=flush)
        return
    tally = Tally()

    async def echoed(data: bytes, context: Any) -> bytes:
        tally.count()
        return data

    async def streamed(request: bytes, context: Any) -> AsyncIterator[bytes]:
        count, item = _wanted(request)
        for _ in range(count):
            yield item

    async def completed(data: bytes, context: Any) -> bytes:
        tally.complete()
        return data

    handlers: dict[str, Any] = {
        "Echo": grpc.unary_unary_rpc_method_handler(echoed),
        "Items": grpc.unary_stream_rpc_method_handler(streamed),
        "Complete": grpc.unary_unary_rpc_method_handler(completed),
    }
    server = grpc.aio.server(options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
    port = server.add_insecure_port(end.address)
    await server.start()
    end.announce(_where(end, port))
    try:
        yield AsyncWire(
            not_here, not_here, echo=lambda count: tally.await_count(count * crowd), drain=tally.await_complete
        )
    finally:
        await server.stop(None)


# -- nats-py --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def anats(end: End) -> AsyncIterator[AsyncWire]:
    """nats-py: request and reply. A stream is a message for each item, to an inbox of the caller's."""
    import nats

    server, name = place(end.address)
    client = await nats.connect(server, allow_reconnect=False)
    asked, tally = Asked(), Tally()

    async def echoed(message: Any) -> None:
        await message.respond(message.data)
        tally.count()

    async def streamed(message: Any) -> None:
        count, item = _wanted(message.data)
        for number in range(count):
            await client.publish(message.reply, item)
            if number % 256 == 255:
                await client.flush()  # else the client's own buffer grows without bound

    async def completed(message: Any) -> None:
        tally.complete()
        await message.respond(b"")

    async def recv() -> bytes:
        data: bytes = (await client.request(f"{name}.echo", asked.take(), timeout=30)).data
        return data

    async def flush() -> None:
        count, request = _request(asked)
        inbox = client.new_inbox()
        items = await client.subscribe(inbox, pending_msgs_limit=1 << 24, pending_bytes_limit=1 << 30)
        await client.publish(f"{name}.items", request, reply=inbox)
        for _ in range(count):
            await items.next_msg(30)
        await items.unsubscribe()
        await client.request(f"{name}.complete", b"", timeout=30)

    try:
        if end.side == "drive":
            yield AsyncWire(asked.aput, recv, flush=flush)
        else:
            for subject, handler in (("echo", echoed), ("items", streamed), ("complete", completed)):
                await client.subscribe(f"{name}.{subject}", cb=handler)
            await client.flush()
            end.announce(end.address)
            yield AsyncWire(not_here, not_here, echo=tally.await_count, drain=tally.await_complete)
    finally:
        await client.close()


@contextmanager
def nats(end: End) -> Iterator[Wire]:
    """nats-py's request, its loop run for each call: there is no synchronous client."""
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    manager = anats(end)
    wire = run(manager.__aenter__())
    try:
        if end.side == "drive":
            assert wire.flush is not None
            awaited = wire.flush
            yield Wire(lambda data: run(wire.send(data)), lambda: run(wire.recv()), flush=lambda: run(awaited()))
        else:
            assert wire.echo is not None
            assert wire.drain is not None
            echo, drain = wire.echo, wire.drain
            yield Wire(not_here, not_here, echo=lambda n: run(echo(n)), drain=lambda n: run(drain(n)))
    finally:
        run(manager.__aexit__(None, None, None))
        loop.close()


# -- pyzmq ----------------------------------------------------------------------------------------------------------


@contextmanager
def zmq(end: End) -> Iterator[Wire]:
    """REQ and REP of pyzmq. There are no streams: an item is a request, which is what one would write."""
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.REP if end.side == "echo" else zmq.REQ) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        if end.side == "drive":
            sock.connect(end.address)
            asked = Asked()

            def call(data: bytes) -> bytes:
                sock.send(data)
                return sock.recv()

            def flush() -> None:
                count, size = asked.all()
                item = bytes(size)
                for _ in range(count):
                    call(item)

            yield Wire(asked.put, lambda: call(asked.take()), flush=flush)
            return
        sock.bind(end.address)
        end.announce(sock.getsockopt_string(zmq.LAST_ENDPOINT))

        def echo(count: int) -> None:
            for _ in range(count):
                sock.send(sock.recv())

        def drain(count: int) -> int:
            echo(count)
            return perf_counter_ns()

        yield Wire(not_here, not_here, echo=echo, drain=drain)
