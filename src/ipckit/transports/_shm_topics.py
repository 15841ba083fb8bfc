"""What publishers and subscribers of `shm://` say to each other before they share memory. docs/wire/shm-broadcast.md draws it.

    subscriber                           publisher
    connect, SUBSCRIBE(limit, topics, group) ──▶ is it one of ours? make its queue and bells
    check, map         ◀── QUEUE + arena, queue, data bell, room bell          or  REFUSED(why)

The socket stays open as the life line; nothing else is said on it.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .. import _linkwire as wire
from .. import _options, errors
from .._options import LinkOptions, integer, option
from .._spi import Steps, TopicTerms, Wait
from .._url import Url
from . import _unixsock
from ._oserror import map_oserror
from ._runtime import path_for

KIND = socket.SOCK_SEQPACKET
MOST = 1 << 17  # bytes of a greeting: a thousand patterns are below it
_HEAD = struct.Struct("=8sIIQ")  # magic, version, what it is, a number (SUBSCRIBE: limit; QUEUE: limit); then its text
_MAGIC, _VERSION = b"ipckcast", 1
SUBSCRIBE, QUEUE, REFUSED = 1, 2, 3
_FDS = 4

DEFAULT_SIZE = 64 << 20


def _arena(text: str) -> int:
    value = _options.size(text)
    if not 1 << 16 <= value <= 1 << 30:
        raise ValueError("from 64KiB to 1GiB")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicOptions(LinkOptions):
    size: int | None = option(
        None, _arena, "bytes for messages that somebody has not taken yet, rounded up to a power of two (64MiB)"
    )
    backlog: int = option(1000, integer(1, 1 << 24), "messages that may wait for one subscriber")
    spin: float | None = option(
        None, _options.spin, "how long a subscriber spins before sleeping, 50us at most, or auto"
    )

    @property
    def arena(self) -> int:
        return 1 << ((self.size or DEFAULT_SIZE) - 1).bit_length()


class Greeting(NamedTuple):
    kind: int
    number: int
    text: bytes


def greeting(kind: int, number: int, text: bytes = b"") -> bytes:
    return _HEAD.pack(_MAGIC, _VERSION, kind, number) + text


def read_greeting(data: bytes) -> Greeting:
    """Raises ProtocolError."""
    if len(data) < _HEAD.size or data[:8] != _MAGIC:
        raise errors.ProtocolError("this is no greeting of a publisher or subscriber")
    _, version, kind, number = _HEAD.unpack_from(data)
    if version != _VERSION:
        raise errors.ProtocolError(f"the other side speaks version {version}, we speak {_VERSION}")
    return Greeting(kind, number, data[_HEAD.size :])


class Gift(NamedTuple):
    """What a subscriber is given. The descriptors are its own."""

    sock: socket.socket
    arena: int
    queue: int
    data_bell: int
    room_bell: int

    def close(self) -> None:
        self.sock.close()
        for fd in self[1:]:
            os.close(fd)


def dial(url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Gift]:
    """Reach the publisher, and be given a queue; from then on nothing is missed."""
    hello = wire.hello(wire.Hello(wire.SUBSCRIBER, topics=terms.topics, group=terms.group))
    pause = 0.001
    while True:
        sock = yield from _unixsock.connect_steps(url, path_for(url, ".shm"), KIND)
        gift = None
        try:
            _unixsock.check_peer(url, _unixsock.peer_of(sock), "subscriber", hint=None)
            gift = yield from _ask(url, sock, greeting(SUBSCRIBE, options.limit, hello))
        except OSError as error:
            if isinstance(error, errors.IpcError):
                raise
            if not isinstance(error, ConnectionError):
                raise map_oserror(error, url, "subscriber") from error
        finally:
            if gift is None:
                sock.close()
        if gift is not None:
            return gift
        try:
            yield Wait((), pause)  # that publisher went away; another may come
        except errors.Timeout as timeout:
            raise errors.NothingListening("the publisher went away", url=url, operation="subscriber") from timeout
        pause = min(pause * 2, 0.05)


def _ask(url: Url, sock: socket.socket, question: bytes) -> Steps[Gift | None]:
    """None: it went away before it answered."""
    if len(question) > MOST:
        raise errors.BadOption("patterns of more than 128 KiB together", url=url, operation="subscriber")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MOST)
    try:
        sock.send(question, socket.MSG_NOSIGNAL)
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(sock, 4096, _FDS, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                yield Wait(((sock.fileno(), select.POLLIN),))
    except errors.Timeout as timeout:
        raise errors.NothingListening(
            "somebody listens there, but is no publisher that answers", url=url, operation="subscriber"
        ) from timeout
    try:
        if not data:
            return None
        found = read_greeting(data)
        if found.kind == REFUSED:
            raise errors.ProtocolError("the publisher refuses us: " + found.text.decode("utf-8", "replace"))
        if found.kind != QUEUE or len(fds) != _FDS or not all(_anonymous(fd) for fd in fds[2:]):
            raise errors.ProtocolError("the publisher did not send what makes a queue")
        gift = Gift(sock, *fds)
        fds = []
        return gift
    except errors.ProtocolError as error:
        raise errors.ProtocolError(
            error.message, url=url, operation="subscriber", hint="is it a publisher that listens there?"
        ) from None
    finally:
        for fd in fds:
            os.close(fd)


def _anonymous(fd: int) -> bool:
    """An eventfd has no file type."""
    return stat.S_IFMT(os.fstat(fd).st_mode) == 0


def send_queue(sock: socket.socket, limit: int, fds: Sequence[int]) -> None:
    socket.send_fds(sock, [greeting(QUEUE, limit)], fds, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
