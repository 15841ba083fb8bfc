"""The raw contenders that need no broker: what one would write today, without ipckit.

Each opener is the shortest honest program on the library that people use for this, doing the same work as the Channel beside
it: whole messages of any size, both ways. Where a byte stream needs framing, it is the same 4-byte length.
"""

from __future__ import annotations

import os
import queue
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe, resource_tracker, shared_memory
from multiprocessing.connection import Connection
from typing import BinaryIO

from . import certificate
from .wires import QUIET, End, Handed, Wire

LENGTH = struct.Struct("!I")
_SMALL = 1 << 16  # up to here one copy is cheaper than a second system call


# -- byte streams -------------------------------------------------------------------------------------------------


def _framed_socket(sock: socket.socket, stack: ExitStack) -> Wire:
    reader = stack.enter_context(sock.makefile("rb"))
    return Wire(framing(sock.sendall), frames_of(reader))


def framing(write: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """Send with a length before it."""

    def send(data: bytes) -> None:
        if len(data) <= _SMALL:
            write(LENGTH.pack(len(data)) + data)
        else:
            write(LENGTH.pack(len(data)))
            write(data)

    return send


def frames_of(reader: BinaryIO) -> Callable[[], bytes]:
    """Receive the same."""
    read = reader.read
    unpack = LENGTH.unpack

    def recv() -> bytes:
        return read(unpack(read(4))[0])

    return recv


def host_port(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def dial(end: End, family: socket.AddressFamily, stack: ExitStack) -> socket.socket:
    """A connected stream socket; `address` is a path, or host:port."""
    host, _, port = end.address.rpartition(":")
    place = end.address if family == socket.AF_UNIX else (host, int(port))
    sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    if end.side == "drive":
        sock.connect(place)
    else:
        sock.bind(place)
        sock.listen()
        end.announce(end.address if family == socket.AF_UNIX else host_port(sock))
        sock = stack.enter_context(sock.accept()[0])
    if family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@contextmanager
def unix(end: End) -> Iterator[Wire]:
    """socket, AF_UNIX."""
    with ExitStack() as stack:
        yield _framed_socket(dial(end, socket.AF_UNIX, stack), stack)


@contextmanager
def tcp(end: End) -> Iterator[Wire]:
    """socket, TCP with TCP_NODELAY."""
    with ExitStack() as stack:
        yield _framed_socket(dial(end, socket.AF_INET, stack), stack)


@contextmanager
def tls(end: End) -> Iterator[Wire]:
    """TLS by ssl, over the same, with the certificate that ours uses."""
    with ExitStack() as stack:
        yield _framed_socket(secured(end, stack), stack)


def secured(end: End, stack: ExitStack) -> ssl.SSLSocket:
    """A connected socket, encrypted."""
    sock = dial(end, socket.AF_INET, stack)
    return stack.enter_context(certificate.accepted(sock, stack) if end.side == "echo" else certificate.connected(sock))


@contextmanager
def fifo(end: End) -> Iterator[Wire]:
    """os.mkfifo, and os.write and read on it."""
    to_echo, to_drive = end.address + ".1", end.address + ".2"
    if end.side == "echo":
        os.mkfifo(to_echo, 0o600)
        os.mkfifo(to_drive, 0o600)
        end.announce(end.address)
        reader, out = _reading(to_echo), os.open(to_drive, os.O_WRONLY | os.O_CLOEXEC)
    else:
        out, reader = os.open(to_echo, os.O_WRONLY | os.O_CLOEXEC), _reading(to_drive)

    def send(data: bytes) -> None:
        frame = memoryview(LENGTH.pack(len(data)) + data)
        while frame:
            frame = frame[os.write(out, frame) :]

    try:
        yield Wire(send, frames_of(reader))
    finally:
        reader.close()
        os.close(out)


def _reading(path: str) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "rb")


@contextmanager
def pipe_ends(address: str) -> Iterator[tuple[Handed, Handed]]:
    """Both ends of a multiprocessing.Pipe."""
    left, right = Pipe()
    with left, right:
        yield (address, [left.fileno()]), (address, [right.fileno()])


@contextmanager
def pipe(end: End) -> Iterator[Wire]:
    """multiprocessing.Pipe, send_bytes and recv_bytes."""
    if end.side == "echo":
        end.announce("")
    with Connection(end.descriptors[0]) as connection:
        yield Wire(connection.send_bytes, connection.recv_bytes)


# -- messages -----------------------------------------------------------------------------------------------------


@contextmanager
def inproc(end: End) -> Iterator[Wire]:
    """queue.SimpleQueue, one for each direction, between two threads."""
    to_echo, to_drive = _QUEUES
    if end.side == "echo":
        end.announce("")
        yield Wire(to_drive.put, to_echo.get)
    else:
        yield Wire(to_echo.put, to_drive.get)


_QUEUES: tuple[queue.SimpleQueue[bytes], queue.SimpleQueue[bytes]] = (queue.SimpleQueue(), queue.SimpleQueue())


@contextmanager
def udp(end: End) -> Iterator[Wire]:
    """socket, SOCK_DGRAM, connected to each other."""
    host, _, port = end.address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if end.side == "echo":
            sock.bind((host, int(port)))
            end.announce(host_port(sock))
            sock.connect(sock.recvfrom(1)[1])
            sock.send(b"!")
        else:
            sock.connect((host, int(port)))
            sock.send(b"?")
            sock.recv(1)

        def recv_soon() -> bytes:
            if sock.gettimeout() is None:
                sock.settimeout(QUIET)
            return sock.recv(65536)

        def recv() -> bytes:
            if sock.gettimeout() is not None:
                sock.settimeout(None)
            return sock.recv(65536)

        yield Wire(sock.send, recv, recv_soon=recv_soon)


@contextmanager
def mq(end: End) -> Iterator[Wire]:
    """posix_ipc.MessageQueue, one for each direction. One byte says whether more of the message follows."""
    import posix_ipc

    names = (end.address + ".1", end.address + ".2")
    flags = posix_ipc.O_CREX if end.side == "echo" else 0
    queues = [posix_ipc.MessageQueue(name, flags, mode=0o600) for name in names]
    if end.side == "echo":
        end.announce(end.address)
    else:
        for name in names:  # both have them open: nothing is left behind, however this ends
            posix_ipc.unlink_message_queue(name)
    inward, outward = queues if end.side == "echo" else reversed(queues)
    room = outward.max_message_size - 1
    put, get = outward.send, inward.receive

    def send(data: bytes) -> None:
        if len(data) <= room:
            put(b"\0" + data)
            return
        for start in range(0, len(data), room):
            put((b"\1" if start + room < len(data) else b"\0") + data[start : start + room])

    def recv() -> bytes:
        part: bytes = get()[0]
        if not part[0]:
            return part[1:]
        parts = [part[1:]]
        while part[0]:
            part = get()[0]
            parts.append(part[1:])
        return b"".join(parts)

    try:
        yield Wire(send, recv)
    finally:
        for each in queues:
            each.close()


_SLOTS = 8
_SLOT = (1 << 20) + 4


@contextmanager
def shm(end: End) -> Iterator[Wire]:
    """multiprocessing.shared_memory, a few slots for each direction, and process-shared semaphores that count them."""
    import posix_ipc

    creating = end.side == "echo"
    names = [f"{end.address}.{i}" for i in range(4)]  # filled and free, for each direction
    flags = posix_ipc.O_CREX if creating else 0
    start = (0, _SLOTS, 0, _SLOTS)
    counts = [posix_ipc.Semaphore(n, flags, initial_value=v) for n, v in zip(names, start, strict=True)]
    memory = shared_memory.SharedMemory(end.address.strip("/"), create=creating, size=2 * _SLOTS * _SLOT)
    if creating:
        end.announce(end.address)
        resource_tracker.unregister(memory._name, "shared_memory")  # type: ignore[attr-defined]
    else:
        memory.unlink()
        for count in counts:
            count.unlink()
    assert memory.buf is not None
    view = memoryview(memory.buf)
    inward, outward = (0, 1) if creating else (1, 0)
    filled, free = counts[2 * outward], counts[2 * outward + 1]
    arrived, done = counts[2 * inward], counts[2 * inward + 1]
    written = read = 0

    def send(data: bytes) -> None:
        nonlocal written
        free.acquire()
        at = (outward * _SLOTS + written % _SLOTS) * _SLOT
        LENGTH.pack_into(view, at, len(data))
        view[at + 4 : at + 4 + len(data)] = data
        written += 1
        filled.release()

    def recv() -> bytes:
        nonlocal read
        arrived.acquire()
        at = (inward * _SLOTS + read % _SLOTS) * _SLOT
        data = bytes(view[at + 4 : at + 4 + LENGTH.unpack_from(view, at)[0]])
        read += 1
        done.release()
        return data

    try:
        yield Wire(send, recv)
    finally:
        view.release()
        memory.close()
        for count in counts:
            count.close()


@contextmanager
def zmq(end: End) -> Iterator[Wire]:
    """PAIR of pyzmq."""
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    with context.socket(zmq.PAIR) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        if end.side == "echo":
            sock.bind(end.address)
            end.announce(sock.getsockopt_string(zmq.LAST_ENDPOINT) or end.address)
        else:
            sock.connect(end.address)
        yield Wire(sock.send, sock.recv)


@contextmanager
def zmq_push_pull(end: End) -> Iterator[Wire]:
    """PUSH and PULL of pyzmq, a pair of sockets for each direction: what one would stream large messages with."""
    import zmq

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    names = (end.address + ".1", end.address + ".2")
    inward, outward = names if end.side == "echo" else reversed(names)
    with context.socket(zmq.PULL) as pull, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 0)
        pull.bind(inward)
        push.connect(outward)
        if end.side == "echo":
            end.announce(end.address)
        yield Wire(push.send, pull.recv)
