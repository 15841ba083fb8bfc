"""Publishing over UDP: to a multicast group, one datagram whatever the number of subscribers; or to each that joined, one each.

Nobody is waited for: `on_full` is about our own socket's buffer, and a slow subscriber's kernel drops. So that each loss is
counted, messages are numbered, and the last number is said again and again: soon after the last message, then once a second, and
at the end.

Subscribers join, by a cookie that shows that their address is theirs, and their lease is renewed by joining again. In a group
that is for counting them, and for what is retained; without one it is where the messages go. What a stranger can cost is
bounded: the number of leases, how many begin in a second, and an answer that is no larger than the question.

The keeper's thread answers and announces, so it goes on while nobody publishes.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .. import _linkwire, errors
from .._linkkeeper import LINGER, keeper
from .._spi import PublishTerms, Wait, Want
from .._url import Url
from ..message import Parcel, matches
from . import _udpwire as wire
from ._bell import Bell
from ._oserror import GONE
from ._udpsock import Allowance, Cookies, coming_from, spoken_to

_log = logging.getLogger("ipckit")

#: Seconds that a subscriber counts without joining again. Longer than a debugger's, or a busy machine's, short stop.
LEASE = 15.0
_LEASES = 4096
_AT_A_TIME = 64  # datagrams that are looked at before others get their turn
_TOPICS = 4096  # of which a lease remembers whether it wants them
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between two announcements
_EAGER = 0.05  # the same, while somebody waits for subscribers

#: Publishers that are closed and still say goodbye, by their port; who wants the port may have it.
_lingering: weakref.WeakValueDictionary[int, UdpPublisher] = weakref.WeakValueDictionary()


def free_port(port: int) -> bool:
    """We want this port: a publisher of ours that is closed, and still says goodbye there, stops. Whether there was one."""
    publisher = _lingering.pop(port, None)
    if publisher is None:
        return False
    publisher.cut_short()
    keeper.look()
    return True


class Lease:
    """Where datagrams go: one subscriber's address, or the group's; with the numbers of what is sent there."""

    def __init__(
        self,
        address: Any,
        member: bytes,
        number: int,
        patterns: tuple[str, ...],
        source: list[tuple[int, int, bytes]],
    ) -> None:
        self.address, self.member = address, member
        self.number = self.first = number
        self.source = source  # which address of ours it has spoken to, as ancillary data
        self.until = 0.0
        self._patterns = patterns
        self._wanted: dict[str, bool] = {}

    def wants(self, topic: str) -> bool:
        wanted = self._wanted.get(topic)
        if wanted is None:
            if len(self._wanted) >= _TOPICS:
                self._wanted.clear()
            wanted = self._wanted[topic] = any(matches(pattern, topic) for pattern in self._patterns)
        return wanted


class UdpPublisher:
    """`Publishing`, and `Tended` by the keeper."""

    def __init__(self, url: Url, sock: socket.socket, group: Any, limit: int, terms: PublishTerms) -> None:
        """`group`: the multicast address, as the socket takes it, or None: each subscriber is sent its own."""
        self.url = url
        self._lock = threading.Lock()
        self._sock, self._terms = sock, terms
        self._session = os.urandom(wire.SESSION)
        self._everybody = None if group is None else Lease(group, b"", 0, (">",), [])
        self._leases: dict[Any, Lease] = {}  # by address: who comes to one that a dead one had, takes its place
        self._highest = 0  # number that was ever given to a message
        self._room = wire.MAX_DATAGRAM - wire.KEPT_HEAD
        self._limit = min(limit, self._room)
        self._retained: dict[str, deque[tuple[int, bytes]]] = {}
        self._order = itertools.count()
        self._rest = deque[tuple[Lease, bytes, bytes]]()  # of what was accepted: our own socket had no room for it
        self._cookies = Cookies(wire.COOKIE)
        self._joins, self._answers = Allowance(256, 100.0), Allowance(1024, 2000.0)
        self._sent = self._bytes = self._dropped = self._refused = 0
        self._complained = False
        self._changed = Bell()
        self._eager_until = 0.0
        self._pause, self._due, self._said_at, self._said = _FIRST_PAUSE, 0.0, 0.0, -1
        self._closed = False
        self._deadline: float | None = None  # closed, and saying goodbye
        keeper.tend(self)

    @property
    def native(self) -> socket.socket:
        return self._sock

    # -- Publishing --------------------------------------------------------------------------------------------------

    def try_put(self, parcel: Parcel) -> bool:
        frame = _linkwire.message(parcel)
        if len(frame) > self._limit:
            raise errors.MessageTooLarge(
                f"{len(frame)} bytes with topic, id and headers, and {self._limit} is the limit",
                url=self.url,
                operation="publish",
                hint="a message is one datagram here; send larger ones over tcp, or lift limit= if that is lower",
            )
        with self._lock:
            self._check()
            full = bool(self._rest) and not self._pushed()
            if full and self._terms.on_full == "error":
                raise errors.QueueFull("our own socket has no room", url=self.url, operation="publish")
            if full and self._terms.on_full == "block":
                return False
            for lease in self._audience(parcel.topic):
                self._number(lease)
                if full:  # drop_new: its number is missing, so everybody knows
                    self._dropped += 1
                else:
                    self._rest.append((lease, wire.data(self._session, lease.number), frame))
            if self._terms.retain:
                last = self._retained.setdefault(parcel.topic, deque(maxlen=self._terms.retain))
                last.append((next(self._order), frame))
            self._pushed()
            self._sent += 1
            self._bytes += len(parcel.body)
            idle = self._pause > _FIRST_PAUSE
            self._pause = _FIRST_PAUSE
        if idle or self._rest:  # the keeper sleeps longer than until this one's announcement
            keeper.look()
        return True

    def try_flush(self) -> bool:
        """With on_full=block, when our kernel has it all."""
        with self._lock:
            self._check()
            return self._pushed() or self._terms.on_full != "block"

    def subscribers(self) -> int:
        with self._lock:
            self._check()
            return self._count()

    def arm(self, want: Want) -> Wait:
        if want & Want.RECV:  # more subscribers: call them
            now = time.monotonic()
            with self._lock:
                self._check()
                late = self._eager_until <= now
                self._eager_until = now + 1.0
            if late:
                keeper.look()
            return Wait((self._changed.announce(),), 0.5)
        return Wait(((self._sock.fileno(), select.POLLOUT),))

    def counters(self) -> Mapping[str, int]:
        """As every publisher's. Dropped: by this machine; what subscribers missed, they know. Refused: made no sense."""
        with self._lock:
            return {
                "sent": self._sent,
                "bytes_sent": self._bytes,
                "dropped": self._dropped,
                "subscribers": self._count(),
                "refused": self._refused,
            }

    def close(self) -> None:
        """Subscribers are told our last number until they have all left, for a while."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            now = time.monotonic()
            self._deadline, self._pause, self._due = now + LINGER, _FIRST_PAUSE, now
            _lingering[self._sock.getsockname()[1]] = self
            self._wind_up(now)
        keeper.look()

    def cut_short(self) -> None:
        with self._lock:
            self._over()

    def abandon(self) -> None:
        self._closed = True
        self._sock.close()

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self.url)

    def _count(self) -> int:
        now = time.monotonic()
        return sum(lease.until > now for lease in self._leases.values())

    # -- giving ------------------------------------------------------------------------------------------------------

    def _audience(self, topic: str) -> Sequence[Lease]:
        if self._everybody is not None:
            return (self._everybody,)
        return [lease for lease in self._leases.values() if lease.wants(topic)]

    def _number(self, lease: Lease) -> None:
        lease.number += 1
        self._highest = max(self._highest, lease.number)

    def _pushed(self) -> bool:
        """Whether our kernel has taken everything."""
        while self._rest:
            lease, head, frame = self._rest[0]
            try:
                self._sock.sendmsg((head, frame), lease.source, 0, lease.address)
            except BlockingIOError:
                return False
            except OSError as error:  # its number is used, so that subscribers count it
                self._lose(error)
            self._rest.popleft()
        return True

    def _lose(self, error: OSError) -> None:
        self._dropped += 1
        if not self._complained:
            self._complained = True
            _log.warning("%s: a message was dropped on its way out: %s", self.url, error)

    # -- Tended ------------------------------------------------------------------------------------------------------

    def tend(self) -> Wait | None:
        with self._lock:
            if self._sock.fileno() < 0:
                return None
            now = time.monotonic()
            self._hear(now)
            for key in [key for key, lease in self._leases.items() if lease.until <= now]:
                del self._leases[key]
            all_sent = self._pushed()
            if self._closed:
                if not self._wind_up(now):
                    return None
            else:
                self._announce(now, all_sent)
            events = select.POLLIN if all_sent else select.POLLIN | select.POLLOUT
            return Wait(((self._sock.fileno(), events),), max(self._due - now, 0.001))

    def lingers(self) -> bool:
        return self._deadline is not None

    def _announce(self, now: float, all_sent: bool) -> None:
        """When it is time, say the last number. While messages flow, which carry theirs, only once a second."""
        awaited = now < self._eager_until
        self._due = min(self._due, now + self._pause)
        if awaited:
            self._due = min(self._due, self._said_at + _EAGER)
        if now < self._due:
            return
        flowing, self._said = self._said != self._highest, self._highest
        if all_sent and (awaited or not flowing or now >= self._said_at + _LAST_PAUSE):
            self._say(now)
            self._pause = min(self._pause * 2, _LAST_PAUSE)
        self._due = now + self._pause

    def _say(self, now: float, *, bye: bool = False) -> None:
        self._said_at = now
        for lease in self._leases.values() if self._everybody is None else (self._everybody,):
            self._tell(wire.number(self._session, lease.number, bye=bye), lease)

    def _tell(self, datagram: bytes, lease: Lease) -> None:
        try:
            self._sock.sendmsg((datagram,), lease.source, 0, lease.address)
        except BlockingIOError:  # it will be said again
            pass
        except OSError as error:
            _log.info("%s: %s does not get an answer: %s", self.url, lease.address, error)

    def _wind_up(self, now: float) -> bool:
        """Whether there is still somebody to say goodbye to."""
        if self._deadline is None:
            return False
        if now >= self._due and self._pushed():
            self._say(now, bye=True)
            self._due = now + self._pause
            self._pause = min(self._pause * 2, _LAST_PAUSE)
        if self._leases and now < self._deadline:
            return True
        self._over()
        return False

    def _over(self) -> None:
        self._deadline = None
        self._leases.clear()
        self._changed.close()
        self._sock.close()

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _hear(self, now: float) -> None:
        for _ in range(_AT_A_TIME):
            try:
                datagram, ancillary, _, address = self._sock.recvmsg(wire.MAX_DATAGRAM, 128)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in GONE:  # an ICMP answer to something that we sent
                    continue
                raise
            try:
                heard = wire.read(datagram, len(datagram))
                if heard.kind not in (wire.JOIN, wire.LEAVE):
                    raise errors.ProtocolError("a datagram that has no place here")
            except errors.ProtocolError:
                self._refused += 1
                continue
            lease = self._leases.get(address)
            ours = lease is not None and lease.member == heard.member
            if heard.kind == wire.JOIN and lease is not None and ours:
                lease.until = now + LEASE
                self._tell(wire.welcome(self._session, lease.member, lease.first), lease)
            elif heard.kind == wire.JOIN and not self._closed and self._answers.take(now):
                self._join(heard, address, coming_from(spoken_to(ancillary), self._sock.family), now)
            elif heard.kind == wire.LEAVE and ours:
                del self._leases[address]
                self._changed.ring()

    def _join(self, heard: wire.Heard, address: Any, source: list[tuple[int, int, bytes]], now: float) -> None:
        """Somebody new, or so it says."""
        known = heard.session in (self._session, wire.NO_SESSION)  # else it means a process that was here before
        if not known or not self._cookies.good(heard.cookie, address, heard.member):
            cookie = self._cookies.make(address, heard.member)
            self._tell(wire.challenge(self._session, heard.member, cookie), Lease(address, b"", 0, (), source))
            return
        if (len(self._leases) >= _LEASES and address not in self._leases) or not self._joins.take(now):
            self._refused += 1
            return
        if (old := self._leases.get(address)) is not None:
            self._rest = deque(each for each in self._rest if each[0] is not old)
        number = self._highest  # so what a lease of its had before, and is under way, is none of the new one's
        lease = self._leases[address] = Lease(address, heard.member, number, heard.patterns or (">",), source)
        lease.until = now + LEASE
        self._tell(wire.welcome(self._session, heard.member, number), lease)
        self._give_retained(lease)
        self._changed.ring()

    def _give_retained(self, lease: Lease) -> None:
        """The last of each topic, in the order in which they were published. In a group the others skip them, by number."""
        wanted = [each for topic, kept in self._retained.items() if lease.wants(topic) for each in kept]
        for _, frame in sorted(wanted):
            to = self._everybody or lease
            self._number(to)
            head = wire.data(self._session, to.number)
            if self._everybody is not None:
                head = wire.kept(self._session, to.number, lease.member)
            self._rest.append((to, head, frame))
        self._pushed()
