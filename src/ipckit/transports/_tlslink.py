"""Frames on a non-blocking SSLSocket.

OpenSSL allows one caller at a time, and none of our calls waits: so one mutex keeps the sending and the receiving thread
apart. It may ask for the other direction (to read before it can write, and the reverse), and `arm` passes that on.
close_notify is the goodbye: without it, an end of file is a death.
"""

from __future__ import annotations

import errno
import select
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress

from .. import errors
from .._spi import Buffer, Peer, Wait, Want
from .._url import Url
from . import _inet, _linger
from ._frames import HEADER_SIZE, FrameDecoder, FrameTooLong, header
from ._oserror import GONE, map_oserror

_RECORD = 16 << 10  # plain bytes in one TLS record, at most
_READ = 64 << 10
_FORESIGHT = 16 << 20  # unread input to keep when a send finds the peer gone


class TlsLink:
    """A Link over an SSLSocket, which it owns. `server_name`: whom we connect to; None: we are the server."""

    def __init__(
        self, url: Url, limit: int, context: ssl.SSLContext, plain: socket.socket, *, server_name: str | None
    ) -> None:
        self._url = url
        self._limit = limit
        try:
            self.peer = Peer(address=_inet.shown(plain.getpeername()))  # wrap_socket leaks a socket that is reset
            self._sock = context.wrap_socket(
                plain,
                server_side=server_name is None,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
                server_hostname=server_name,
            )
        except (OSError, ValueError) as error:
            plain.close()
            if isinstance(error, OSError):
                raise _map(error, url, "handshake") from error
            raise errors.BadUrl(f"{server_name!r} cannot be the name in a certificate", url=url) from error
        self._mutex = threading.Lock()
        self._decoder = FrameDecoder(limit)
        self._uncounted_out = 0
        self._reframed = False
        self._rest: list[memoryview] = []  # of the one accepted frame that has not all gone out
        self._end: errors.IpcError | None = None  # nothing more will come
        self._broken: errors.IpcError | None = None  # nothing more will go
        self._closed = False
        # What OpenSSL asked for when a call could not go on: reading may need to write, and the other way round.
        self._recv_needs = select.POLLIN
        self._send_needs = select.POLLOUT

    @property
    def native(self) -> ssl.SSLSocket:
        return self._sock

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- handshake

    def handshake(self) -> bool:
        """One step. Raises AccessDenied (not who it should be), PeerDied, ProtocolError."""
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._recv_needs = select.POLLIN
        except ssl.SSLWantWriteError:
            self._recv_needs = select.POLLOUT
        except OSError as error:
            raise _map(error, self._url, "handshake") from error
        else:
            self._recv_needs = select.POLLIN
            return True
        return False

    def handshake_wait(self) -> Wait:
        return Wait(((self.fileno(), self._recv_needs),))

    # -- sending

    def try_send(self, frame: Buffer) -> bool:
        view = memoryview(frame).cast("B")
        if view.nbytes > self._limit + self._uncounted_out:
            raise errors.MessageTooLarge(
                f"{view.nbytes} bytes, and {self._limit} is the limit",
                url=self._url,
                operation="send",
                hint="limit= raises it",
            )
        with self._mutex:
            self._check("send")
            if not self._flush("send"):
                return False
            # One record for a small frame; the header goes with the first record of a large one, which is not copied.
            first = header(view.nbytes - self._uncounted_out) + bytes(view[: _RECORD - HEADER_SIZE])
            self._rest = [memoryview(first), view[_RECORD - HEADER_SIZE :]]
            if not self._flush("send"):
                self._rest = [memoryview(bytes(part)) for part in self._rest]  # the caller's buffer is the caller's
            return True

    def try_flush(self) -> bool:
        with self._mutex:
            self._check("send")
            return self._flush("send")

    def _flush(self, operation: str) -> bool:
        try:
            while self._rest:
                part = self._rest[0]
                if not part.nbytes:
                    del self._rest[0]
                    continue
                self._rest[0] = part[self._sock.send(part) :]
        except ssl.SSLWantReadError:
            self._send_needs = select.POLLIN
            return False
        except (ssl.SSLWantWriteError, BlockingIOError):
            self._send_needs = select.POLLOUT
            return False
        except OSError as error:
            self._rest = []
            self._broken = self._why_broken(error, operation)
            raise self._again(self._broken, operation) from error
        self._send_needs = select.POLLOUT
        return True

    def _why_broken(self, error: OSError, operation: str) -> errors.IpcError:
        """The peer does not read any more. What it sent before says whether it closed, and is still to be delivered."""
        for _ in range(_FORESIGHT // _READ):
            if self._end is not None or not self._read():
                break
        if self._end is not None:
            return self._end
        mapped = _map(error, self._url, operation)
        mapped.__cause__ = error
        return mapped

    # -- receiving

    def try_recv(self) -> bytes | None:
        return self._receive(self._decoder.next)

    def try_glance(self, count: int, /) -> bytes | None:
        return self._receive(lambda: self._decoder.glance(count))

    def reframe(self, uncounted_in: int, uncounted_out: int, /) -> None:
        self._decoder.uncounted, self._uncounted_out = uncounted_in, uncounted_out
        self._reframed = True

    def _receive(self, take: Callable[[], bytes | None]) -> bytes | None:
        with self._mutex:
            self._check_open("recv")
            if self._rest and self._broken is None:
                with suppress(errors.IpcError):  # sending will say so
                    self._flush("recv")
            while True:
                try:
                    frame = take()
                except FrameTooLong as error:
                    raise self._over(errors.ProtocolError(str(error)), error) from error
                if frame is not None:
                    return frame
                if self._end is not None:
                    raise self._again(self._end, "recv")
                if not self._read():
                    return None

    def _read(self) -> bool:
        """Some more bytes, or the end; False when there is nothing now."""
        try:
            data = self._sock.recv(_READ)
        except ssl.SSLWantReadError:
            self._recv_needs = select.POLLIN
            return False
        except ssl.SSLWantWriteError:
            self._recv_needs = select.POLLOUT
            return False
        except OSError as error:
            self._over(_map(error, self._url, "recv"), error)
            return True
        if data:
            self._decoder.feed(data)
        elif self._decoder.inside:
            self._over(errors.PeerDied("the peer ended inside a message"), None)
        else:
            self._over(errors.PeerClosed("the peer closed"), None)
        return True

    # -- waiting

    def arm(self, want: Want) -> Wait:
        with self._mutex:
            self._check_open("arm")
            events = 0
            if want & Want.RECV:
                events |= self._recv_needs
            if want & Want.SEND or self._rest:
                events |= self._send_needs
            return Wait(((self._sock.fileno(), events),))

    # -- the end

    def close(self) -> None:
        """Says close_notify, unless part of a frame is left: then that would be a lie, and the peer hears of a death."""
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            if (self._may_be_told or (self._end is None and self._broken is None)) and not self._farewell():
                with suppress(OSError):  # no room: ask for some once, rather than let the peer take this for a death
                    room = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
                    more = sum(part.nbytes for part in self._rest)
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room + 2 * more + _RECORD)
                self._farewell()
            self._rest = []
            _linger.finish(socket.socket(fileno=self._sock.detach()))

    def _farewell(self) -> bool:
        """The rest, then close_notify. The peer's own is not waited for. False if there was no room."""
        try:
            if not self._flush("close"):
                return False
            self._sock.unwrap()
        except ssl.SSLWantWriteError:
            return False
        except (OSError, ValueError, errors.IpcError):
            pass
        return True

    def drop(self) -> None:
        """Close without a word: during a handshake, and in a forked child."""
        self._closed = True
        self._sock.close()

    def abandon(self) -> None:
        self.drop()

    def _check_open(self, operation: str) -> None:
        if self._closed:
            raise self._again(errors.Closed("this endpoint is closed"), operation)

    def _check(self, operation: str) -> None:
        self._check_open(operation)
        ended = self._broken or self._end
        if ended is not None and not self._may_be_told:
            raise self._again(ended, operation)

    @property
    def _may_be_told(self) -> bool:
        """A stranger whose frame was too large: it is to hear what was wrong."""
        return self._reframed and self._broken is None and isinstance(self._end, errors.ProtocolError)

    def _over(self, error: errors.IpcError, cause: BaseException | None) -> errors.IpcError:
        """It ends here. The first reason stays."""
        if self._end is None:
            error.__cause__ = cause
            self._end = error
        return self._again(self._end, error.operation or "recv")

    def _again(self, error: errors.IpcError, operation: str) -> errors.IpcError:
        fresh = type(error)(error.message, url=self._url, operation=operation, hint=error.hint)
        fresh.__cause__ = error.__cause__
        return fresh


def _map(error: OSError, url: Url, operation: str) -> errors.IpcError:
    """OpenSSL's exceptions, and the socket's."""
    match error:
        case ssl.SSLCertVerificationError():
            return errors.AccessDenied(
                f"the peer's certificate does not verify: {error.verify_message}",
                url=url,
                operation=operation,
                hint="ca= names the file with its authority, server_name= the name that it is for",
            )
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return errors.PeerDied("the peer ended without a goodbye", url=url, operation=operation)
        case ssl.SSLSyscallError() if error.errno in (None, 0, errno.EPIPE, errno.ECONNRESET):
            return errors.PeerDied("the connection broke", url=url, operation=operation)
        case ssl.SSLError():
            reason = (error.reason or str(error)).replace("_", " ").lower()
            return errors.ProtocolError(f"TLS: {reason}", url=url, operation=operation)
        case _ if error.errno in GONE:
            return errors.PeerDied(error.strerror or "the connection broke", url=url, operation=operation)
        case _:
            return map_oserror(error, url, operation)
