"""unix:// — Unix domain stream sockets, between processes of one machine.

    unix://calc             a socket in the runtime directory
    unix:///run/app/calc    a socket at this path

Promises: whole frames in order; the peer's pid and uid from the kernel; its death is reported at once, and told from its
close() even where it writes no goodbye, because the kernel can be asked what became of it. The name is free again as soon
as its listener is gone, however it went. Only processes of our own user and root are let in, unless `allow=any`.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import errors
from .._capabilities import Capabilities
from .._options import choice, option
from .._spi import Link, Listener, Peer, Steps, Transport, Wait, Want
from .._url import Url
from . import _unixsock
from ._accept import Acceptor
from ._death import fate_of
from ._native import Ended
from ._runtime import path_for
from ._stream import StreamOptions, make_link

_log = logging.getLogger("ipckit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(StreamOptions):
    allow: str = option("same", choice("same", "any"), "whom to talk to: processes of the same user (and root), or any")


class UnixTransport(Transport[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        pair=True,
        peer_credentials=True,
        fileno=True,
        model="messages on a byte stream, through the kernel, by a name on the file system",
        use_case="services and their clients on one machine; the default when in doubt",
    )
    options: ClassVar[type[Any]] = Options

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        sock, name = _unixsock.bind(url, path_for(url, ".sock"))
        return UnixListener(url, options, sock, name)
        yield  # nothing to wait for

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        sock = yield from _unixsock.connect_steps(url, path_for(url, ".sock"))
        try:
            peer = _unixsock.peer_of(sock)
            if options.allow != "any":
                _unixsock.check_peer(url, peer, "connect")
        except BaseException:
            sock.close()
            raise
        return _link(url, options, sock, peer)

    def pair(self, url: Url, options: Options) -> tuple[Link, Link]:
        """The kernel knows only who made a pair, not who holds its ends: without a goodbye, an end has died."""
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        peer = _unixsock.peer_of(left)
        for sock in (left, right):
            sock.setblocking(False)
        first, second = left.detach(), right.detach()
        return (
            make_link(url, options, first, first, peer=peer),
            make_link(url, options, second, second, peer=peer),
        )


class UnixListener:
    def __init__(self, url: Url, options: Options, sock: socket.socket, name: _unixsock.Name) -> None:
        self.url = url
        self._options = options
        self._acceptor = Acceptor(url, sock)
        self._name = name

    @property
    def native(self) -> socket.socket:
        return self._acceptor.sock

    def try_accept(self) -> Link | None:
        while (sock := self._acceptor.try_accept()) is not None:
            try:
                peer = _unixsock.peer_of(sock)
                if self._options.allow != "any":
                    _unixsock.check_peer(self.url, peer, "accept")
            except (OSError, errors.AccessDenied) as error:
                sock.close()
                _log.warning("%s: refused a connection: %s", self.url, error)
                continue
            return _link(self.url, self._options, sock, peer)
        return None

    def arm(self, want: Want) -> Wait:
        return self._acceptor.arm()

    def close(self) -> None:
        self._acceptor.sock.close()
        self._name.release()


def _link(url: Url, options: Options, sock: socket.socket, peer: Peer) -> Link:
    fd = sock.detach()
    return make_link(url, options, fd, fd, peer=peer, ended=_ended(url, fd, peer))


def _ended(url: Url, fd: int, peer: Peer) -> Ended:
    """Ask the kernel. It matters only without a goodbye: a peer of ours that died, or a foreign client that just closes."""

    def ended(operation: str, broken: str | None) -> errors.PeerError:
        fate = fate_of(fd, peer.pid)
        if broken is None and fate.orderly:
            return errors.PeerClosed("the peer closed", url=url, operation=operation)
        parts = ["the peer ended", broken or "without a goodbye"]
        how = "" if fate.orderly else f": {fate.how}"
        return errors.PeerDied(" ".join(parts) + how, url=url, operation=operation, pid=peer.pid)

    return ended


TRANSPORT = UnixTransport()
