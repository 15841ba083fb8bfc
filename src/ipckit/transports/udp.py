"""udp:// — datagrams, best effort: one message is one datagram, and any of them may be lost or overtaken.

    udp://127.0.0.1:5000              udp://0.0.0.0:0 listens on a port that the system chooses: see `listener.url`
    udp://239.255.1.2:5000            a multicast group: any number of publishers, one datagram for all subscribers
    udp://239.255.1.2:5000?interface=127.0.0.1     the same, inside this machine

Topics (`_udppublisher.py`, `_udpgroup.py`, `_udppeer.py`): every loss is counted, none is made good, nobody is waited for. In a
group that takes no server and no address but the group's; without one the publisher has the address, and sends each subscriber
its own. There are no queues: who is to do a job cannot be agreed on by datagrams that get lost.

Channels: every datagram begins with its kind and the session's 8 random bytes, which nobody off the way can guess:

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
import logging
import os
import select
import socket
import time
import weakref
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .. import _options, errors
from .._capabilities import Capabilities
from .._options import option
from .._spi import Intake, Link, Listener, Publishing, PublishTerms, Steps, Topics, TopicTerms, Transport, Wait, Want
from .._url import Url
from . import _inet, _udpsock
from ._oserror import GONE, map_oserror
from ._udplink import (
    ACCEPT,
    BYE,
    CHALLENGE,
    COOKIE,
    DATA,
    HEADER,
    HELLO,
    NO_SESSION,
    SESSION,
    UdpLink,
    live_links,
)
from ._udpsock import Cookies, Group, coming_from, is_group, spoken_to, tell_addresses

_log = logging.getLogger("ipckit")
_AT_A_TIME = 64  # datagrams that one try_accept looks at
#: A body with no topic and no headers. A channel's may have 37 bytes more.
MAX_TOPIC_MESSAGE = 65461


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(_options.LinkOptions):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicOptions(_options.LinkOptions):
    buffer: int = option(
        1 << 20, _options.size, "bytes that a subscriber may be behind, as far as net.core.rmem_max allows"
    )
    interface: str | None = option(
        None, _options.text, "group: the interface, by its name or IPv4 address; default: as the system routes"
    )
    ttl: int = option(1, _options.integer(0, 255), "group: how many networks a datagram may cross")
    loopback: bool = option(True, _options.flag, "group: whether subscribers on the publisher's own machine hear it")


_GROUP_ONLY = ("interface", "ttl", "loopback")


class UdpTransport(Transport[Options], Topics[TopicOptions]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "pubsub"}),
        ordered=False,
        reliable=False,
        max_message=MAX_TOPIC_MESSAGE,
        headers=True,
        native_topics=True,
        cross_machine=True,
        fileno=True,
        death="unreported",
        model="single datagrams, through the network",
        use_case="the newest value matters and the lost one does not: telemetry, discovery",
    )
    options: ClassVar[type[Any]] = Options
    topic_options: ClassVar[type[Any]] = TopicOptions

    def capabilities_of(self, url: Url) -> Capabilities:
        if is_group(url):
            return replace(self.capabilities, patterns=frozenset({"pubsub"}), fileno=False)
        return self.capabilities

    def publisher(self, url: Url, options: TopicOptions, terms: PublishTerms) -> Steps[Publishing]:
        from ._udppublisher import UdpPublisher, free_port

        if terms.on_full == "drop_old":
            raise errors.Unsupported(
                "what has left as a datagram cannot be taken back",
                url=url,
                operation="publisher",
                hint="on_full='drop_new'; the capability 'reliable' says where there is more",
            )
        address = (yield from _addresses(url, "publisher"))[0]
        if (group := _group(url, options, address)) is not None:
            return UdpPublisher(url, group.sender(options.buffer), group.place, options.limit, terms)
        sock = _udpsock.plain(address.family, options.buffer)
        patience = 200 if free_port(address.sockaddr[1]) else 0
        while True:
            try:
                _bind(sock, address.sockaddr)
                tell_addresses(sock)
                return UdpPublisher(url.with_port(sock.getsockname()[1]), sock, None, options.limit, terms)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not patience:
                    sock.close()
                    raise map_oserror(error, url, "publisher") from error
            patience -= 1
            try:
                yield Wait((), 0.005)  # for as long as the keeper sleeps on it, the old one has the port
            except BaseException:
                sock.close()
                raise

    def subscriber(self, url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Intake]:
        from . import _udpwire as wire
        from ._udpgroup import GroupSubscriber
        from ._udppeer import PeerSubscriber

        if terms.group is not None:
            raise errors.Unsupported(
                "subscribers of a group share messages, and cannot agree on that by datagrams that get lost",
                url=url,
                operation="subscriber",
                hint="the capability 'reliable' says where group= works: tcp, nats, redis ...",
            )
        if url.hosts and url.host.port == 0:
            raise errors.BadUrl("it takes the publisher's port", url=url, hint="see `publisher.url`")
        addresses = yield from _addresses(url, "subscriber")
        address = addresses[0]
        if (group := _group(url, options, address)) is not None:
            with ExitStack() as opened:
                data = opened.enter_context(group.receiver(options.buffer))
                control = opened.enter_context(group.receiver(0))
                _udpsock.hear_only(control, wire.KIND_AT, bytes((wire.NUMBER, wire.BYE)))
                own = opened.enter_context(_udpsock.plain(address.family, 0))
                own.bind(("", 0))
                subscribed = GroupSubscriber(url, data, control, own, options.limit, terms)
                opened.pop_all()
                return subscribed
        peers: list[PeerSubscriber] = []
        pause = 0.02
        try:
            for each in addresses:
                sock = _udpsock.plain(each.family, options.buffer)
                peers.append(PeerSubscriber(url, sock, options.limit, terms))
                peers[-1].reach(each.sockaddr)
            while True:
                for peer in peers:
                    if (yield from peer.greeted(pause)):
                        peers.remove(peer)
                        return peer
                pause = min(pause * 2, 0.5)
        except errors.Timeout as timeout:
            trouble = next((peer.trouble for peer in peers if peer.trouble is not None), None)
            why = f": {trouble.strerror}" if trouble is not None else ""
            raise errors.NothingListening(
                f"no publisher answers there{why}", url=url, operation="subscriber"
            ) from timeout
        finally:
            for peer in peers:
                peer.close()

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
        tried: dict[Any, _Hello] = {}
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
                        hello = tried.get(address.sockaddr)
                        if hello is None:
                            hello = tried[address.sockaddr] = _Hello(address)
                        answered = yield from hello.ask(pause)
                        if answered:
                            del tried[address.sockaddr]
                            return UdpLink(url, options.limit, hello.sock, hello.session)
                        last = hello.error
                if not tried:
                    yield Wait((), pause)
                pause = min(pause * 2, 0.5)
        except errors.Timeout as timeout:
            why = f": {last.strerror}" if last is not None and last.strerror else ""
            raise errors.NothingListening(f"nobody answers there{why}", url=url, operation="connect") from (
                last or timeout
            )
        except OSError as error:
            raise error if isinstance(error, errors.IpcError) else map_oserror(error, url, "connect") from error
        finally:
            for hello in tried.values():
                hello.give_up()


# -- topics -------------------------------------------------------------------------------------------------------


def _addresses(url: Url, operation: str) -> Steps[list[_inet.Address]]:
    try:
        return (
            yield from _inet.resolve(
                url, _inet.only_host(url), socket.SOCK_DGRAM, passive=operation == "publisher", operation=operation
            )
        )
    except OSError as error:
        raise error if isinstance(error, errors.IpcError) else map_oserror(error, url, operation) from error


def _group(url: Url, options: TopicOptions, address: _inet.Address) -> Group | None:
    if is_group(url):
        if url.host.port == 0:
            raise errors.BadUrl(
                "a group needs a port that all know", url=url, hint="for example udp://239.255.1.2:5000"
            )
        return Group(url, address, options.interface, options.ttl, options.loopback)
    for name, _ in url.options:
        if name in _GROUP_ONLY:
            raise errors.BadOption(f"{name}= is for multicast groups", url=url, hint="224.0.0.0/4 or ff00::/8")
    return None


# -- connecting ---------------------------------------------------------------------------------------------------


class _Hello:
    """Saying HELLO to one address. Session and socket stay the same: the listener may have accepted them already."""

    def __init__(self, address: _inet.Address) -> None:
        self.address = address
        self.session = os.urandom(SESSION)
        self.cookie = bytes(COOKIE)
        self.error: OSError | None = None
        while True:
            self.sock = socket.socket(address.family, socket.SOCK_DGRAM)
            try:
                self.sock.setblocking(False)
                self.sock.connect(address.sockaddr)
                if self.sock.getsockname() != self.sock.getpeername():
                    return
            except BaseException:
                self.sock.close()
                raise
            self.sock.close()  # our own port, of all: we would be talking to ourselves

    def ask(self, patience: float) -> Steps[bool]:
        """Once, and wait for the answer. `error` is what the address's machine said, if it did."""
        deadline = time.monotonic() + patience
        self.error = None
        try:
            self.sock.send(HELLO + self.session + self.cookie)
            while (left := deadline - time.monotonic()) > 0:
                try:
                    answered = self._answered()
                except BlockingIOError:
                    yield Wait(((self.sock.fileno(), select.POLLIN),), left)
                    continue
                if answered:
                    return True
        except BlockingIOError:
            pass
        except OSError as error:
            if isinstance(error, errors.IpcError) or error.errno not in GONE:
                raise
            self.error = error
            yield Wait((), patience)
        return False

    def _answered(self) -> bool:
        answer = self.sock.recv(HEADER + COOKIE, socket.MSG_PEEK)
        ours = answer[1:HEADER] == self.session
        if ours and answer[:1] == DATA:  # the ACCEPT was lost, but here is what came after it: left for try_recv
            return True
        self.sock.recv(1)
        if ours and answer[:1] == CHALLENGE and len(answer) == HEADER + COOKIE and answer[HEADER:] != self.cookie:
            self.cookie = answer[HEADER:]
            self.sock.send(HELLO + self.session + self.cookie)
        return ours and answer[:1] == ACCEPT

    def give_up(self) -> None:
        if any(self.cookie):  # it may have been accepted
            with suppress(OSError):
                self.sock.send(BYE + self.session)
        self.sock.close()


# -- listening ----------------------------------------------------------------------------------------------------

_listeners: weakref.WeakSet[UdpListener] = weakref.WeakSet()


def _bind(sock: socket.socket, sockaddr: Any) -> None:
    """Alone on the port, but for sessions of ours that outlived their listener.

    SO_REUSEPORT lets the sessions in later; set before bind(), it would let a second listener in as well.
    """
    try:
        sock.bind(sockaddr)
    except OSError as error:
        port = sockaddr[1]
        mine = any(link.port == port for link in live_links) and all(each.url.host.port != port for each in _listeners)
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
        self._cookies = Cookies(COOKIE)
        self._accepted: weakref.WeakValueDictionary[Any, UdpLink] = weakref.WeakValueDictionary()
        self._wait = Wait(((sock.fileno(), select.POLLIN),))
        sock.setblocking(False)
        tell_addresses(sock)
        _listeners.add(self)

    @property
    def native(self) -> socket.socket:
        return self._sock

    def try_accept(self) -> Link | None:
        for _ in range(_AT_A_TIME):
            try:
                datagram, ancillary, _, address = self._sock.recvmsg(HEADER + COOKIE, 128)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in GONE:  # an ICMP answer to something that we sent
                    continue
                raise map_oserror(error, self.url, "accept") from error
            try:
                link = self._answer(datagram, address, spoken_to(ancillary))
            except OSError as error:
                _log.warning("%s: cannot answer %s: %s", self.url, _inet.shown(address), error)
                continue
            if link is not None:
                return link
        return None

    def _answer(self, datagram: bytes, address: Any, here: str | None) -> UdpLink | None:
        kind, session = datagram[:1], datagram[1:HEADER]
        known = self._accepted.get(address)
        if len(datagram) < HEADER:
            return None
        if kind == DATA:
            self._reply(NO_SESSION + session, address, here)
        elif kind == HELLO and len(datagram) == HEADER + COOKIE:
            if known is not None and not known.closed:  # sent twice, before its session's socket was there to take it
                if known.session == session:
                    known.accept()
                return None
            if self._cookies.good(datagram[HEADER:], address, session):
                return self._begin(session, address, here)
            self._reply(CHALLENGE + session + self._cookies.make(address, session), address, here)
        return None

    def _begin(self, session: bytes, address: Any, here: str | None) -> UdpLink:
        sock = socket.socket(self._sock.family, socket.SOCK_DGRAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound = self._sock.getsockname()
            sock.bind((here or bound[0], *bound[1:]))
            sock.connect(address)
            _forget_strangers(sock)
            link = UdpLink(self.url, self._options.limit, sock, session)
            link.accept()
        except BaseException:
            sock.close()
            raise
        self._accepted[address] = link
        return link

    def _reply(self, datagram: bytes, address: Any, here: str | None) -> None:
        self._sock.sendmsg([datagram], coming_from(here, self._sock.family), 0, address)

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


TRANSPORT = UdpTransport()
