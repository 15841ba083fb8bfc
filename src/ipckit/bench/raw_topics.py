"""The raw contenders of publish/subscribe, in both shells: what a careful user writes by hand, and loses as little by.

A byte stream fans out by one write for each subscriber; pyzmq by PUB and SUB, with XPUB_NODROP so that a full pipe is waited for,
as ours waits; NATS by publish and subscribe, on JetStream by an ordered consumer; Redis by a stream that all of
them read (XADD, XREAD), since its PUBLISH keeps nothing for anybody.
"""

from __future__ import annotations

import asyncio
import queue
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from . import certificate
from .raw import frames_of, framing, host_port
from .raw_brokers import place, redis_arguments
from .wires import QUIET, AsyncWire, End, Wire, not_here

# -- byte streams -------------------------------------------------------------------------------------------------


def _fan_out(end: End, family: socket.AddressFamily, secure: bool = False) -> Iterator[Wire]:
    with ExitStack() as stack:
        host, _, port = end.address.rpartition(":")
        where = end.address if family == socket.AF_UNIX else (host, int(port))
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        if end.side == "echo":
            sock.connect(where)
            sock = stack.enter_context(certificate.connected(sock)) if secure else sock
            yield Wire(not_here, frames_of(stack.enter_context(sock.makefile("rb"))))
            return
        sock.bind(where)
        sock.listen(end.audience)
        end.announce(end.address if family == socket.AF_UNIX else host_port(sock))
        writes: list[Callable[[bytes], None]] = []
        for _ in range(end.audience):
            each = stack.enter_context(sock.accept()[0])
            if family != socket.AF_UNIX:
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each = stack.enter_context(certificate.accepted(each, stack)) if secure else each
            writes.append(framing(each.sendall))

        def publish(data: bytes) -> None:
            for write in writes:
                write(data)

        yield Wire(publish, not_here)


@contextmanager
def unix(end: End) -> Iterator[Wire]:
    """socket, AF_UNIX, one for each subscriber."""
    yield from _fan_out(end, socket.AF_UNIX)


@contextmanager
def tcp(end: End) -> Iterator[Wire]:
    """socket, TCP with TCP_NODELAY, one for each subscriber."""
    yield from _fan_out(end, socket.AF_INET)


@contextmanager
def tls(end: End) -> Iterator[Wire]:
    """TLS by ssl, over the same."""
    yield from _fan_out(end, socket.AF_INET, secure=True)


@contextmanager
def udp(end: End) -> Iterator[Wire]:
    """socket, SOCK_DGRAM, a multicast group on the loopback interface."""
    group, _, port = end.address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if end.side == "echo":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((group, int(port)))
            member = socket.inet_aton(group) + socket.inet_aton("127.0.0.1")
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            yield Wire(not_here, *_patient(sock))
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            end.announce(end.address)
            place = (group, int(port))
            yield Wire(lambda data: sock.sendto(data, place), not_here)


def _patient(sock: socket.socket) -> tuple[Callable[[], bytes], None, None, None, Callable[[], bytes]]:
    """Recv and recv_soon, in their places of a Wire."""

    def within(seconds: float | None) -> bytes:
        if sock.gettimeout() != seconds:
            sock.settimeout(seconds)
        return sock.recv(65536)

    return partial(within, None), None, None, None, partial(within, QUIET)


# -- messages -----------------------------------------------------------------------------------------------------

_SUBSCRIBED: dict[str, list[queue.SimpleQueue[bytes]]] = {}
_SUBSCRIBED_TASKS: dict[str, list[asyncio.Queue[bytes]]] = {}


@contextmanager
def inproc(end: End) -> Iterator[Wire]:
    """A queue.SimpleQueue for each subscriber, between threads."""
    everybody = _SUBSCRIBED.setdefault(end.address, [])
    if end.side == "echo":
        mine: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        everybody.append(mine)
        yield Wire(not_here, mine.get)
        return

    def publish(data: bytes) -> None:
        for each in everybody:
            each.put(data)

    end.announce(end.address)
    yield Wire(publish, not_here)


@asynccontextmanager
async def ainproc(end: End) -> AsyncIterator[AsyncWire]:
    """An asyncio.Queue for each subscriber, between tasks."""
    everybody = _SUBSCRIBED_TASKS.setdefault(end.address, [])
    if end.side == "echo":
        mine: asyncio.Queue[bytes] = asyncio.Queue()
        everybody.append(mine)
        yield AsyncWire(not_here, mine.get)
        return

    async def publish(data: bytes) -> None:
        for each in everybody:
            await each.put(data)

    end.announce(end.address)
    yield AsyncWire(publish, not_here)


def _zmq_socket(context: Any, end: End) -> Any:
    import zmq

    sock = context.socket(zmq.SUB if end.side == "echo" else zmq.PUB)
    sock.setsockopt(zmq.LINGER, 0)
    if end.side == "echo":
        sock.setsockopt(zmq.SUBSCRIBE, b"")
        sock.connect(end.address)
    else:
        sock.setsockopt(zmq.XPUB_NODROP, 1)
        sock.bind(end.address)
        end.announce(sock.getsockopt_string(zmq.LAST_ENDPOINT) or end.address)
    return sock


@contextmanager
def zmq(end: End) -> Iterator[Wire]:
    """PUB and SUB of pyzmq."""
    import zmq

    with _zmq_socket(zmq.Context.instance(), end) as sock:
        yield Wire(not_here, sock.recv) if end.side == "echo" else Wire(sock.send, not_here)


@asynccontextmanager
async def azmq(end: End) -> AsyncIterator[AsyncWire]:
    """The asyncio sockets of pyzmq, PUB and SUB."""
    import zmq.asyncio

    with zmq.asyncio.Context() as context, _zmq_socket(context, end) as sock:
        yield AsyncWire(not_here, sock.recv) if end.side == "echo" else AsyncWire(sock.send, not_here)


# -- NATS ---------------------------------------------------------------------------------------------------------


def _run(opened: Any) -> Iterator[Wire]:
    """An awaited contender, its loop run for each call: nats-py has no synchronous form."""
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    wire: AsyncWire = run(opened.__aenter__())
    flush = wire.flush

    async def soon() -> Any:
        return await asyncio.wait_for(wire.recv(), QUIET)

    try:
        yield Wire(
            lambda data: run(wire.send(data)),
            lambda: run(wire.recv()),
            flush=flush and (lambda: run(flush())),
            recv_soon=lambda: run(soon()),
        )
    finally:
        run(opened.__aexit__(None, None, None))
        loop.close()


@contextmanager
def nats(end: End) -> Iterator[Wire]:
    """nats-py, publish and subscribe."""
    yield from _run(anats(end))


@asynccontextmanager
async def anats(end: End) -> AsyncIterator[AsyncWire]:
    """nats-py, publish and subscribe."""
    import nats

    server, name = place(end.address)
    client: Any = await nats.connect(server, allow_reconnect=False)
    try:
        if end.side == "drive":
            end.announce(end.address)
            yield AsyncWire(partial(client.publish, name), not_here, flush=client.flush)
        else:
            arrived: asyncio.Queue[bytes] = asyncio.Queue()

            async def take(message: Any) -> None:
                arrived.put_nowait(message.data)

            await client.subscribe(name, cb=take, pending_msgs_limit=1 << 24, pending_bytes_limit=1 << 30)
            await client.flush()
            yield AsyncWire(not_here, arrived.get)
    finally:
        await client.close()


@contextmanager
def jetstream(end: End) -> Iterator[Wire]:
    """nats-py, JetStream: publish, confirmed, and an ordered consumer."""
    yield from _run(ajetstream(end))


@asynccontextmanager
async def ajetstream(end: End) -> AsyncIterator[AsyncWire]:
    """nats-py, JetStream: publish, confirmed, and an ordered consumer."""
    import nats

    server, name = place(end.address)
    client: Any = await nats.connect(server, allow_reconnect=False)
    js = client.jetstream()
    try:
        if end.side == "drive":
            await js.add_stream(name=name, subjects=[name])
            end.announce(end.address)
            yield AsyncWire(lambda data: js.publish(name, data), not_here)
        else:
            arrived: asyncio.Queue[bytes] = asyncio.Queue()

            async def take(message: Any) -> None:
                arrived.put_nowait(message.data)

            await js.subscribe(
                name, cb=take, ordered_consumer=True, pending_msgs_limit=1 << 24, pending_bytes_limit=1 << 30
            )
            yield AsyncWire(not_here, arrived.get)
    finally:
        await client.close()


# -- Redis --------------------------------------------------------------------------------------------------------


def _bodies(answer: Any) -> tuple[bytes, list[bytes]]:
    entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
    return entries[-1][0], [fields[b"d"] for _, fields in entries]


@contextmanager
def redis(end: End) -> Iterator[Wire]:
    """redis-py, XADD and XREAD of a hundred."""
    import redis

    arguments, *_ = redis_arguments(end)
    name = place(end.address)[1]
    with redis.Redis(**arguments) as client:
        client.ping()
        if end.side == "drive":
            end.announce(end.address)
            yield Wire(lambda data: client.xadd(name, {"d": data}), not_here)
            return
        last: bytes | str = "0"
        ahead: deque[bytes] = deque()

        def recv() -> bytes:
            nonlocal last
            if not ahead:
                last, bodies = _bodies(client.xread({name: last}, 100, 0))
                ahead.extend(bodies)
            return ahead.popleft()

        yield Wire(not_here, recv)


@asynccontextmanager
async def aredis(end: End) -> AsyncIterator[AsyncWire]:
    """redis.asyncio, XADD and XREAD of a hundred."""
    from redis.asyncio import Redis

    arguments, *_ = redis_arguments(end)
    name = place(end.address)[1]
    async with Redis(**arguments, socket_timeout=None) as client:
        await client.ping()
        if end.side == "drive":
            end.announce(end.address)

            async def publish(data: bytes) -> None:
                await client.xadd(name, {"d": data})

            yield AsyncWire(publish, not_here)
            return
        last: bytes | str = "0"
        ahead: deque[bytes] = deque()

        async def recv() -> bytes:
            nonlocal last
            if not ahead:
                last, bodies = _bodies(await client.xread({name: last}, 100, 0))
                ahead.extend(bodies)
            return ahead.popleft()

        yield AsyncWire(not_here, recv)
