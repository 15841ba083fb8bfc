"""tls:// — TCP, encrypted, and with the server's name proven.

    tls://calc.example:5000?ca=ca.pem                                   connect
    tls://0.0.0.0:5000?cert=server.pem&key=server.key                   listen
    ...&client_ca=clients.pem                                           listen, and let in only who has a certificate of theirs
    tls://calc.example:5000?ca=ca.pem&cert=me.pem&key=me.key            connect, with a certificate of our own

One URL may serve both ends: each takes what concerns it.

Promises: those of tcp://; TLS 1.2 or later; there is no way to switch verification off. The goodbye is TLS's own
close_notify, which nobody on the way can forge. A handshake belongs to the listener's `try_accept` until it is done, so a
client that is slow about it keeps nobody else waiting: there are only so many at a time, each for so long.
Limit: framed in Python on OpenSSL, so it costs more per message than tcp://.
"""

from __future__ import annotations

import logging
import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import _options, errors
from .._capabilities import Capabilities
from .._options import integer, option, text
from .._spi import Link, Listener, Steps, Transport, Wait, Want
from .._url import Url
from . import _frames, _inet
from ._accept import Acceptor
from ._tlslink import TlsLink

_log = logging.getLogger("ipckit")
_AT_A_TIME = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(_options.LinkOptions):
    limit: int = _frames.limit_option()
    ca: str | None = option(None, text, "connect: file of the authorities to trust, instead of the system's")
    cert: str | None = option(None, text, "file with our certificate (and its chain); listening needs one")
    key: str | None = option(None, text, "file with its private key, if it is not in cert")
    client_ca: str | None = option(None, text, "listen: file of authorities; clients must have a certificate of theirs")
    server_name: str | None = option(
        None, text, "connect: the name that the certificate must be for, if not the host's"
    )
    keepalive: float = _inet.keepalive_option()
    handshake: float = option(10.0, _options.duration, "listen: the time that a client has for its handshake")
    handshakes: int = option(64, integer(1, 10_000), "listen: how many at once; the oldest makes way")


class TlsTransport(Transport[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        cross_machine=True,
        encrypted=True,
        fileno=True,
        model="messages on an encrypted byte stream, through the network",
        use_case="services on other machines, across networks that are not trusted",
    )
    options: ClassVar[type[Any]] = Options

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        context = _server_context(url, options)
        sock, where = yield from _inet.listen_steps(url)
        return TlsListener(where, options, sock, context)

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        context = _client_context(url, options)
        pause = 0.001
        while True:
            plain, host = yield from _inet.connect_steps(url, options.keepalive)
            link = TlsLink(url, options.limit, context, plain, server_name=options.server_name or host.name)
            done = False
            try:
                while not link.handshake():
                    yield link.handshake_wait()
                done = True
                return link
            except errors.PeerError as error:  # it went away in the middle: a listener that is restarting, perhaps
                last = error
            except errors.Timeout as timeout:
                raise errors.NothingListening(
                    "somebody accepts connections there, but does not answer the TLS handshake",
                    url=url,
                    operation="connect",
                ) from timeout
            finally:
                if not done:
                    link.drop()
            try:
                yield Wait((), pause)
            except errors.Timeout:
                raise errors.NothingListening(last.message, url=url, operation="connect") from last
            pause = min(pause * 2, 0.25)


# -- contexts -----------------------------------------------------------------------------------------------------


def _client_context(url: Url, options: Options) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies the chain and the name
    if options.ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load(url, "ca", lambda: context.load_verify_locations(options.ca))
    return _common(url, options, context)


def _server_context(url: Url, options: Options) -> ssl.SSLContext:
    if options.cert is None:
        raise errors.BadOption("listening needs a certificate", url=url, hint="cert=server.pem&key=server.key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody resumes; unread tickets at close would reset the connection
    if options.client_ca is not None:
        _load(url, "client_ca", lambda: context.load_verify_locations(options.client_ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return _common(url, options, context)


def _common(url: Url, options: Options, context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if options.cert is not None:
        # An encrypted key would ask at the terminal: it has no password, so it is refused.
        cert, key = options.cert, options.key
        _load(url, "cert", lambda: context.load_cert_chain(cert, key, password=b""))
    elif options.key is not None:
        raise errors.BadOption("key without cert", url=url)
    return context


def _load(url: Url, what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:
        raise errors.BadOption(f"option {what!r}: the file cannot be used: {error}", url=url) from error


# -- listening ----------------------------------------------------------------------------------------------------


class TlsListener:
    """Accepts, and sees every handshake through. One epoll descriptor stands for all sockets: they come and go."""

    def __init__(self, url: Url, options: Options, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.url = url
        self._options = options
        self._context = context
        self._acceptor = Acceptor(url, sock)
        self._pending: dict[int, tuple[TlsLink, float]] = {}  # by descriptor, oldest first: the link, its deadline
        self._ready: list[TlsLink] = []
        self._epoll = select.epoll()
        self._wait_fds = ((self._epoll.fileno(), select.POLLIN),)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    @property
    def native(self) -> socket.socket:
        return self._acceptor.sock

    def try_accept(self) -> Link | None:
        for fd, _ in self._epoll.poll(0):
            if fd in self._pending:
                self._advance(self._pending[fd][0])
        for _ in range(_AT_A_TIME):  # a flood of connections must not keep the handshakes waiting
            if self._ready or (plain := self._acceptor.try_accept()) is None:
                break
            self._begin(plain)
        self._expire()
        return self._ready.pop(0) if self._ready else None

    def _begin(self, plain: socket.socket) -> None:
        try:
            _inet.tune(plain, self._options.keepalive)
            link = TlsLink(self.url, self._options.limit, self._context, plain, server_name=None)
        except (OSError, errors.IpcError) as error:
            plain.close()
            _log.warning("%s: dropped a connection: %s", self.url, error)
            return
        if len(self._pending) >= self._options.handshakes:
            self._drop(next(iter(self._pending.values()))[0], "too many handshakes at once, and this is the oldest")
        self._pending[link.fileno()] = link, time.monotonic() + self._options.handshake
        self._epoll.register(link.fileno(), select.EPOLLIN)
        self._advance(link)

    def _advance(self, link: TlsLink) -> None:
        try:
            done = link.handshake()
        except errors.IpcError as error:
            self._drop(link, error.message)
            return
        if done:
            self._forget(link)
            self._ready.append(link)
        else:
            self._epoll.modify(link.fileno(), link.handshake_wait().fds[0][1])

    def _expire(self) -> None:
        now = time.monotonic()
        while self._pending:
            link, deadline = next(iter(self._pending.values()))
            if deadline > now:
                break
            self._drop(link, f"no handshake within {self._options.handshake:g} s")

    def _drop(self, link: TlsLink, why: str) -> None:
        self._forget(link)
        link.drop()
        _log.warning("%s: dropped %s: %s", self.url, link.peer.address, why)

    def _forget(self, link: TlsLink) -> None:
        self._epoll.unregister(link.fileno())
        del self._pending[link.fileno()]

    def arm(self, want: Want) -> Wait:
        paused = self._acceptor.arm()
        if not paused.fds:  # no descriptors left to accept with: handshakes wait a moment as well
            return paused
        if not self._pending:
            return Wait(self._wait_fds)
        return Wait(self._wait_fds, max(next(iter(self._pending.values()))[1] - time.monotonic(), 0.0))

    def close(self) -> None:
        self._epoll.close()
        self._acceptor.sock.close()
        for link, _ in self._pending.values():
            link.drop()
        for link in self._ready:
            link.drop()

    abandon = close


TRANSPORT = TlsTransport()
