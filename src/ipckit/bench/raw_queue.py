"""The raw contenders of the queue that need no broker: what one would write, or take from the standard library.

A byte stream becomes a queue here as it would by hand: frames with a length, one byte back for each that was taken, and a
sender that lets 256 of them be on their way. What has no acknowledgement of its own (multiprocessing, pyzmq PUSH and PULL,
a message queue of the kernel) is used as it is.
"""

from __future__ import annotations

import base64
import multiprocessing
import os
import pickle
import queue
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from multiprocessing import context as spawning
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

from .loops import aturning, turning
from .raw import LENGTH, dial, frames_of, framing, secured
from .raw_aio import framed, stream_pair
from .wires import AsyncWire, End, Handed, Wire, not_here

_WINDOW = 256
_ACK = b"\6"


# -- byte streams, acknowledged by hand ---------------------------------------------------------------------------


def _acknowledged(end: End, sock: socket.socket, stack: ExitStack) -> Wire:
    if end.side == "echo":
        read, confirm = frames_of(stack.enter_context(sock.makefile("rb"))), sock.sendall

        def recv() -> bytes:
            body = read()
            confirm(_ACK)
            return body

        return Wire(not_here, recv)
    put = framing(sock.sendall)
    hear = sock.recv
    outstanding = 0

    def send(data: bytes) -> None:
        nonlocal outstanding
        if outstanding >= _WINDOW:
            outstanding -= len(hear(_WINDOW))
        put(data)
        outstanding += 1

    return Wire(send, not_here)


@turning
@contextmanager
def unix(end: End) -> Iterator[Wire]:
    """socket, AF_UNIX."""
    with ExitStack() as stack:
        yield _acknowledged(end, dial(end, socket.AF_UNIX, stack), stack)


@turning
@contextmanager
def tcp(end: End) -> Iterator[Wire]:
    """socket, TCP with TCP_NODELAY."""
    with ExitStack() as stack:
        yield _acknowledged(end, dial(end, socket.AF_INET, stack), stack)


@turning
@contextmanager
def tls(end: End) -> Iterator[Wire]:
    """TLS by ssl, over the same."""
    with ExitStack() as stack:
        yield _acknowledged(end, secured(end, stack), stack)


@turning
@contextmanager
def fifo(end: End) -> Iterator[Wire]:
    """os.mkfifo, and os.write and read on it. It has one direction, so nothing is acknowledged."""
    if end.side == "echo":
        os.mkfifo(end.address, 0o600)
        end.announce(end.address)
        with open(end.address, "rb") as reader:
            yield Wire(not_here, frames_of(reader))
        return
    with open(end.address, "wb", buffering=0) as writer:

        def send(data: bytes) -> None:
            frame = memoryview(LENGTH.pack(len(data)) + data)
            while frame:
                frame = frame[writer.write(frame) :]

        yield Wire(send, not_here)


# -- messages -----------------------------------------------------------------------------------------------------


_QUEUES: dict[str, queue.SimpleQueue[bytes]] = {}


@turning
@contextmanager
def inproc(end: End) -> Iterator[Wire]:
    """queue.SimpleQueue, between two threads."""
    if end.side == "echo":
        q = _QUEUES.setdefault(end.address, queue.SimpleQueue())
        end.announce(end.address)
        yield Wire(not_here, q.get)
    else:
        yield Wire(_QUEUES[end.address].put, not_here)


@turning
@contextmanager
def mq(end: End) -> Iterator[Wire]:
    """posix_ipc.MessageQueue. One byte says whether more of the message follows."""
    import posix_ipc

    kernel = posix_ipc.MessageQueue(end.address, posix_ipc.O_CREX if end.side == "echo" else 0, mode=0o600)
    try:
        if end.side == "echo":
            end.announce(end.address)
            yield Wire(not_here, _whole(kernel.receive))
        else:
            posix_ipc.unlink_message_queue(end.address)  # both have it open: nothing is left behind
            yield Wire(_parted(kernel.send, kernel.max_message_size - 1), not_here)
    finally:
        kernel.close()


def _parted(put: Callable[[bytes], object], room: int) -> Callable[[bytes], None]:
    def send(data: bytes) -> None:
        if len(data) <= room:
            put(b"\0" + data)
            return
        for start in range(0, len(data), room):
            put((b"\1" if start + room < len(data) else b"\0") + data[start : start + room])

    return send


def _whole(get: Callable[[], Any]) -> Callable[[], bytes]:
    def recv() -> bytes:
        part: bytes = get()[0]
        if not part[0]:
            return part[1:]
        parts = [part[1:]]
        while part[0]:
            part = get()[0]
            parts.append(part[1:])
        return b"".join(parts)

    return recv


@turning
@contextmanager
def zmq(end: End) -> Iterator[Wire]:
    """PUSH and PULL of pyzmq."""
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.PULL if end.side == "echo" else zmq.PUSH) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        if end.side == "echo":
            sock.bind(end.address)
            end.announce(sock.getsockopt_string(zmq.LAST_ENDPOINT) or end.address)
            yield Wire(not_here, sock.recv)
        else:
            sock.connect(end.address)
            yield Wire(sock.send, not_here)


# -- multiprocessing ----------------------------------------------------------------------------------------------


class _Passing:
    """What multiprocessing's pickles ask for descriptors: ours are inherited under their own numbers."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []

    def duplicate_for_child(self, descriptor: int) -> int:
        self.descriptors.append(descriptor)
        return descriptor

    @staticmethod
    def DupFd(descriptor: int) -> _Inherited:  # noqa: N802 - multiprocessing's name
        return _Inherited(descriptor)


class _Inherited:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def detach(self) -> int:
        return self._descriptor


@contextmanager
def _handed(made: Any) -> Iterator[tuple[Handed, Handed]]:
    """The queue, as multiprocessing gives it to a spawned child."""
    passing = _Passing()
    spawning.set_spawning_popen(passing)  # type: ignore[arg-type]
    try:
        text = base64.b64encode(bytes(ForkingPickler.dumps(made))).decode()
    finally:
        spawning.set_spawning_popen(None)
    handed = text, tuple(dict.fromkeys(passing.descriptors))
    yield handed, handed


@contextmanager
def mp_queue_ends(address: str) -> Iterator[tuple[Handed, Handed]]:
    """A multiprocessing.Queue for two workers."""
    made = multiprocessing.get_context("spawn").Queue()
    with _handed(made) as ends:
        yield ends
    made.close()
    made._reader.close()  # type: ignore[attr-defined]
    made._writer.close()  # type: ignore[attr-defined]


@contextmanager
def mp_simple_queue_ends(address: str) -> Iterator[tuple[Handed, Handed]]:
    """A multiprocessing.SimpleQueue for two workers."""
    made = multiprocessing.get_context("spawn").SimpleQueue()
    with _handed(made) as ends:
        yield ends
    made.close()


def _taken(end: End, kind: Literal["Queue", "SimpleQueue"]) -> Iterator[Wire]:
    given = pickle.loads(base64.b64decode(end.address))  # noqa: S301 - our parent made it
    if end.side == "echo":
        end.announce("")
        yield Wire(not_here, given.get)
        return
    own = getattr(multiprocessing.get_context("fork"), kind)()

    def turn(data: bytes) -> bytes:
        own.put(data)
        body: bytes = own.get()
        return body

    yield Wire(given.put, not_here, turn=turn)


@contextmanager
def mp_queue(end: End) -> Iterator[Wire]:
    """multiprocessing.Queue: put returns at once, a thread of it pickles and writes."""
    yield from _taken(end, "Queue")


@contextmanager
def mp_simple_queue(end: End) -> Iterator[Wire]:
    """multiprocessing.SimpleQueue: a pipe and a lock at each end."""
    yield from _taken(end, "SimpleQueue")


# -- asyncio ------------------------------------------------------------------------------------------------------


_ASYNC_QUEUES: dict[str, Any] = {}


@aturning
@asynccontextmanager
async def ainproc(end: End) -> AsyncIterator[AsyncWire]:
    """asyncio.Queue, between two tasks."""
    import asyncio

    if end.side == "echo":
        q: asyncio.Queue[bytes] = _ASYNC_QUEUES.setdefault(end.address, asyncio.Queue())
        end.announce(end.address)
        yield AsyncWire(not_here, q.get)
    else:
        yield AsyncWire(_ASYNC_QUEUES[end.address].put, not_here)


@aturning
@asynccontextmanager
async def astreams(end: End) -> AsyncIterator[AsyncWire]:
    """Streams of asyncio, with the same framing and acknowledgement."""
    async with stream_pair(end) as (reader, writer):
        wire = framed(reader, writer)
        if end.side == "echo":

            async def recv() -> bytes:
                body = await wire.recv()
                writer.write(_ACK)
                await writer.drain()
                return body

            yield AsyncWire(not_here, recv)
            return
        outstanding = 0

        async def send(data: bytes) -> None:
            nonlocal outstanding
            if outstanding >= _WINDOW:
                outstanding -= len(await reader.read(_WINDOW))
            await wire.send(data)
            outstanding += 1

        yield AsyncWire(send, not_here)


@aturning
@asynccontextmanager
async def azmq(end: End) -> AsyncIterator[AsyncWire]:
    """The asyncio sockets of pyzmq, PUSH and PULL."""
    import zmq
    import zmq.asyncio

    with (
        zmq.asyncio.Context() as context,
        context.socket(zmq.PULL if end.side == "echo" else zmq.PUSH) as sock,
    ):
        sock.setsockopt(zmq.LINGER, 0)
        if end.side == "echo":
            sock.bind(end.address)
            end.announce(sock.getsockopt_string(zmq.LAST_ENDPOINT))
            yield AsyncWire(not_here, sock.recv)
        else:
            sock.connect(end.address)
            yield AsyncWire(sock.send, not_here)
