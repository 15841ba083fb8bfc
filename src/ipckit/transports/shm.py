"""shm:// — shared-memory rings between two processes of one machine.

    shm://frames            a rendezvous socket in the runtime directory
    shm:///run/app/frames   a rendezvous socket at this path

Promises: whole frames in order, zero-copy in both directions (`loan`, `borrow`), the peer's pid and uid from the kernel, its
death at once. The listener makes the memory (a sealed memfd) and four doorbells (eventfds), and passes them over the socket;
nothing has a name but that socket, so nothing is left behind by `kill -9`, whoever is killed. The socket stays open as the
life line. Only processes of our own user and root are let in: they share memory with us.

    connector                       listener
    connect, HELLO(version) ──────▶ is it one of ours? make memory and bells
    check, map      ◀────── RINGS(version, capacity) + memfd, 4 eventfds        or  REFUSED(version, reason)

A frame that is longer than the ring streams through it. A frame that was sent stays in memory until it is received, or until
both processes are gone.

Topics are a matter of their own (`_shm_publisher`, `_shm_subscriber`): each payload once, in memory that all can read.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import _native as native_core
from .. import _options, errors
from .._capabilities import Capabilities
from .._options import option
from .._spi import (
    Intake,
    Link,
    Listener,
    Peer,
    Publishing,
    PublishTerms,
    Steps,
    Topics,
    TopicTerms,
    Transport,
    Wait,
    Want,
)
from .._url import Url
from . import _unixsock
from ._accept import Acceptor
from ._death import fate_of
from ._native import Ended, make_fail
from ._oserror import SCARCE, map_oserror
from ._runtime import path_for
from ._shm_topics import TopicOptions
from ._stream import forked

_log = logging.getLogger("ipckit")

#: magic, version, what it is, a number (RINGS: capacity; REFUSED: errno); in the byte order of the machine.
_GREETING = struct.Struct("=8sIIQ")
_MAGIC, _VERSION = b"ipckring", 1
_HELLO, _RINGS, _REFUSED = 1, 2, 3
_FDS = 5  # memory, and (ring 0 data, ring 0 space, ring 1 data, ring 1 space)
_HANDSHAKES = 32  # at once; a peer greets right after connecting, so the oldest silent one is the one to drop
_PATIENCE = 5.0  # seconds for a greeting
_KIND = socket.SOCK_SEQPACKET  # one greeting, one packet

DEFAULT_SIZE = 1 << 20


def _capacity(text: str) -> int:
    value = _options.size(text)
    if not 4096 <= value <= 1 << 30:
        raise ValueError("from 4KiB to 1GiB")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(_options.LinkOptions):
    size: int | None = option(
        None, _capacity, "bytes of each ring, rounded up to a power of two (1MiB); the listener's counts"
    )
    spin: float | None = option(None, _options.spin, "how long to spin before sleeping, or auto")


@dataclass(frozen=True, slots=True)
class Rings:
    """`.native` of a link: the memory has no handle that could be used beside ours."""

    capacity: int  # bytes, each direction
    side: int  # sends on ring 0 (the listener) or on ring 1


class ShmTransport(Transport[Options], Topics[TopicOptions]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        native_topics=True,
        pair=True,
        zero_copy=True,
        peer_credentials=True,
        fileno=True,
        model="rings of messages in memory that two processes share",
        synchronisation="built in: atomic counters, and a semaphore (eventfd) to wake sleepers",
        use_case="the lowest latency and the highest throughput on one machine; large arrays without a copy",
    )
    options: ClassVar[type[Any]] = Options
    topic_options: ClassVar[type[Any]] = TopicOptions

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        sock, name = _unixsock.bind(url, path_for(url, ".shm"), _KIND)
        return ShmListener(url, options, sock, name)
        yield  # nothing to wait for

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        pause = 0.001
        while True:
            sock = yield from _unixsock.connect_steps(url, path_for(url, ".shm"), _KIND)
            try:
                peer = _unixsock.peer_of(sock)
                _unixsock.check_peer(url, peer, "connect", hint=None)
                link = yield from _introduce(url, options, sock, peer)
            finally:
                sock.close()  # detached by now, if there is a link
            if link is not None:
                return link
            try:
                yield Wait((), pause)  # that listener went away; another may come
            except errors.Timeout as timeout:
                raise errors.NothingListening("the listener went away", url=url, operation="connect") from timeout
            pause = min(pause * 2, 0.05)

    def pair(self, url: Url, options: Options) -> tuple[Link, Link]:
        left, right = socket.socketpair(socket.AF_UNIX, _KIND)
        peer = _unixsock.peer_of(left)
        with left, right, _Descriptors() as ours, _Descriptors() as theirs:
            try:
                ours.make(_size_of(options))
                theirs.adopt(os.dup(fd) for fd in ours.fds)
                first = _link(url, options, ours, left, 0, peer)
                try:
                    return first, _link(url, options, theirs, right, 1, peer)
                except BaseException:
                    first.close()
                    raise
            except OSError as error:
                if isinstance(error, errors.IpcError):
                    raise
                raise map_oserror(error, url, "pair") from error

    def publisher(self, url: Url, options: TopicOptions, terms: PublishTerms) -> Steps[Publishing]:
        from . import _shm_publisher  # who has channels only does not pay for it

        return _shm_publisher.publisher(url, options, terms)

    def subscriber(self, url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Intake]:
        from . import _shm_subscriber

        return _shm_subscriber.subscriber(url, options, terms)


class _Descriptors:
    """The memory and the bells while they are nobody's: closed at the end of the block, unless a link took them."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def make(self, capacity: int) -> None:
        self.fds.append(native_core.ring_create(capacity))
        for _ in range(_FDS - 1):
            self.fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    def adopt(self, fds: Any) -> None:
        for fd in fds:
            self.fds.append(fd)

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds:
            os.close(fd)


def _size_of(options: Options) -> int:
    """A power of two, of whole pages."""
    least = max(options.size or DEFAULT_SIZE, os.sysconf("SC_PAGESIZE"))
    return 1 << (least - 1).bit_length()


# -- connecting ---------------------------------------------------------------------------------------------------


def _introduce(url: Url, options: Options, sock: socket.socket, peer: Peer) -> Steps[Link | None]:
    """Greet, and wait for the rings. None: the listener went away before it answered."""
    with _Descriptors() as received:
        try:
            with contextlib.suppress(BrokenPipeError):  # refused already: the answer says why
                sock.send(_GREETING.pack(_MAGIC, _VERSION, _HELLO, 0), socket.MSG_NOSIGNAL)
            while (answer := _receive(sock, received)) is None:
                yield Wait(((sock.fileno(), select.POLLIN),))
        except errors.Timeout as timeout:
            raise errors.NothingListening(
                "somebody listens there, but accepts nobody", url=url, operation="connect"
            ) from timeout
        except OSError as error:
            if error.errno == errno.ECONNRESET:
                return None
            raise map_oserror(error, url, "connect") from error
        if not answer:
            return None
        kind, number = _read(url, answer)
        if kind == _REFUSED:
            raise _refused(url, number)
        if kind != _RINGS or len(received.fds) != _FDS or not all(_anonymous(fd) for fd in received.fds[1:]):
            raise errors.ProtocolError("the listener did not send what makes a ring", url=url, operation="connect")
        link = _link(url, options, received, sock, 1, peer, number)
        if options.size is not None and number < options.size:
            link.close()
            raise errors.BadOption(
                f"the listener's rings have {number} bytes",
                url=url,
                operation="connect",
                hint="give size= to the listener",
            )
        return link


def _receive(sock: socket.socket, received: _Descriptors) -> bytes | None:
    """One packet, its descriptors into `received`; None when there is none yet, empty at the end."""
    fds = array.array("i")
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            _GREETING.size + 1, socket.CMSG_SPACE(_FDS * fds.itemsize), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
    except BlockingIOError:
        return None
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    received.adopt(fds)
    # Descriptors that did not fit were closed by the kernel.
    return b"?" if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) else data


def _read(url: Url, data: bytes) -> tuple[int, int]:
    if len(data) != _GREETING.size:
        raise errors.ProtocolError("this is no greeting", url=url, operation="connect")
    magic, version, kind, number = _GREETING.unpack(data)
    if magic != _MAGIC:
        raise errors.ProtocolError("this is no greeting: its magic is wrong", url=url, operation="connect")
    if version != _VERSION:
        raise errors.ProtocolError(
            f"the peer speaks version {version}, we speak {_VERSION}", url=url, operation="connect"
        )
    return kind, number


def _refused(url: Url, code: int) -> errors.IpcError:
    if code == errno.EPROTO:
        return errors.ProtocolError("the listener does not know our version", url=url, operation="connect")
    if code == errno.EACCES:
        return errors.AccessDenied("the listener talks to its own user only", url=url, operation="connect")
    text = os.strerror(code) if code in errno.errorcode else f"error {code}"
    return errors.ResourceLimit(f"the listener cannot make the rings: {text}", url=url, operation="connect")


def _anonymous(fd: int) -> bool:
    """An eventfd has no file type. (Nor have a few others; ringing those does no harm and wakes nobody.)"""
    return stat.S_IFMT(os.fstat(fd).st_mode) == 0


# -- listening ----------------------------------------------------------------------------------------------------


class ShmListener:
    """Accepts, and gives those who greet their rings. Nobody is waited for: a silent peer keeps its slot for a while."""

    def __init__(self, url: Url, options: Options, sock: socket.socket, name: _unixsock.Name) -> None:
        self.url = url
        self._options = options
        self._acceptor = Acceptor(url, sock)
        self._name = name
        self._silent: dict[int, tuple[socket.socket, Peer, float]] = {}  # by descriptor, the oldest first
        # One descriptor for all of them: they become links' own later, and an event loop must not know them from here.
        self._greetings = select.epoll()

    @property
    def native(self) -> socket.socket:
        return self._acceptor.sock

    def try_accept(self) -> Link | None:
        while True:
            for fd, _ in self._greetings.poll(0):
                if (link := self._answer(*self._forget(fd))) is not None:
                    return link
            if not self._take_next():
                break
        now = time.monotonic()
        for fd, (_, _, deadline) in list(self._silent.items()):
            if deadline <= now:
                self._drop(*self._forget(fd), "it sent no greeting")
        return None

    def _take_next(self) -> bool:
        sock = self._acceptor.try_accept()
        if sock is None:
            return False
        peer = Peer()
        try:
            peer = _unixsock.peer_of(sock)
            _unixsock.check_peer(self.url, peer, "accept", hint=None)
            self._greetings.register(sock, select.EPOLLIN)
        except errors.AccessDenied as error:
            self._refuse(sock, errno.EACCES)
            self._drop(sock, peer, str(error))
            return True
        except OSError as error:
            self._drop(sock, peer, str(error))
            return True
        if len(self._silent) >= _HANDSHAKES:
            self._drop(*self._forget(next(iter(self._silent))), "too many connections sent no greeting")
        self._silent[sock.fileno()] = sock, peer, time.monotonic() + _PATIENCE
        return True

    def _forget(self, fd: int) -> tuple[socket.socket, Peer]:
        sock, peer, _ = self._silent.pop(fd)
        self._greetings.unregister(fd)
        return sock, peer

    def _drop(self, sock: socket.socket, peer: Peer, why: str) -> None:
        sock.close()
        _log.warning("%s: dropped a connection of process %s: %s", self.url, peer.pid, why)

    def _answer(self, sock: socket.socket, peer: Peer) -> Link | None:
        """The peer said something, or left."""
        try:
            with _Descriptors() as gift:  # whatever descriptors it sent
                data = _receive(sock, gift)
            if not data:
                sock.close()  # it gave up
                return None
            kind, _ = _read(self.url, data)
            if kind != _HELLO:
                raise errors.ProtocolError("it did not greet")
        except errors.ProtocolError as error:
            self._refuse(sock, errno.EPROTO)
            self._drop(sock, peer, str(error))
            return None
        except OSError as error:
            self._drop(sock, peer, str(error))
            return None
        try:
            with _Descriptors() as ours:
                capacity = _size_of(self._options)
                ours.make(capacity)
                rings = [_GREETING.pack(_MAGIC, _VERSION, _RINGS, capacity)]
                socket.send_fds(sock, rings, ours.fds, socket.MSG_NOSIGNAL)
                return _link(self.url, self._options, ours, sock, 0, peer, capacity)
        except (OSError, errors.IpcError) as error:
            if isinstance(error, OSError) and error.errno in SCARCE | {errno.ENOSPC}:
                self._refuse(sock, error.errno or 0)
            self._drop(sock, peer, str(error))
            return None

    def _refuse(self, sock: socket.socket, code: int) -> None:
        with contextlib.suppress(OSError):  # what is not read makes the kernel reset, and the peer lose our answer
            sock.recv(_GREETING.size, socket.MSG_DONTWAIT)
        with contextlib.suppress(OSError):  # it does not listen any more? dropping it says enough
            sock.send(_GREETING.pack(_MAGIC, _VERSION, _REFUSED, code), socket.MSG_NOSIGNAL)

    def arm(self, want: Want) -> Wait:
        wait = self._acceptor.arm()
        limits = [deadline for _, _, deadline in self._silent.values()][:1]
        if not limits:
            return Wait((*wait.fds, (self._greetings.fileno(), select.POLLIN)), wait.at_most)
        left = max(limits[0] - time.monotonic(), 0.0)
        at_most = left if wait.at_most is None else min(left, wait.at_most)
        return Wait((*wait.fds, (self._greetings.fileno(), select.POLLIN)), at_most)

    def close(self) -> None:
        self._acceptor.sock.close()
        self.abandon()
        self._name.release()

    def abandon(self) -> None:
        """The name and the listening socket are let go of by `_unixsock`."""
        self._greetings.close()
        for sock, _, _ in self._silent.values():
            sock.close()
        self._silent.clear()


# -- the link -----------------------------------------------------------------------------------------------------


def _link(
    url: Url,
    options: Options,
    descriptors: _Descriptors,
    sock: socket.socket,
    side: int,
    peer: Peer,
    capacity: int | None = None,
) -> native_core.RingLink:
    def on_fork() -> None:
        raise forked(url)

    memory, *bells = descriptors.fds
    link = native_core.RingLink(
        memory,
        _four(bells),
        sock.fileno(),
        side,
        make_fail(url, _ended(url, sock.fileno(), peer)),
        on_fork,
        options.limit,
        -1 if options.spin is None else int(options.spin * 1e9),
        Wait,
        Rings(capacity or _size_of(options), side),
        peer,
    )
    descriptors.fds.clear()  # the link's
    sock.detach()
    return link


def _four(bells: Sequence[int]) -> tuple[int, int, int, int]:
    first, second, third, fourth = bells
    return first, second, third, fourth


def _ended(url: Url, control: int, peer: Peer) -> Ended:
    """Ask the kernel how the peer's process is. It left no goodbye in the shared memory, so close() it was not."""

    def ended(operation: str, broken: str | None) -> errors.PeerError:
        fate = fate_of(control, peer.pid)
        if fate.orderly and fate.state == "exited" and broken is None:
            return errors.PeerClosed("the peer exited", url=url, operation=operation)
        how = "it broke the connection off" if fate.state == "alive" else fate.how or "it exited"
        where = f" {broken}" if broken else ""
        return errors.PeerDied(f"the peer ended{where}: {how}", url=url, operation=operation, pid=peer.pid)

    return ended


TRANSPORT = ShmTransport()
