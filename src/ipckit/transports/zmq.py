"""zmq+tcp://, zmq+ipc://, zmq+inproc:// — ZeroMQ, by pyzmq and its libzmq.

    zmq+tcp://127.0.0.1:5555      one port for everybody; 0 listens on a port that the system chooses: see `listener.url`
    zmq+ipc://name                a Unix socket of mode 0600 in the runtime directory; zmq+ipc:///path is that path
    zmq+inproc://name             threads and tasks of one process

A listener is one ROUTER, so is each connecting side; a DEALER of any language can connect as well, for a frame is a message of
one part, and a control message has two, the first of them empty (docs: `_zmq_hub`). Promises: whole frames in order; a
killed peer is reported at once, after what it had sent; a connection is never resumed behind one's back; backpressure
by windows (`rcvhwm`, `window`), and by `sndhwm` for the sender; `close()` is immediate, and what was sent before
goes out for `linger` more. Names, ports and their liveness are our own (a lock beside the path, a probe), because
libzmq takes a live path over without a word: it only serves the connections.

Queues and topics go over these links: acknowledged, handed out again, counted. With `native=on` they are a PUSH and a PULL, an
XPUB and a SUB, which any ZeroMQ program can be the other end of; both ends have to say so (`_zmq_native`, docs/wire/zmq.md).

Limits: not encrypted. `send()` returns when libzmq's thread has the frame, some 50 µs before the kernel has it. libzmq ends
the connections that it accepted at a TCP port together with the port; so after `Listener.close()` nobody is let in any more,
but the port is free for others only when the last accepted channel is closed. One link waits inside libzmq; several links of
one listener, or a link and a listener that waits, share a thread that looks for them all and costs a hop.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .. import errors
from .._capabilities import Capabilities
from .._options import LinkOptions, duration, flag, integer, option, read, size
from .._spi import (
    Intake,
    Link,
    Listener,
    Outlet,
    Peer,
    Publishing,
    PublishTerms,
    QueueTerms,
    SidedQueues,
    Steps,
    Topics,
    TopicTerms,
    Transport,
    Wait,
    Want,
)
from .._url import Host, Url
from . import _inet, _unixsock
from ._runtime import path_for

if TYPE_CHECKING:
    from ._unixsock import Name
    from ._zmq_hub import Hub
    from ._zmq_link import ZmqLink
    from ._zmq_native import Native

N = TypeVar("N", bound="Native")

#: How long a connection that is made waits to be welcomed: a listener that nobody accepts at is a listener all the same.
_GRACE = 0.05
_ATTEMPT = 5.0  # seconds for one address, before the next one gets its turn


def _linger(text: str) -> float:
    seconds = duration(text)
    if seconds > 24 * 86400:  # libzmq counts milliseconds in an int
        raise ValueError("at most 24d")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(LinkOptions):
    rcvhwm: int = option(1000, integer(1, 1 << 20), "messages that the peer may send before we receive them")
    sndhwm: int = option(1000, integer(1, 1 << 20), "messages that we send before the peer receives them")
    window: int = option(
        64 << 20, size, "bytes that the peer may send before we receive them; one message more is taken"
    )
    linger: float = option(5.0, _linger, "how long after close() and at exit what was sent may still go out")
    keepalive: float = _inet.keepalive_option()
    native: bool = option(
        False, flag, "queues by PUSH and PULL, topics by PUB and SUB: as fast as they are, and no safer"
    )


def _native(url: Url) -> bool:
    return any(name == "native" for name, _ in url.options) and read(Options, _known(url)).native


def _known(url: Url) -> Url:
    return replace(url, options=tuple(pair for pair in url.options if pair[0] == "native"))


class Zmq(Transport[Options], SidedQueues[Options], Topics[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        handed_over=False,
        cross_machine=True,
        model="messages, by sockets with a thread that sends and receives ahead",
        synchronisation="no",
        data="messages of bytes",
        decoupled=False,
        use_case="services in many languages, without a broker",
    )
    options: ClassVar[type[Any]] = Options
    queue_options = topic_options = Options
    requires = ("zmq",)
    extra = "zmq"

    def capabilities_of(self, url: Url) -> Capabilities:
        found = self._of_scheme(url)
        if not _native(url):
            return found
        return replace(
            found,
            patterns=frozenset({"queue", "pubsub"}),
            headers=False,
            redelivery=False,
            counted=False,
            reliable=False,  # libzmq connects again by itself, and does not say what was lost with the connection
            peer_credentials=False,
            native_topics=True,
            death="unreported",
        )

    def _of_scheme(self, url: Url) -> Capabilities:
        if url.scheme == "zmq+tcp":
            return self.capabilities
        if url.scheme == "zmq+ipc":
            return replace(
                self.capabilities,
                cross_machine=False,
                peer_credentials=True,
                use_case="programs of one machine that speak ZeroMQ already",
            )
        return replace(
            self.capabilities,
            cross_machine=False,
            cross_process=False,
            peer_credentials=True,
            handed_over=True,
            model="messages, by queues in memory",
            use_case="threads of one program that will be processes later",
        )

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        _check(url)
        from ._zmq_hub import Hub

        with ExitStack() as undo:
            url, address, sock, name = yield from _take(url, undo)
            hub = Hub(url, options, dials=False)
            undo.callback(hub.discard)
            hub.bind(address, sock)
            undo.pop_all()
        return ZmqListener(url, options, hub, name)

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        _check(url)
        pause = 0.001
        try:
            while True:
                for address in (yield from _addresses(url)):
                    link = yield from _attempt(url, options, address)
                    if link is not None:
                        return link
                yield Wait((), pause)
                pause = min(pause * 2, 0.05)
        except errors.Timeout as timeout:
            raise errors.NothingListening("nobody listens there", url=url, operation="connect") from timeout

    # `native=on`

    def serves(self, url: Url) -> bool:
        return _native(url)

    def sender(self, url: Url, options: Options, listen: bool = False) -> Steps[Outlet]:
        from ._zmq_native import Push

        return (yield from _opened(url, options, listen, lambda url: Push(url, options), "queue"))

    def receiver(self, url: Url, options: Options, terms: QueueTerms, listen: bool = True) -> Steps[Intake]:
        from ._zmq_native import Pull

        if terms.group is not None:
            raise errors.Unsupported("a PULL has no groups", url=url, operation="receiver")
        return (yield from _opened(url, options, listen, lambda url: Pull(url, options), "queue"))

    def publisher(self, url: Url, options: Options, terms: PublishTerms) -> Steps[Publishing]:
        from ._zmq_native import Publish

        if terms.on_full not in ("block", "error"):
            what = f"on_full={terms.on_full!r}, because libzmq drops without counting"
        elif terms.retain:
            what = "retain="
        else:
            return (yield from _opened(url, options, True, lambda url: Publish(url, options, terms), "topics"))
        raise errors.Unsupported(f"native=on has no {what}", url=url, operation="publisher", hint="native=off has it")

    def subscriber(self, url: Url, options: Options, terms: TopicTerms) -> Steps[Intake]:
        from ._zmq_native import Subscribe

        if terms.group is not None:
            raise errors.Unsupported("a SUB has no groups", url=url, operation="subscriber", hint="native=off has them")
        return (yield from _opened(url, options, False, lambda url: Subscribe(url, options, terms), "topics"))


def _check(url: Url) -> None:
    if url.scheme != "zmq+tcp":
        if any(name == "keepalive" for name, _ in url.options):
            raise errors.BadOption("keepalive= is for zmq+tcp://", url=url)
    elif not url.hosts or url.path not in ("", "/") or any(host.port is None for host in url.hosts):
        raise errors.BadUrl(
            "it takes a host and its port, and no path", url=url, hint="for example zmq+tcp://127.0.0.1:5555"
        )


def _take(url: Url, undo: ExitStack) -> Steps[tuple[Url, str, socket.socket | None, Name | None]]:
    """The name, ours until `undo`: with the port that the system chose, in libzmq's words, and what is to be served."""
    sock: socket.socket | None = None
    name: Name | None = None
    address = "ipc:///ipckit"  # a word only: what is served is the socket that we hand over
    if url.scheme == "zmq+tcp":
        sock, url = yield from _inet.listen_steps(url)
        host, port, *_ = sock.getsockname()
        address = f"tcp://{Host(host, port)}"
    elif url.scheme == "zmq+ipc":
        sock, name = _unixsock.bind(url, path_for(url, ".zmq"))
        undo.callback(name.release)
    else:
        address = _inproc_address(url)
    if sock is not None:
        undo.callback(sock.close)
    return url, address, sock, name


# -- connecting -----------------------------------------------------------------------------------------------------


def _addresses(url: Url, what: str | None = None) -> Steps[list[str]]:
    """Where it may be, in libzmq's words; nothing while it is known to be nowhere."""
    from ._zmq_context import inproc, inproc_native

    if url.scheme == "zmq+inproc" and what is not None:
        address = f"{_inproc_address(url)}-{what}"
        return [address] if address in inproc_native else []
    if url.scheme == "zmq+inproc":
        return [_inproc_address(url)] if url.name in inproc else []
    if url.scheme == "zmq+ipc":
        path = path_for(url, ".zmq")
        return [f"ipc://{path}"] if path.exists() else []
    found = []
    for host in url.hosts:
        try:
            # Not left to libzmq, whose one thread would stand still for a slow name server.
            addresses = yield from _inet.resolve(url, host, socket.SOCK_STREAM, passive=False, operation="connect")
        except socket.gaierror:  # no answer now
            continue
        found += [f"tcp://{Host(address.sockaddr[0], address.sockaddr[1])}" for address in addresses]
    return found


def _attempt(url: Url, options: Options, address: str) -> Steps[ZmqLink | None]:
    """One connection, on a socket of its own that will never make another: the link, or None."""
    from ._zmq_hub import PEER, Hub
    from ._zmq_link import ZmqLink

    hub = Hub(url, options, dials=True)
    link = ZmqLink(hub, PEER, url, options, Peer())
    made = False
    try:
        with _short(url, address) as short:
            hub.dial(short, link)
            deadline = time.monotonic() + _ATTEMPT
            graced = False
            while True:
                wait = link.arm(Want.RECV)
                with hub.entered():
                    hub.drain()
                if hub.up and not graced:
                    graced, deadline = True, time.monotonic() + _GRACE
                left = deadline - time.monotonic()
                made = link.welcomed or (graced and left <= 0 and not link.ended)
                if made:
                    return link
                if link.ended or left <= 0:
                    return None
                yield Wait(wait.fds, left)
    except errors.Timeout:
        if not hub.up or link.ended:
            raise
        made = True
        return link
    finally:
        if not made:
            if not hub.up:  # otherwise the listener knows of us, and hears a goodbye
                hub.discard()
            link.close()


def _short(url: Url, address: str) -> AbstractContextManager[str]:
    """A path that is too long for the kernel has a short name for as long as its directory is open."""
    if url.scheme != "zmq+ipc":
        return nullcontext(address)
    return _short_path(url, Path(address.removeprefix("ipc://")))


@contextmanager
def _short_path(url: Url, path: Path) -> Iterator[str]:
    with _unixsock._address(url, path) as short:
        yield f"ipc://{short}"


def _inproc_address(url: Url) -> str:
    return f"inproc://ipckit-{url.name}"


# -- listening ------------------------------------------------------------------------------------------------------


class ZmqListener:
    """A hub that admits peers, and the name that it is known by."""

    def __init__(self, url: Url, options: Options, hub: Hub, name: Name | None) -> None:
        self.url = url
        self._options, self._hub, self._name = options, hub, name
        self._closed = False
        hub.attach(self)
        hub.admit = self._admit

    @property
    def native(self) -> Any:
        """The zmq.Socket, a ROUTER that all accepted links share. Look, do not send: it is not thread-safe, and we count."""
        return self._hub.socket

    def _admit(self, ident: bytes, greeting: bytes, peer: Peer) -> ZmqLink:
        from ._zmq_link import ZmqLink

        link = ZmqLink(self._hub, ident, self.url, self._options, peer)
        link.greeted(greeting)
        return link

    def try_accept(self) -> Link | None:
        if self._closed:
            raise errors.Closed("this listener is closed", url=self.url, operation="accept")
        with self._hub.entered():
            self._hub.drain()
            return self._hub.accepted()

    def arm(self, want: Want) -> Wait:
        with self._hub.entered():
            return self._hub.await_arrivals()

    def close(self) -> None:
        if self._closed or self._hub.foreign:
            return
        self._closed = True
        with self._hub.entered():
            if not self._hub.closed:
                self._hub.stop_listening()
                self._hub.detach(self)
        self._hub.finish()
        if self._name is not None:
            self._name.release()

    def abandon(self) -> None:
        """The hub's own hook has done it."""


# -- `native=on` ----------------------------------------------------------------------------------------------------


def _opened(url: Url, options: Options, listen: bool, make: Callable[[Url], N], what: str) -> Steps[N]:
    """A native socket that has its name, or its first connection."""
    _check(url)
    with ExitStack() as undo:
        if listen:
            url, address, sock, name = yield from _take(url, undo)
            endpoint = make(url)
            undo.callback(endpoint.close)
            endpoint.bind(f"{address}-{what}" if sock is None else address, sock, name)
        else:
            endpoint = make(url)
            undo.callback(endpoint.close)
            try:
                yield from _reach(url, endpoint, what)
            except errors.Timeout as timeout:
                raise errors.NothingListening("nobody listens there", url=url, operation="connect") from timeout
        undo.pop_all()
    return endpoint


def _reach(url: Url, endpoint: Native, what: str) -> Steps[None]:
    """Connect, and wait for the first time that somebody of the right kind is there; libzmq does so again by itself."""
    pause = 0.001
    while True:
        for address in (yield from _addresses(url, what)):
            with _short(url, address) as short:
                if (yield from endpoint.reach(short, _ATTEMPT)):
                    return
        yield Wait((), pause)
        pause = min(pause * 2, 0.05)


TRANSPORT = Zmq()
