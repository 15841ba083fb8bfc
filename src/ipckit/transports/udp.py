"""udp:// — datagrams, best effort: one message is one datagram, and any of them may be lost or overtaken.

    udp://127.0.0.1:5000              udp://0.0.0.0:0 listens on a port that the system chooses: see `listener.url`

Every datagram begins with its kind and the session's 8 random bytes, which nobody off the way can guess:

    H HELLO      session, cookie     client, again and again until it is answered
    C CHALLENGE  session, cookie     listener; it keeps nothing of who only says HELLO, and never answers with more bytes
    A ACCEPT     session             listener, for a HELLO with the cookie that was sent to that very address
    D DATA       session, payload    either
    B BYE        session             either, at close; it may be lost
    G GONE       session             listener, for data of a session that is over

A session is a socket of its own on the listener's port, connected to the client, so the kernel sorts the datagrams and one
port in a firewall is enough. Limits: 65498 bytes; a message larger than the path's MTU is cut up by IP, and lost whole with any
piece. A death is noticed only if something is sent and the peer's machine says that nobody is there.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import select
import socket
import struct
import time
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import _options, errors
from .._capabilities import Capabilities
from .._spi import Buffer, Link, Listener, Peer, Steps, Transport, Wait, Want
from .._url import Url
from . import _inet
from ._oserror import GONE, map_oserror

_log = logging.getLogger("ipckit")
_HELLO, _CHALLENGE, _ACCEPT, _DATA, _BYE, _GONE = (bytes((c,)) for c in b"HCADBG")
_SESSION = 8
_HEADER = 1 + _SESSION
_COOKIE = 16
MAX_MESSAGE = 65507 - _HEADER
_AT_A_TIME = 64  # datagrams that one try_accept looks at
_COOKIE_LIFE = 30.0  # seconds; one is good for one to two of these
_IP_PKTINFO = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(_options.LinkOptions):
    pass


class UdpTransport(Transport[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel"}),
        ordered=False,
        reliable=False,
        max_message=MAX_MESSAGE,
        cross_machine=True,
        fileno=True,
        death="unreported",
        model="single datagrams, through the network",
        use_case="the newest value matters and the lost one does not: telemetry, discovery",
    )
    options: ClassVar[type[Any]] = Options

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        try:
            host = _inet.only_host(url)
            addresses = yield from _inet.resolve(url, host, socket.SOCK_DGRAM, passive=True, operation="listen")
            sock = socket.socket(addresses[0].family, socket.SOCK_DGRAM)
            try:
                _bind(sock, addresses[0].sockaddr)
                return UdpListener(url.with_port(sock.getsockname()[1]), options, sock)
            except BaseException:
                sock.close()
                raise
        except OSError as error:
            raise error if isinstance(error, errors.IpcError) else map_oserror(error, url, "listen") from error

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        if url.path not in ("", "/") or not url.hosts or any(host.port in (None, 0) for host in url.hosts):
            raise errors.BadUrl(
                "it takes a host and its port, and no path", url=url, hint="for example udp://127.0.0.1:5000"
            )
        last: OSError | None = None
        pause = 0.02
        try:
            while True:
                for host in url.hosts:
                    try:
                        addresses = yield from _inet.resolve(
                            url, host, socket.SOCK_DGRAM, passive=False, operation="connect"
                        )
                    except socket.gaierror as error:
                        last, addresses = error, []
                    for address in addresses:
                        link, last = yield from _hello(url, options, address, pause)
                        if link is not None:
                            return link
                if not addresses:
                    yield Wait((), pause)
                pause = min(pause * 2, 0.5)
        except errors.Timeout as timeout:
            why = f": {last.strerror}" if last is not None and last.strerror else ""
            raise errors.NothingListening(f"nobody answers there{why}", url=url, operation="connect") from (
                last or timeout
            )


# -- connecting ---------------------------------------------------------------------------------------------------


def _hello(url: Url, options: Options, address: _inet.Address, patience: float) -> Steps[tuple[Link | None, Any]]:
    """Say HELLO to one address and wait a while for the answer: (link, None), or (None, the OSError if there was one)."""
    session, cookie = os.urandom(_SESSION), bytes(_COOKIE)
    sock = socket.socket(address.family, socket.SOCK_DGRAM)
    keep = False
    try:
        sock.setblocking(False)
        sock.connect(address.sockaddr)
        if sock.getsockname() == sock.getpeername():  # our own port, of all: we would be talking to ourselves
            return None, None
        deadline = time.monotonic() + patience
        sock.send(_HELLO + session + cookie)
        while (left := deadline - time.monotonic()) > 0:
            try:
                answer = sock.recv(_HEADER + _COOKIE, socket.MSG_PEEK)
            except BlockingIOError:
                yield Wait(((sock.fileno(), select.POLLIN),), left)
                continue
            ours = answer[1:_HEADER] == session
            if ours and answer[:1] == _DATA:  # the ACCEPT was lost, but here is what came after it: left for try_recv
                keep = True
                return UdpLink(url, options, sock, session), None
            sock.recv(1)
            if ours and answer[:1] == _ACCEPT:
                keep = True
                return UdpLink(url, options, sock, session), None
            if ours and answer[:1] == _CHALLENGE and len(answer) == _HEADER + _COOKIE and answer[_HEADER:] != cookie:
                cookie = answer[_HEADER:]
                sock.send(_HELLO + session + cookie)
        return None, None
    except BlockingIOError:
        return None, None
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        if error.errno not in GONE:
            raise map_oserror(error, url, "connect") from error
        yield Wait((), patience)  # nobody there, says its machine
        return None, error
    finally:
        if not keep:
            sock.close()


# -- listening ----------------------------------------------------------------------------------------------------

_links: weakref.WeakSet[UdpLink] = weakref.WeakSet()
_listeners: weakref.WeakSet[UdpListener] = weakref.WeakSet()


def _bind(sock: socket.socket, sockaddr: Any) -> None:
    """Alone on the port, but for sessions of ours that outlived their listener.

    SO_REUSEPORT lets the sessions in later; set before bind(), it would let a second listener in as well.
    """
    try:
        sock.bind(sockaddr)
    except OSError as error:
        port = sockaddr[1]
        mine = any(link.port == port for link in _links) and all(each.url.host.port != port for each in _listeners)
        if error.errno != errno.EADDRINUSE or not mine:
            raise
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(sockaddr)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


class UdpListener:
    def __init__(self, url: Url, options: Options, sock: socket.socket) -> None:
        self.url = url
        self._options = options
        self._sock = sock
        self._secret = os.urandom(32)
        self._accepted: weakref.WeakValueDictionary[Any, UdpLink] = weakref.WeakValueDictionary()
        self._wait = Wait(((sock.fileno(), select.POLLIN),))
        sock.setblocking(False)
        # Which of our addresses was spoken to: the answer has to come from that one.
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        _listeners.add(self)

    @property
    def native(self) -> socket.socket:
        return self._sock

    def try_accept(self) -> Link | None:
        for _ in range(_AT_A_TIME):
            try:
                datagram, ancillary, _, address = self._sock.recvmsg(_HEADER + _COOKIE, 128)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in GONE:  # an ICMP answer to something that we sent
                    continue
                raise map_oserror(error, self.url, "accept") from error
            try:
                link = self._answer(datagram, address, _spoken_to(ancillary))
            except OSError as error:
                _log.warning("%s: cannot answer %s: %s", self.url, _inet.shown(address), error)
                continue
            if link is not None:
                return link
        return None

    def _answer(self, datagram: bytes, address: Any, here: str | None) -> UdpLink | None:
        kind, session = datagram[:1], datagram[1:_HEADER]
        known = self._accepted.get(address)
        if len(datagram) < _HEADER:
            return None
        if kind == _DATA:
            self._reply(_GONE + session, address, here)
        elif kind == _HELLO and len(datagram) == _HEADER + _COOKIE:
            if known is not None and not known.closed:  # sent twice, before its session's socket was there to take it
                if known.session == session:
                    known.accept()
                return None
            now = int(time.monotonic() / _COOKIE_LIFE)
            offered = datagram[_HEADER:]
            if any(hmac.compare_digest(offered, self._cookie(address, session, at)) for at in (now, now - 1)):
                return self._begin(session, address, here)
            self._reply(_CHALLENGE + session + self._cookie(address, session, now), address, here)
        return None

    def _cookie(self, address: Any, session: bytes, at: int) -> bytes:
        return hmac.digest(self._secret, repr((address[:2], session, at)).encode(), "sha256")[:_COOKIE]

    def _begin(self, session: bytes, address: Any, here: str | None) -> UdpLink:
        sock = socket.socket(self._sock.family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound = self._sock.getsockname()
            sock.bind((here or bound[0], *bound[1:]))
            sock.connect(address)
            _forget_strangers(sock)
            link = UdpLink(self.url, self._options, sock, session)
            link.accept()
        except BaseException:
            sock.close()
            raise
        self._accepted[address] = link
        return link

    def _reply(self, datagram: bytes, address: Any, here: str | None) -> None:
        ancillary: list[tuple[int, int, bytes]] = []
        if here is not None and self._sock.family == socket.AF_INET6:
            info = struct.pack("16sI", socket.inet_pton(socket.AF_INET6, here), 0)
            ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]
        elif here is not None:
            info = struct.pack("I4s4s", 0, socket.inet_aton(here), bytes(4))
            ancillary = [(socket.IPPROTO_IP, _IP_PKTINFO, info)]
        self._sock.sendmsg([datagram], ancillary, 0, address)

    def arm(self, want: Want) -> Wait:
        return self._wait

    def close(self) -> None:
        _listeners.discard(self)
        self._sock.close()

    abandon = close


def _forget_strangers(sock: socket.socket) -> None:
    """What came between bind() and connect() may be from anybody; the client has sent no data yet."""
    while True:
        try:
            sock.recv(1)
        except BlockingIOError:
            return


def _spoken_to(ancillary: list[tuple[int, int, bytes]]) -> str | None:
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return socket.inet_ntoa(data[4:8])
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and not data.startswith(b"\xfe\x80"):
            return socket.inet_ntop(socket.AF_INET6, data[:16])  # a link-local one needs its scope: left to the kernel
    return None


# -- the link -----------------------------------------------------------------------------------------------------


class UdpLink:
    """One session, on a connected socket."""

    def __init__(self, url: Url, options: Options, sock: socket.socket, session: bytes) -> None:
        self.session = session
        self.port = sock.getsockname()[1]
        self.peer = Peer(address=_inet.shown(sock.getpeername()))
        self.closed = False
        self._url = url
        self._limit = min(options.limit, MAX_MESSAGE)
        self._sock = sock
        self._prefix = _DATA + session
        self._buffer = bytearray(65536)
        self._end: tuple[type[errors.PeerError] | type[errors.ProtocolError], str] | None = None
        _links.add(self)

    @property
    def native(self) -> socket.socket:
        return self._sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def accept(self) -> None:
        self._sock.send(_ACCEPT + self.session)

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
            raise self._broken(error, "send") from error
        return True

    def _look_ahead(self) -> None:
        """A sender that does not receive is to hear of the end as well. What is there stays there for try_recv."""
        try:
            kind = self._sock.recv(_HEADER, socket.MSG_PEEK)
        except BlockingIOError:
            return
        if kind[1:] == self.session and kind[:1] in (_BYE, _GONE):
            self._take(kind, _HEADER)
            self._check("send")

    def try_flush(self) -> bool:
        self._check_open("flush")
        return True

    def try_recv(self) -> bytes | None:
        self._check("recv")
        while True:
            try:
                size = self._sock.recv_into(self._buffer)
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._broken(error, "recv") from error
            frame = self._take(self._buffer, size)
            if frame is not None:
                return frame
            self._check("recv")

    def _take(self, datagram: bytes | bytearray, size: int) -> bytes | None:
        """A message, or None for what is none: then the end may have come."""
        kind, session = datagram[:1], datagram[1:_HEADER]
        if size < _HEADER or session != self.session:
            # From the peer's address, as the socket is connected, but of another session: it started anew.
            if kind == _HELLO and size == _HEADER + _COOKIE:
                self._end = errors.PeerDied, "another process is at the peer's address now"
            return None
        if kind == _DATA:
            if size - _HEADER > self._limit:
                self._end = errors.ProtocolError, f"a message of {size - _HEADER} bytes, and {self._limit} is the limit"
                return None
            return bytes(memoryview(datagram)[_HEADER:size])
        if kind == _HELLO:
            self.accept()  # the first one was lost
        elif kind == _BYE:
            self._end = errors.PeerClosed, "the peer closed"
        elif kind == _GONE:
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
        _links.discard(self)
        if self._end is None:
            try:
                self._sock.send(_BYE + self.session)
            except OSError:
                _log.debug("%s: the goodbye could not be sent", self._url)
        self._sock.close()

    def abandon(self) -> None:
        self.closed = True
        _links.discard(self)
        self._sock.close()

    def _check_open(self, operation: str) -> None:
        if self.closed:
            raise errors.Closed("this endpoint is closed", url=self._url, operation=operation)

    def _check(self, operation: str) -> None:
        self._check_open(operation)
        if self._end is not None:
            kind, message = self._end
            raise kind(message, url=self._url, operation=operation)

    def _broken(self, error: OSError, operation: str) -> errors.IpcError:
        if error.errno not in GONE:
            return map_oserror(error, self._url, operation)
        self._end = errors.PeerDied, "nobody is there any more, says the peer's machine"
        return errors.PeerDied(self._end[1], url=self._url, operation=operation)

    def _too_large(self, size: int) -> errors.MessageTooLarge:
        return errors.MessageTooLarge(
            f"{size} bytes, and {self._limit} is the limit",
            url=self._url,
            operation="send",
            hint="a datagram's, or limit=",
        )


TRANSPORT = UdpTransport()
