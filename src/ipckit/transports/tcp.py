"""tcp:// — TCP, between machines or over loopback.

    tcp://127.0.0.1:5000              tcp://0.0.0.0:0 listens on a port that the system chooses: see `listener.url`
    tcp://a.example:5000,b.example:5000   connects to the first that answers

Promises: whole frames in order. A process that dies is reported at once (its kernel says so, and the goodbye is missing); a
machine that vanishes, after `keepalive`. Not encrypted, and nobody is authenticated: tls:// does both.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any, ClassVar

from .._capabilities import Capabilities
from .._spi import Link, Listener, Peer, Steps, Transport, Wait, Want
from .._url import Url
from . import _inet, _linger
from ._accept import Acceptor
from ._stream import FdLink, StreamOptions, make_link


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(StreamOptions):
    keepalive: float = _inet.keepalive_option()


class TcpTransport(Transport[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        cross_machine=True,
        fileno=True,
        model="messages on a byte stream, through the network",
        use_case="services on other machines, inside a network that is trusted",
    )
    options: ClassVar[type[Any]] = Options

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        sock, where = yield from _inet.listen_steps(url)
        return TcpListener(where, options, sock)

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        sock, _ = yield from _inet.connect_steps(url, options.keepalive)
        return _link(url, options, sock)


class TcpListener:
    def __init__(self, url: Url, options: Options, sock: socket.socket) -> None:
        self.url = url
        self._options = options
        self._acceptor = Acceptor(url, sock)

    @property
    def native(self) -> socket.socket:
        return self._acceptor.sock

    def try_accept(self) -> Link | None:
        while (sock := self._acceptor.try_accept()) is not None:
            try:
                _inet.tune(sock, self._options.keepalive)
                return _link(self.url, self._options, sock)
            except OSError:  # reset before we took it
                sock.close()
        return None

    def arm(self, want: Want) -> Wait:
        return self._acceptor.arm()

    def close(self) -> None:
        self._acceptor.sock.close()

    abandon = close


class TcpLink(FdLink):
    """Its close() keeps what was sent from being overtaken by a reset."""

    def __new__(cls, *args: Any) -> TcpLink:
        link = super().__new__(cls, *args)
        link.pid = os.getpid()
        return link

    pid: int

    def close(self, goodbye: bool = True) -> None:
        if self.closed or self.pid != os.getpid():  # in a forked child the connection is the parent's
            super().close(goodbye)
            return
        try:
            ours = self.native.socket()
        except OSError:  # not a descriptor is to be had; to give this one back comes first
            super().close(goodbye)
            return
        super().close(goodbye)
        _linger.finish(ours)


def _link(url: Url, options: Options, sock: socket.socket) -> Link:
    try:
        peer = Peer(address=_inet.shown(sock.getpeername()))
    except OSError:  # gone already: reading will say so
        peer = Peer()
    fd = sock.detach()
    return make_link(url, options, fd, fd, peer=peer, kind=TcpLink)


TRANSPORT = TcpTransport()
