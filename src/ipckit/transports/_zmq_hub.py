"""One zmq socket, everything that arrives at it, and everybody who sleeps on it.

A `Hub` owns a ROUTER: a listener's, with a link for each peer, or a connecting side's, with one. A ROUTER hears any number of
pipes, so two more end here besides the peers: the socket's own monitor (connections lost) and a *waker*. One blocking call
in libzmq therefore hears data, deaths and our own threads, and costs what the bare library's call costs.

A zmq socket is not thread-safe: `lock` is around every call on it. Its descriptor is edge-triggered, and any call may eat the
edge: whoever looked for data either emptied the socket (`drain`), or looks again before it sleeps. That is enough for a
single sleeper. As soon as there are two (two links, or a link and a listener that waits) a thread does the looking
for all of them and rings their bells; it costs a message one more hop, 10 to 20 µs, and stays until the hub closes.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import zmq

from .. import errors
from .._spi import Peer, Wait
from . import _zmq_linger
from ._zmq_context import NEVER, Sleeper, configure, context, hubs, inproc, map_zmq, turn_away, who_sent

if TYPE_CHECKING:
    from .._url import Url
    from ._zmq_link import ZmqLink
    from .zmq import Options

log = logging.getLogger("ipckit.zmq")

# Names of the pipes that we connect ourselves. Nobody can guess those of the last two, see `_route`.
PEER = b"peer"
_MONITOR = b"monitor " + os.urandom(8)
_WAKER = b"waker " + os.urandom(8)

# Plain ints: an enum member costs its conversion in every call.
_MORE, _NOW, _EVENTS, _POLLIN = int(zmq.SNDMORE), int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN)
# Both parts of a message in one call of C, so that no signal handler (Ctrl-C) can run between them and tear it apart.
DATA = (_MORE, 0)
_CONTROL = (_MORE, _MORE, 0)
_BLOCK, _TRY, _COPY = (0, _NOW), (_NOW, _NOW), (True, False)

_BEGAN = zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED
_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED  # closed: it was never connected
_WATCHED = _BEGAN | _ENDED | zmq.EVENT_HANDSHAKE_SUCCEEDED
_EVENT = struct.Struct("=HI")


_numbers = itertools.count(1)
_PORT = 0.5  # seconds that libzmq's thread has to close a port; it takes a fraction of a millisecond

#: A control message has two parts, of which the first is empty; a frame has one part.
HELLO, WELCOME, ACK, BYE, REFUSED = b"H", b"W", b"A", b"B", b"R"
VERSION = 1
#: version, then what the writer takes unacknowledged (frames, bytes), frames that it sends unacknowledged, its limit
GREETING = struct.Struct(">BIQIQ")


# -- the hub --------------------------------------------------------------------------------------------------------


class Hub:
    """See the module. Methods that say so are called with `lock` held; take it by `with hub.entered():`."""

    def __init__(self, url: Url, options: Options, *, dials: bool) -> None:
        self.url = url
        self.options = options
        self.dials = dials
        self.lock = threading.Lock()
        self.links: dict[bytes, ZmqLink] = {}  # whose peer has not left
        self.arrivals: deque[ZmqLink] = deque()  # greeted, not accepted yet
        self.admit: Callable[[bytes, bytes, Peer], ZmqLink] | None = None  # set while somebody listens
        self.listener = Sleeper()
        self.direct: ZmqLink | None = None  # the link that may block inside the socket: nobody else sleeps on it
        self.threaded = False
        self.watched = False  # somebody sleeps on the descriptor
        self.trusting = True  # all that arrives is one peer's, who can confuse nobody but itself
        self.up = False  # dialling: connected
        self.closed = False
        self.foreign = False  # we are in a forked child
        self._waits = False  # the listener does
        self._shared = False  # two threads have met here: no more blocking inside the socket
        self._woken = False
        self._timeout: float | None = None
        self._users: set[object] = set()
        self._by_fd: dict[int, ZmqLink] = {}
        self._greeted: list[ZmqLink] = []  # by them, and not yet answered
        self._lost: list[ZmqLink] = []  # their connection ended; what it brought has not all been read
        self._connected: set[int] = set()
        self._talking: set[int] = set()  # of these, those whose peer has not said goodbye
        self._descriptors: set[int] = set()  # libzmq's, for a forked child to close
        self._address = ""  # that we serve
        self._listening = -1  # libzmq's descriptor of it
        self._thread: threading.Thread | None = None
        self._stop = -1
        self._waker_lock = threading.Lock()
        try:
            self.socket = context().socket(zmq.ROUTER)
            try:
                self._waker = context().socket(zmq.PAIR)
                try:
                    self._configure()
                except BaseException:
                    self._drop()
                    raise
            except BaseException:
                self.socket.close()
                raise
        except zmq.ZMQError as error:
            raise map_zmq(error, url, "open") from error
        self._recv: Any = self.socket.recv
        self.send = super(zmq.Socket, self.socket).send  # without the sugar: options that a ROUTER does not have
        self._get: Any = self.socket.get
        self._poll_fd = select.poll()
        self._poll_fd.register(self.fd, select.POLLIN)
        hubs.add(self)

    def _configure(self) -> None:
        socket = self.socket
        configure(socket, self.url, self.options)
        self.fd = int(socket.getsockopt(zmq.FD))
        number = next(_numbers)
        if self.url.scheme != "zmq+inproc":
            socket.monitor(f"inproc://ipckit-monitor-{number}", _WATCHED)
            socket.setsockopt(zmq.CONNECT_ROUTING_ID, _MONITOR)
            socket.connect(f"inproc://ipckit-monitor-{number}")
        self._waker.setsockopt(zmq.LINGER, 0)
        self._waker.bind(f"inproc://ipckit-waker-{number}")
        socket.setsockopt(zmq.CONNECT_ROUTING_ID, _WAKER)
        socket.connect(f"inproc://ipckit-waker-{number}")

    def bind(self, address: str, listening: socket.socket | None) -> None:
        """Serve the connections of `listening`, a descriptor that is given away; None: `address` says it all."""
        if listening is not None:
            self._listening = listening.detach()
            self._descriptors.add(self._listening)
            self.socket.setsockopt(zmq.USE_FD, self._listening)
        # A listener keeps the options that it was bound with. So a stranger who ignores our window meets this bound, while the
        # monitor, which would stop the I/O thread of the whole process when its pipe is full, stays unbounded.
        self.socket.setsockopt(zmq.RCVHWM, self.options.rcvhwm * 2 + 64)
        self._address = address
        self.socket.setsockopt(zmq.IPV6, "[" in address)
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            raise map_zmq(error, self.url, "listen") from error
        finally:
            self.socket.setsockopt(zmq.RCVHWM, 0)
        if listening is None:
            inproc[self.url.name] = self

    def dial(self, address: str, link: ZmqLink) -> None:
        self.attach(link)
        self.socket.setsockopt(zmq.IPV6, "[" in address)
        try:
            self.socket.setsockopt(zmq.CONNECT_ROUTING_ID, PEER)
            self.socket.connect(address)
        except zmq.ZMQError as error:
            raise map_zmq(error, self.url, "connect") from error
        self.socket.setsockopt(zmq.RCVHWM, self.options.rcvhwm * 2 + 64)
        self.links[PEER] = link
        link.accepted = True
        self.post(PEER, HELLO, link.greeting())
        self.up = self.url.scheme == "zmq+inproc"  # has no monitor, and is there at once
        self._recount()

    # who is here

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Hold the lock. A thread that blocks inside the socket with it is woken, and does not do so again."""
        self.lock.acquire(False) or self.enter()
        try:
            yield
        finally:
            self.lock.release()

    def enter(self) -> bool:
        """After a failed `lock.acquire(False)`: take it from somebody who has it, if need be out of the socket."""
        if not self.threaded:
            self._shared, self.direct = True, None
            self._wake()
        return self.lock.acquire()

    def _wake(self) -> None:
        with self._waker_lock:
            if not self._woken and not self._waker.closed:
                self._woken = True
                self._waker.send(b"", _NOW)

    def attach(self, user: object) -> None:
        """The socket stays open until each of them is detached."""
        self._users.add(user)

    def detach(self, user: object) -> None:
        """Lock held. The last one to leave closes the socket; release the lock, then call `finish`."""
        self._users.discard(user)
        if not self._users and not self.closed:
            self._close()

    def finish(self) -> None:
        """After `detach`, without the lock: the thread ends with its hub."""
        thread = self._thread
        if self.closed and thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None

    def forget(self, link: ZmqLink) -> None:
        """Lock held. Its peer has left, or we have: what still comes from it is nobody's."""
        if self.links.get(link.ident) is link:
            del self.links[link.ident]
        if self._by_fd.get(link.fd) is link:
            del self._by_fd[link.fd]
        self._recount()

    def _recount(self) -> None:
        awake = [link for link in self.links.values() if link.accepted]
        if len(awake) + self._waits > 1 and not self.threaded and not self.closed:
            self.threaded = self.watched = True
            self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._look_for_all, name="ipckit-zmq", daemon=True)
            self._thread.start()
        alone = len(awake) == 1 and not (self._waits or self.threaded or self._shared)
        self.direct = awake[0] if alone else None

    def _look_for_all(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self.fd, select.POLLIN)
        while True:
            poll.poll()
            with self.lock:
                if self.closed:
                    os.close(self._stop)
                    return
                self.drain()

    # sleeping

    def await_arrivals(self) -> Wait:
        """Lock held. From now on the listener's sleeper is told when something came; try once more after this."""
        if not self._waits:
            self._waits = True
            self._recount()
        return Wait(self.listener.announce(self))

    def accepted(self) -> ZmqLink | None:
        """Lock held. The next arrival; others who wait for one are told to look and to announce themselves again."""
        if not self.arrivals:
            return None
        link = self.arrivals.popleft()
        link.accepted = True
        self._waits = False
        self.listener.ring()
        self._recount()
        return link

    # what arrives

    def block(self, link: ZmqLink, timeout: float | None) -> bytes | None:
        """Lock held: wait inside the socket, as long as `link` is alone here. None: go on in another way."""
        if timeout != self._timeout:
            limit = -1 if timeout is None else min(int(timeout * 1000 + 0.999), NEVER)
            self.socket.setsockopt(zmq.RCVTIMEO, limit)
            self._timeout = timeout
        if link.data.announced:  # once, at another time
            link.data.announced = False
            self._rewatch()
        ident, recv = link.ident, self._recv
        data: bytes
        try:
            while self.direct is link and not link.inbox:
                if self.trusting:
                    who, data = map(recv, _BLOCK)
                    if who == ident and data:
                        return data
                    self._route(who, data, None)
                else:
                    who, frame = map(recv, _BLOCK, _COPY)
                    data = frame.bytes
                    if who == ident and data and not frame.more:
                        return data
                    self._route(who, data, frame.more)
                if self._greeted or self._lost:
                    self.drain()
        except zmq.Again:
            pass
        return None

    def drain(self, link: ZmqLink | None = None) -> None:
        """Lock held. Read what is there, all of it; or, for the only sleeper, until it has something."""
        get, recv = self._get, self._recv
        while get(_EVENTS) & _POLLIN:
            if self.trusting:
                try:
                    who, data = map(recv, _TRY)
                except zmq.Again:  # a surplus part, and nothing after it
                    continue
                self._route(who, data, None)
            else:
                who, frame = map(recv, _TRY, _COPY)
                self._route(who, frame.bytes, frame.more)
            if link is not None and link.inbox and self.direct is link:
                return
        if self._greeted or self._lost:
            self._settle()

    def changed(self) -> bool:
        """Whether there may be news, for the price of a poll."""
        return bool(self._poll_fd.poll(0))

    def recheck(self) -> None:
        """Lock held, after a send, which may have eaten the edge that somebody sleeps for."""
        if self._get(_EVENTS) & _POLLIN:
            self.drain()
        self._rewatch()

    def _rewatch(self) -> None:
        sleepers = [self.listener]
        for link in self.links.values():
            sleepers += (link.data, link.room)
        self.watched = self.threaded or any(sleeper.announced for sleeper in sleepers)

    def _route(self, who: bytes, data: bytes, more: bool | None) -> None:
        """The first two parts of a message: whom from, and a frame; or an empty part, and something follows.

        `more`: whether something follows. Asking costs 3 µs, so where all that arrives is one peer's it is not asked
        (None) unless the part is empty. If that peer does send more, then the surplus is read next, in the place of a name.
        """
        link = self.links.get(who)
        if link is not None and data and not more:
            link.deliver(data)
            return
        rest = self._rest(bool(self._get(zmq.RCVMORE)) if more is None else more)
        if more is None and data and rest and link is None and who not in (_MONITOR, _WAKER):
            who, data, link = data, rest[0].bytes, self.links.get(data)  # it was surplus
            del rest[0]
        if who == _WAKER:
            self._woken = False
        elif who == _MONITOR:
            self._heard(*_EVENT.unpack(data))
        elif not data and len(rest) == 1:
            self._control(who, rest[0])
        elif link is None:
            log.debug("%s: dropped a message from a stranger", self.url)
        elif rest:
            self._refuse(link, f"a message of {1 + len(rest)} parts")
        else:
            link.deliver(data)

    def _rest(self, more: bool) -> list[Any]:
        parts: list[Any] = []
        try:
            while more:
                parts.append(self._recv(_NOW, False))
                more = parts[-1].more
        except BaseException:  # Ctrl-C: whatever else, parts that belong together stay together
            while self._get(zmq.RCVMORE):
                self._recv(_NOW)
            raise
        return parts

    def _heard(self, event: int, fd: int) -> None:
        if event & _BEGAN:
            self._descriptors.add(fd)
            self._connected.add(fd)
            self._talking.add(fd)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.up = True
        elif event & _ENDED:
            self._descriptors.discard(fd)
            self._connected.discard(fd)
            self._talking.discard(fd)
            if fd == self._listening:
                self._listening = -1
            elif self.dials:
                self._lost.extend(self.links.values())
            elif fd in self._by_fd:
                self._lost.append(self._by_fd.pop(fd))
        self.trusting = self.dials or len(self._connected) < 2

    def _control(self, who: bytes, part: Any) -> None:
        body = part.bytes
        kind, body = body[:1], body[1:]
        link = self.links.get(who)
        if kind == BYE:
            self._talking.discard(who_sent(part)[1])
        if kind == HELLO and link is None and not self.dials:
            self._hello(who, part, body)
        elif link is None:
            log.debug("%s: %r from a stranger", self.url, kind)
        elif not link.control(kind, body):
            self._refuse(link, f"an unexpected control message {kind!r}")
        elif kind == WELCOME:
            link.peer, link.fd = who_sent(part)

    def _hello(self, who: bytes, part: Any, body: bytes) -> None:
        if self.admit is None:
            self.post(who, REFUSED, b"nobody listens here any more")
            return
        if len(body) != GREETING.size or body[0] != VERSION:
            self.post(who, REFUSED, b"a greeting of another version")
            return
        peer, fd = who_sent(part)
        link = self.links[who] = self.admit(who, body, peer)
        link.fd = fd
        self._greeted.append(link)

    def _settle(self) -> None:
        """Everything that was there has been read, so what the monitor told is not older than what the peers told.

        Until then, a connection's end may still be unread that had the number of the one which greets us now.
        """
        while self._greeted:
            link = self._greeted.pop(0)
            self.attach(link)
            self.arrivals.append(link)
            if not self.post(link.ident, WELCOME, link.greeting()) or (link.fd >= 0 and link.fd not in self._connected):
                self._lost.append(link)  # come and gone
            elif link.fd >= 0:
                if link.fd in self._by_fd:
                    self._lost.append(self._by_fd[link.fd])
                self._by_fd[link.fd] = link
            self.listener.ring()
            self._recount()
        while self._lost:
            self._lost.pop().lose()

    def _refuse(self, link: ZmqLink, why: str) -> None:
        link.end(errors.ProtocolError, why)
        self.post(link.ident, REFUSED, why.encode())

    # what leaves

    def post(self, who: bytes, kind: bytes, body: bytes = b"") -> bool:
        """Lock held. A control message; False: the peer is gone."""
        try:
            any(map(self.send, (who, b"", kind + body), _CONTROL))
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return False
            raise map_zmq(error, self.url, "send") from error
        return True

    # the end

    def stop_listening(self) -> None:
        """Lock held. Peers that nobody has accepted are told so; links that were live on, and those who come are refused."""
        self._waits = False
        self.drain()
        self.admit = None
        if self.url.scheme == "zmq+inproc":
            del inproc[self.url.name]
            self.socket.unbind(self._address)
        elif self.url.scheme == "zmq+tcp" and self._listening >= 0:
            turn_away(self._listening)
        for link in self.arrivals:
            self.post(link.ident, BYE)
            self.forget(link)
            self._users.discard(link)
        self.arrivals.clear()
        self.listener.close()
        self._recount()

    def _close(self) -> None:
        """Lock held. What was sent still goes out, in libzmq's thread, for `linger` seconds."""
        kept: list[_zmq_linger.Kept] = []
        listening = None
        if self.url.scheme == "zmq+tcp":
            self.drain()
            if self._listening >= 0:
                listening = _zmq_linger.Number(self._listening)
            if self.options.linger > 0:
                kept = _zmq_linger.keep(self._talking, self.options.linger)
        self.closed, self.direct = True, None
        hubs.discard(self)
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)
        if self.dials and not self.links:  # the peer has left: there is nobody to wait for
            self.socket.setsockopt(zmq.LINGER, 0)
        self._drop()
        _zmq_linger.lingering.add(kept)
        if listening is not None:
            listening.wait(_PORT)

    def _drop(self) -> None:
        # First of all: libzmq's thread blocks for ever in an event that nobody reads, and our end of the monitor closes here.
        self.socket.monitor(None, 0)
        with self._waker_lock:
            self._waker.close()
        self.socket.close()

    def discard(self) -> None:
        """Give up a connection that was never made."""
        with self.entered():
            if not self.closed:
                self.links.clear()
                self._close()

    def quit(self) -> bool:
        """At exit, whoever else still holds it. True when the socket is closed."""
        if not self.lock.acquire(False):
            self._wake()
            if not self.lock.acquire(timeout=1):
                return False
        try:
            if not self.closed:
                self.drain()
                self._close()
            return True
        finally:
            self.lock.release()

    def abandon(self) -> None:
        """In a forked child: let go of the connections, or the peers would not hear of the parent's death."""
        self.foreign, self.direct = True, None
        self.lock = threading.Lock()  # somebody may have been inside
        for link in self.links.values():
            link.abandon()
        for fd in self._descriptors:
            with suppress(OSError):
                os.close(fd)
        self._descriptors.clear()
