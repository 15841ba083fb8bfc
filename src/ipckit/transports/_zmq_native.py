"""`?native=on`: a queue that is a PUSH and a PULL, topics that are an XPUB and a SUB. docs/wire/zmq.md has what travels.

Any ZeroMQ program can be at the other end, and a message costs what it costs there. What libzmq does not promise is not
promised: what a dead or broken connection held is gone, nobody acknowledges, messages have no id and no headers. A sender or
publisher is held where a peer's queue is full (`sndhwm`, `rcvhwm`); nothing is dropped for that.
"""

from __future__ import annotations

import itertools
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from .. import errors
from .._spi import PublishTerms, Steps, TopicTerms, Wait, Want
from .._url import Url
from ..message import Parcel, Verdict, matches
from . import _zmq_linger
from ._zmq_context import configure_native, context, inproc_native, map_zmq, natives

if TYPE_CHECKING:
    import socket

    from ._unixsock import Name
    from .zmq import Options

_NOW, _EVENTS, _POLLIN, _POLLOUT = int(zmq.NOBLOCK), int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
_PORT = 0.5  # seconds that libzmq's thread has to close a port; it takes a fraction of a millisecond

#: Between a topic and the value; no topic contains it.
END_OF_TOPIC = b"\0"
#: What our subscribers subscribe to besides, so that they are counted. No topic begins with it.
PRESENT = b"\x01ipckit"
_TOPIC = 200  # bytes of one, at most; each is one character in ASCII, up to four in UTF-8
_GLANCE = 64  # messages after which a publisher hears who has come and gone


class Native:
    """One zmq socket, its name or its connection, and its end. The socket is used with `lock` held."""

    def __init__(self, url: Url, options: Options, kind: int) -> None:
        self.url = url
        self._options = options
        self._limit = options.limit
        self._name: Name | None = None
        self._listening: _zmq_linger.Number | None = None
        self._lock = threading.Lock()
        self._closed = self._foreign = False
        self._address = ""  # of zmq+inproc://, that we serve
        self._count = self._bytes = 0
        try:
            self.socket = context().socket(kind)
        except zmq.ZMQError as error:
            raise map_zmq(error, url, "open") from error
        configure_native(self.socket, url, options, options.limit + 4 * _TOPIC + 1)
        self._fd = int(self.socket.getsockopt(zmq.FD))
        self._send_frame = super(zmq.Socket, self.socket).send  # without the sugar: options that we do not use
        natives.add(self)

    @property
    def native(self) -> Any:
        """The zmq.Socket. It is not thread-safe: use it while nobody uses this endpoint."""
        return self.socket

    def bind(self, address: str, listening: socket.socket | None, name: Name | None) -> None:
        self._name = name
        self.socket.setsockopt(zmq.IPV6, "[" in address)
        if listening is not None:
            self._listening = _zmq_linger.Number(listening.fileno())
            self.socket.setsockopt(zmq.USE_FD, listening.detach())
        try:
            self.socket.bind(address)
        except zmq.ZMQError as error:
            raise map_zmq(error, self.url, "listen") from error

        if listening is None and self._listening is None:
            inproc_native.add(address)
            self._address = address

    def reach(self, address: str, seconds: float) -> Steps[bool]:
        """Connect. Whether somebody of the right kind answered; if not, the address is given up."""
        socket = self.socket
        socket.setsockopt(zmq.IPV6, "[" in address)
        local = address.startswith("inproc:")
        monitor = None if local else socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            socket.connect(address)
            self.connected()
            if monitor is None:
                return True
            fd, deadline = int(monitor.getsockopt(zmq.FD)), time.monotonic() + seconds
            while not int(monitor.getsockopt(_EVENTS)) & _POLLIN:
                left = deadline - time.monotonic()
                if left <= 0:
                    socket.disconnect(address)
                    return False
                yield Wait(((fd, select.POLLIN),), left)
            return True
        except zmq.ZMQError as error:
            raise map_zmq(error, self.url, "connect") from error
        finally:
            if monitor is not None:
                socket.disable_monitor()
                monitor.close(linger=0)

    def connected(self) -> None:
        """The connection was begun."""

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check("arm")
            return Wait(
                ((self._fd, select.POLLIN),)
            )  # edge-triggered: whoever is told tries once more, which rearms it

    def try_flush(self) -> bool:
        """Always: libzmq's thread sends what it was given, whether we help or not."""
        return True

    def close(self) -> None:
        if self._foreign:
            return
        self._closed = True
        with self._lock:
            if self.socket.closed:
                return
            if (
                self._address in inproc_native
            ):  # at once: left to `close`, libzmq's reaper gives the name up in its own time
                inproc_native.discard(self._address)
                self.socket.unbind(self._address)
            self.socket.close()
        if self._listening is not None:
            self._listening.wait(_PORT)
        if self._name is not None:
            self._name.release()

    def quit(self) -> bool:
        """At exit. True when the socket is closed."""
        self._closed = True
        if not self._lock.acquire(timeout=1):
            return False
        self.socket.close()
        self._lock.release()
        return True

    def abandon(self) -> None:
        """In a forked child. The connections are in libzmq's hands, whose thread is not here: they stay the parent's."""
        self._foreign = self._closed = True
        self._lock = threading.Lock()  # somebody may have been inside

    def _check(self, operation: str) -> None:
        if self._foreign:
            raise errors.ForkedError(
                "opened before a fork, used in the child",
                url=self.url,
                operation=operation,
                hint="open the endpoint in the process that uses it",
            )
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self.url, operation=operation)


class _Giving(Native):
    """What sends: an outlet, and `Batching`."""

    def try_put(self, parcel: Parcel) -> bool:
        raise NotImplementedError

    def frame_of(self, parcel: Parcel) -> bytes:
        raise NotImplementedError

    def try_put_many(self, parcels: Sequence[Parcel]) -> int:
        """Without a pause between them libzmq's thread does not fall asleep, and need not be woken for each."""
        frames = [self.frame_of(parcel) for parcel in parcels]
        done = 0
        with self._lock:
            self._check("send")
            send = self._send_frame
            try:
                for frame in frames:
                    if len(frame) > self._limit:
                        break  # `try_put` says what is wrong with it
                    send(frame, _NOW)
                    done += 1
            except zmq.Again:
                pass
            except zmq.ZMQError as error:
                raise map_zmq(error, self.url, "send") from error
            finally:
                self._count += done
                self._bytes += sum(len(parcel.body) for parcel in parcels[:done])
        return done

    def _send(self, body: bytes, frame: bytes, operation: str) -> bool:
        if len(body) > self._limit:
            raise errors.MessageTooLarge(
                f"{len(body)} bytes are above the limit of {self._limit}",
                url=self.url,
                operation=operation,
                hint="raise limit= at both ends",
            )
        with self._lock:
            self._check(operation)
            try:
                self._send_frame(frame, _NOW)
            except zmq.Again:
                return False
            except zmq.ZMQError as error:
                raise map_zmq(error, self.url, operation) from error
            self._count += 1
            self._bytes += len(body)
            return True

    def _refuse_names(self, parcel: Parcel, operation: str) -> None:
        if parcel.headers:
            what = "headers"
        elif parcel.priority:
            what = "priorities"
        else:
            return
        raise errors.Unsupported(
            f"a bare ZeroMQ message has no {what}", url=self.url, operation=operation, hint="native=off"
        )


class Push(_Giving):
    """`Outlet`: the sending side of a queue."""

    def __init__(self, url: Url, options: Options) -> None:
        super().__init__(url, options, zmq.PUSH)
        self.socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is put in the queue of a peer that is not there

    def frame_of(self, parcel: Parcel) -> bytes:
        self._refuse_names(parcel, "send")
        return parcel.body

    def try_put(self, parcel: Parcel) -> bool:
        return self._send(parcel.body, self.frame_of(parcel), "send")

    def counters(self) -> Mapping[str, int]:
        return {"sent": self._count, "bytes_sent": self._bytes}


class Publish(_Giving):
    """`Publishing`. XPUB_NODROP: libzmq says when a subscriber's queue is full, in place of dropping."""

    def __init__(self, url: Url, options: Options, terms: PublishTerms) -> None:
        super().__init__(url, options, zmq.XPUB)
        self._fails = terms.on_full == "error"
        self._subscribers = self._since_glance = 0
        self.socket.setsockopt(zmq.XPUB_NODROP, 1)
        self.socket.setsockopt(zmq.XPUB_VERBOSER, 1)

    def frame_of(self, parcel: Parcel) -> bytes:
        self._refuse_names(parcel, "publish")
        return b"%b\0%b" % (parcel.topic.encode(), parcel.body)

    def try_put(self, parcel: Parcel) -> bool:
        frame = self.frame_of(parcel)
        self._since_glance += 1
        if self._since_glance >= _GLANCE:
            with self._lock:
                self._listen()
        if self._send(parcel.body, frame, "publish"):
            return True
        if self._fails:
            raise errors.QueueFull("a subscriber does not keep up", url=self.url, operation="publish")
        return False

    def subscribers(self) -> int:
        """Ours only: a stock SUB does not say how many of its subscriptions are one subscriber."""
        with self._lock:
            self._listen()
            return self._subscribers

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            if not self._closed:
                self._listen()
            here = self._subscribers
        return {"sent": self._count, "bytes_sent": self._bytes, "dropped": 0, "subscribers": here}

    def _listen(self) -> None:
        """Lock held. Subscriptions that came and went; what else a stranger says is not looked at."""
        self._check("publish")
        self._since_glance = 0
        while int(self.socket.getsockopt(_EVENTS)) & _POLLIN:
            said = self.socket.recv(_NOW)
            if said[1:] == PRESENT and said[0] < 2:
                self._subscribers += 1 if said[0] else -1


class _Taking(Native):
    """What receives: an intake."""

    def __init__(self, url: Url, options: Options, kind: int) -> None:
        super().__init__(url, options, kind)
        self._malformed = 0

    def understand(self, frame: bytes) -> Parcel | None:
        """Lock held. The message; None: not for us."""
        raise NotImplementedError

    def try_get(self) -> Parcel | None:
        with self._lock:
            self._check("recv")
            try:
                while True:
                    parcel = self.understand(self.socket.recv(_NOW))
                    if parcel is not None:
                        return parcel
            except zmq.Again:
                return None
            except zmq.ZMQError as error:
                raise map_zmq(error, self.url, "recv") from error

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        if verdict is Verdict.NACK:
            raise errors.Unsupported(
                "nothing is handed out again here", url=self.url, operation="nack", hint="native=off has redelivery"
            )
        return True

    def counters(self) -> Mapping[str, int]:
        return {
            "received": self._count,
            "bytes_received": self._bytes,
            "dropped": 0,
            "malformed": self._malformed,
        }


class Pull(_Taking):
    """`Intake`: the receiving side of a queue. Each part of a message is a message."""

    def __init__(self, url: Url, options: Options) -> None:
        super().__init__(url, options, zmq.PULL)

    def understand(self, frame: bytes) -> Parcel | None:
        if self._closed:
            return None
        if len(frame) > self._limit:
            self._malformed += 1
            return None
        self._count += 1
        self._bytes += len(frame)
        return Parcel(frame)


class Subscribe(_Taking):
    """`Intake`: a subscriber. libzmq sorts out by the beginning of a topic, and we do the rest."""

    def __init__(self, url: Url, options: Options, terms: TopicTerms) -> None:
        super().__init__(url, options, zmq.SUB)
        self._prefixes = sorted({prefix_of(pattern) for pattern in terms.topics})
        self._covered = _cover(terms.topics)

    def connected(self) -> None:
        """After the connection was begun: subscriptions travel in this order, and who is counted has all of his."""
        for prefix in (*self._prefixes, PRESENT):
            self.socket.setsockopt(zmq.SUBSCRIBE, prefix)

    def understand(self, frame: bytes) -> Parcel | None:
        if self._closed:
            return None
        name, end, body = frame.partition(END_OF_TOPIC)
        try:
            topic = name.decode()
        except UnicodeDecodeError:
            end = b""
        if not end or len(body) > self._limit or len(name) > 4 * _TOPIC:
            self._malformed += 1
            return None
        if self._covered is not None and not self._covered(topic):
            return None
        self._count += 1
        self._bytes += len(body)
        return Parcel(body, topic=topic)


def prefix_of(pattern: str) -> bytes:
    """How everything that the pattern covers begins on the wire."""
    levels = pattern.split(".")
    fixed = list(itertools.takewhile(lambda level: level not in ("*", ">"), levels))
    if len(fixed) == len(levels):
        return pattern.encode() + END_OF_TOPIC
    # `a.>` covers `a` as well, so the dot is not part of what all begin with; of `a.*` it is.
    dot = "." if fixed and levels[len(fixed)] == "*" else ""
    return (".".join(fixed) + dot).encode()


def _cover(patterns: tuple[str, ...]) -> Callable[[str], bool] | None:
    """None: libzmq's own sorting out is enough."""
    if ">" in patterns or not any("*" in pattern or ">" in pattern for pattern in patterns):
        return None
    return lambda topic: any(matches(pattern, topic) for pattern in patterns)
