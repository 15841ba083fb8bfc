"""One session of datagrams on a connected socket, and the header that they all have (drawn in docs/wire/datagram.md).

Frames come before the end: an ICMP answer is told ahead of what is still in the queue, so the queue is read to its end
before `PeerDied` is raised, and a goodbye found there is the better reason.
"""

from __future__ import annotations

import errno
import select
import socket
import weakref
from contextlib import suppress

from .. import errors
from .._spi import Buffer, Peer, Wait, Want
from .._url import Url
from ._inet import shown
from ._oserror import GONE, map_oserror

HELLO, CHALLENGE, ACCEPT, DATA, BYE, NO_SESSION = (bytes((c,)) for c in b"HCADBG")
SESSION = 8
HEADER = 1 + SESSION
COOKIE = 16
MAX_MESSAGE = 65507 - HEADER

#: The sessions of this process; on a listener's side they share its port, and may outlive it.
live_links: weakref.WeakSet[UdpLink] = weakref.WeakSet()


class UdpLink:
    """One session, on a connected socket."""

    def __init__(self, url: Url, limit: int, sock: socket.socket, session: bytes) -> None:
        self.session = session
        self.port = sock.getsockname()[1]
        self.peer = Peer(address=shown(sock.getpeername()))
        self.closed = False
        self._url = url
        self._limit = min(limit, MAX_MESSAGE)
        self._sock = sock
        self._prefix = DATA + session
        self._buffer = bytearray(65536)
        self._drained = False
        self._end: tuple[type[errors.PeerError] | type[errors.ProtocolError], str] | None = None
        live_links.add(self)

    @property
    def native(self) -> socket.socket:
        return self._sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> None:
        self._sock.send(ACCEPT + self.session)

    def try_send(self, frame: Buffer) -> bool:
        self._check("send")
        view = memoryview(frame).cast("B")
        if view.nbytes > self._limit:
            raise self._too_large(view.nbytes)
        try:
            self._look_ahead()
            self._sock.sendmsg((self._prefix, view))
        except BlockingIOError:
            return False
        except OSError as error:
            if isinstance(error, errors.IpcError):
                raise
            if error.errno == errno.EMSGSIZE:
                raise self._too_large(view.nbytes) from error
            if error.errno == errno.ENOBUFS:  # dropped on the way out: best effort
                return True
            if error.errno not in GONE:
                raise map_oserror(error, self._url, "send") from error
            self._broken(error)
            self._check("send")
        return True

    def _look_ahead(self) -> None:
        """A sender that does not receive is to hear of the end as well. What is there stays there for try_recv."""
        try:
            kind = self._sock.recv(HEADER, socket.MSG_PEEK)
        except BlockingIOError:
            return
        if kind[1:] == self.session and kind[:1] in (BYE, NO_SESSION):
            self._take(kind, HEADER)
            self._check("send")

    def try_flush(self) -> bool:
        self._check_open("flush")
        return True

    def try_recv(self) -> bytes | None:
        self._check_open("recv")
        if self._drained:
            self._check("recv")
        while True:
            try:
                size = self._sock.recv_into(self._buffer)
            except BlockingIOError:
                self._drained = self._end is not None  # what came before the end has been delivered
                self._check("recv")
                return None
            except OSError as error:
                if error.errno not in GONE:
                    raise map_oserror(error, self._url, "recv") from error
                self._broken(error)
                continue  # told before what is still in the queue
            frame = self._take(self._buffer, size)
            if frame is not None:
                return frame

    def _take(self, datagram: bytes | bytearray, size: int) -> bytes | None:
        """A message, or None for what is none: then the end may have come."""
        kind, session = datagram[:1], datagram[1:HEADER]
        if size < HEADER or session != self.session:
            # From the peer's address, as the socket is connected, but of another session: it started anew.
            if kind == HELLO and size == HEADER + COOKIE:
                self._end = errors.PeerDied, "another process is at the peer's address now"
            return None
        if kind == DATA:
            if size - HEADER > self._limit:
                self._end = errors.ProtocolError, f"a message of {size - HEADER} bytes, and {self._limit} is the limit"
                self._drained = True
                self._check("recv")
            return bytes(memoryview(datagram)[HEADER:size])
        if kind == HELLO:
            with suppress(OSError):
                self.accept()  # the first one was lost
        elif kind == BYE:
            self._end = errors.PeerClosed, "the peer closed"
        elif kind == NO_SESSION:
            self._end = errors.PeerDied, "the peer knows nothing of this connection any more"
        return None

    def arm(self, want: Want) -> Wait:
        self._check_open("arm")
        events = (select.POLLIN if want & Want.RECV else 0) | (select.POLLOUT if want & Want.SEND else 0)
        return Wait(((self._sock.fileno(), events),))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        live_links.discard(self)
        if self._end is None:
            with suppress(OSError):  # it may be lost anyway
                self._sock.send(BYE + self.session)
        self._sock.close()

    def abandon(self) -> None:
        self.closed = True
        live_links.discard(self)
        self._sock.close()

    def _check_open(self, operation: str) -> None:
        if self.closed:
            raise errors.Closed("this endpoint is closed", url=self._url, operation=operation)

    def _check(self, operation: str) -> None:
        self._check_open(operation)
        if self._end is not None:
            kind, message = self._end
            raise kind(message, url=self._url, operation=operation)

    def _broken(self, error: OSError) -> None:
        """An ICMP answer. Its goodbye may be in the queue already; then that is the reason."""
        if self._end is None:
            self._end = errors.PeerDied, f"nobody is there any more, says the peer's machine: {error.strerror}"

    def _too_large(self, size: int) -> errors.MessageTooLarge:
        return errors.MessageTooLarge(
            f"{size} bytes, and {self._limit} is the limit",
            url=self._url,
            operation="send",
            hint="a datagram's, or limit=",
        )
