"""Subscribing over UDP: to all publishers of a multicast group, or to one publisher by its address.

Two things go on. The user's calls read the messages and keep the accounts (`_udpledger`). The keeper's thread joins publishers,
and joins again before a lease ends, while nobody calls; in a group it listens on a second socket that hears only announcements,
so it does not wake for messages.

In a group what is said there is also what ends a publisher: the subscriber goes on without it. With one publisher its end is the
end; one that dies is looked for until it is back, and then the gap is -1, as nobody counted.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .. import _linkwire, errors
from .._linkkeeper import keeper
from .._spi import Steps, TopicTerms, Wait, Want
from .._url import Url
from ..message import UNKNOWN, Parcel, Verdict, matches
from . import _udpwire as wire
from ._bell import Bell
from ._oserror import GONE, map_oserror
from ._udpledger import Ledger
from ._udpsock import Allowance

_log = logging.getLogger("ipckit")

_RENEW = 4.0  # seconds; see LEASE of the publisher
_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # between two JOINs that nobody answers
_FORGET = 60.0  # seconds of silence after which a publisher of a group is forgotten
_SOURCES = 1024  # publishers of a group
_AT_A_TIME = 256  # datagrams that one try looks at
_PARKED = 64  # messages that the keeper may come across while it looks for an answer
_TOPICS = 4096  # of which it is remembered whether we want them


class Source:
    """One publisher, as we know it."""

    def __init__(self, address: Any, session: bytes, now: float) -> None:
        self.address, self.session = address, session
        self.member = os.urandom(wire.MEMBER)
        self.cookie = wire.NO_COOKIE
        self.ledger = Ledger()
        self.welcome = False  # it has answered: it is where it says
        self.over = False  # it said goodbye
        self.heard = now
        self.join_at = now
        self.pause = _FIRST_PAUSE
        self.said: int | None = None  # its last number, heard beside the messages
        self.missed = 0  # of its messages, by its numbers; not told before it is known that somebody is there

    def welcomed(self, number: int, now: float) -> None:
        self.missed += self.ledger.welcomed(number)
        self.welcome, self.pause, self.join_at = True, _FIRST_PAUSE, now + _RENEW


class _Subscriber(ABC):
    """`Intake`, and `Tended` by the keeper: what both kinds share."""

    def __init__(self, url: Url, data: socket.socket, limit: int, terms: TopicTerms) -> None:
        self._url, self._data, self._limit, self._topics = url, data, limit, terms.topics
        self._lock = threading.Lock()
        self._buffer = bytearray(1 << 16)
        self._wanted: dict[str, bool] = {}
        self._received = self._bytes = self._dropped = self._unwanted = self._refused = 0
        self._gap = 0  # missed since the last message that was given out
        self._missed = False  # an unknown number of them
        self._closed = False

    @property
    def native(self) -> socket.socket:
        return self._data

    def try_get(self) -> Parcel | None:
        with self._lock:
            self._check()
            parcel = self._next()
            if parcel is not None:
                self._received += 1
                self._bytes += len(parcel.body)
                parcel.gap, self._gap = (UNKNOWN if self._missed else self._gap), 0
                self._missed = False
            return parcel

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        return True  # nobody keeps it

    def try_flush(self) -> bool:
        return True

    def counters(self) -> Mapping[str, int]:
        """Received + unwanted (of other topics, or retained for others) + dropped = sent, to the last number heard."""
        with self._lock:
            return {
                "received": self._received,
                "bytes_received": self._bytes,
                "dropped": self._dropped,
                "unwanted": self._unwanted,
                "refused": self._refused,
            }

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self._url)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._leave()
            self.abandon()
        keeper.look()

    def lingers(self) -> bool:
        return False

    @abstractmethod
    def arm(self, want: Want) -> Wait: ...

    @abstractmethod
    def abandon(self) -> None: ...

    @abstractmethod
    def _next(self) -> Parcel | None: ...

    @abstractmethod
    def _leave(self) -> None: ...

    # -- the accounts ------------------------------------------------------------------------------------------------

    def _tell(self, source: Source) -> None:
        """Count what was missed; but anybody can make up a publisher, as long as nobody has to answer for it."""
        if source.missed and source.welcome:
            self._dropped += source.missed
            self._gap += source.missed
            source.missed = 0

    def _message(self, source: Source, heard: wire.Heard, size: int) -> Parcel | None:
        """A DATA or KEPT in the buffer, as the message that it is for us."""
        missed = source.ledger.received(heard.number)
        if missed is None:
            return None
        source.missed += missed
        self._tell(source)
        if heard.kind == wire.KEPT and heard.member != source.member:
            self._unwanted += 1
            return None
        frame = bytes(memoryview(self._buffer)[heard.frame_at : size])
        try:
            if len(frame) > self._limit or _linkwire.kind_of(frame) != _linkwire.MESSAGE:
                raise errors.ProtocolError("no message, or one above the limit")
            parcel = _linkwire.read_message(frame)
        except errors.ProtocolError:
            self._refused += 1
            source.missed += 1
            self._tell(source)
            return None
        if not self._wants(parcel.topic):
            self._unwanted += 1
            return None
        return parcel

    def _wants(self, topic: str) -> bool:
        wanted = self._wanted.get(topic)
        if wanted is None:
            if len(self._wanted) >= _TOPICS:
                self._wanted.clear()
            wanted = self._wanted[topic] = any(matches(pattern, topic) for pattern in self._topics)
        return wanted

    def _heard(self, size: int) -> wire.Heard | None:
        try:
            return wire.read(self._buffer, size)
        except errors.ProtocolError:
            self._refused += 1
            return None


# -- a group --------------------------------------------------------------------------------------------------------


class GroupSubscriber(_Subscriber):
    """Hears `data` in the user's calls; `control` (the same group, announcements only) and `own` on the keeper's thread."""

    def __init__(
        self, url: Url, data: socket.socket, control: socket.socket, own: socket.socket, limit: int, terms: TopicTerms
    ) -> None:
        super().__init__(url, data, limit, terms)
        self._control, self._own = control, own
        self._sources: dict[tuple[Any, bytes], Source] = {}
        self._joins = Allowance(256, 200.0)  # a stranger may make up publishers, at anybody's address
        self._wait = Wait(((data.fileno(), select.POLLIN),))
        keeper.tend(self)

    def arm(self, want: Want) -> Wait:
        return self._wait

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "publishers": sum(source.welcome for source in tuple(self._sources.values()))}

    def abandon(self) -> None:
        for sock in (self._data, self._control, self._own):
            sock.close()

    def _leave(self) -> None:
        for source in self._sources.values():
            if source.welcome and not source.over:
                self._say(source, wire.leave(source.session, source.member))

    def _next(self) -> Parcel | None:
        for _ in range(_AT_A_TIME):
            try:
                size, address = self._data.recvfrom_into(self._buffer)
            except BlockingIOError:
                self._caught_up()
                return None
            except OSError as error:
                raise map_oserror(error, self._url, "recv") from error
            if (heard := self._heard(size)) is None or heard.kind not in (wire.DATA, wire.KEPT, wire.NUMBER, wire.BYE):
                continue
            if (source := self._source(address, heard, time.monotonic())) is None:
                continue
            if heard.kind in (wire.NUMBER, wire.BYE):
                source.missed += source.ledger.told(heard.number)
                self._tell(source)
            elif (parcel := self._message(source, heard, size)) is not None:
                return parcel
        return None

    def _caught_up(self) -> None:
        """All that came has been read: what was said beside the messages, before that, is true now.

        A full buffer drops announcements as well as messages, and so the end of a burst would stay uncounted.
        """
        for source in self._sources.values():
            if source.said is not None:
                source.missed += source.ledger.told(source.said)
                source.said = None
                self._tell(source)

    def _source(self, address: Any, heard: wire.Heard, now: float) -> Source | None:
        key = address, heard.session
        source = self._sources.get(key)
        if source is None:
            if heard.kind == wire.BYE:
                return None  # somebody whom we have never heard ends
            if len(self._sources) >= _SOURCES and not self._make_room():
                self._refused += 1
                return None
            source = self._sources[key] = Source(address, heard.session, now)
            self._join(source, now)
            keeper.look()
        source.heard = now
        return source

    def _make_room(self) -> bool:
        """Whoever has not shown that its address is its own, makes way; the longest silent one."""
        strangers = [(source.heard, key) for key, source in self._sources.items() if not source.welcome or source.over]
        if not strangers:
            return False
        del self._sources[min(strangers, key=lambda each: each[0])[1]]
        return True

    # -- on the keeper's thread

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed:
                return None
            now = time.monotonic()
            buffer = self._buffer
            for sock in (self._own, self._control):
                for _ in range(_AT_A_TIME):
                    try:
                        size, address = sock.recvfrom_into(buffer)
                    except BlockingIOError:
                        break
                    except OSError as error:
                        if error.errno in GONE:  # a publisher that is not there any more
                            continue
                        raise
                    if (heard := self._heard(size)) is not None:
                        self._hear(address, heard, now, ours=sock is self._own)
            due = now + _LAST_PAUSE
            for key, source in tuple(self._sources.items()):
                if now - source.heard > _FORGET and source.said is None:
                    del self._sources[key]
                    self._missed = self._missed or (source.welcome and not source.over)
                elif not source.over:
                    if source.join_at <= now:
                        self._join(source, now)
                    due = min(due, source.join_at)
            fds = tuple((sock.fileno(), select.POLLIN) for sock in (self._own, self._control))
            return Wait(fds, max(due - now, 0.001))

    def _hear(self, address: Any, heard: wire.Heard, now: float, *, ours: bool) -> None:
        """Answers come to our own socket, announcements to the group."""
        if not ours and heard.kind in (wire.NUMBER, wire.BYE):
            source = self._source(address, heard, now)
            if source is None:
                return
            source.said = max(heard.number, source.said or 0)
            if heard.kind == wire.BYE and source.welcome:
                self._say(source, wire.leave(source.session, source.member))
            source.over = source.over or heard.kind == wire.BYE
            return
        found = self._sources.get((address, heard.session))
        if not ours or found is None or heard.member != found.member:
            self._refused += ours
        elif heard.kind == wire.CHALLENGE:
            found.cookie = heard.cookie
            self._join(found, now)
        elif heard.kind == wire.WELCOME:
            found.welcomed(heard.number, now)
            self._tell(found)

    def _join(self, source: Source, now: float) -> None:
        source.join_at = now + source.pause
        source.pause = min(source.pause * 2, _LAST_PAUSE)
        if source.welcome or self._joins.take(now):
            self._say(source, wire.join(source.session, source.member, source.cookie, self._topics))

    def _say(self, source: Source, datagram: bytes) -> None:
        with suppress(OSError):  # it will be said again
            self._own.sendto(datagram, source.address)


# -- one publisher --------------------------------------------------------------------------------------------------


class PeerSubscriber(_Subscriber):
    """One socket, connected to the publisher: read in the user's calls, and by the keeper while an answer is due."""

    def __init__(self, url: Url, sock: socket.socket, limit: int, terms: TopicTerms) -> None:
        super().__init__(url, sock, limit, terms)
        self.trouble: OSError | None = None  # what the publisher's machine said
        self._source = Source(None, wire.NO_SESSION, time.monotonic())
        self._parked = deque[Parcel]()
        self._news = Bell()
        self._reconnects = 0
        self._known = False  # a publisher has welcomed us

    def reach(self, sockaddr: Any) -> None:
        """Speak to this address and to no other."""
        try:
            self._data.connect(sockaddr)
        except OSError as error:  # no way there: asking in vain will say so
            self.trouble = error

    def greeted(self, patience: float) -> Steps[bool]:
        """Ask once, and wait so long for the answer."""
        deadline = time.monotonic() + patience
        with self._lock:
            self._join(time.monotonic())
        while (left := deadline - time.monotonic()) > 0:
            with self._lock:
                self._park()
                if self._source.welcome:
                    keeper.tend(self)
                    return True
            yield Wait(((self._data.fileno(), select.POLLIN),), left)
        return False

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check()
            return Wait(((self._data.fileno(), select.POLLIN), self._news.announce()))

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "reconnects": self._reconnects}

    def abandon(self) -> None:
        self._data.close()
        self._news.close()

    def _leave(self) -> None:
        if self._known:
            self._say(wire.leave(self._source.session, self._source.member))

    def _next(self) -> Parcel | None:
        if self._parked:
            return self._parked.popleft()
        for _ in range(_AT_A_TIME):
            if self._source.over:
                raise errors.PeerClosed("the publisher closed", url=self._url)
            if (size := self._read()) is None:
                return None
            if (parcel := self._hear(size, time.monotonic())) is not None:
                return parcel
        return None

    def _read(self) -> int | None:
        """Into the buffer. None: nothing is there."""
        while True:
            try:
                return self._data.recv_into(self._buffer)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno not in GONE:
                    raise map_oserror(error, self._url, "recv") from error
                self.trouble = error  # nobody is there now: the next JOIN finds who comes

    def _park(self) -> None:
        """Look for an answer. Messages that stand before it are kept, a few."""
        while len(self._parked) < _PARKED and not self._source.over and (size := self._read()) is not None:
            if (parcel := self._hear(size, time.monotonic())) is not None:
                self._parked.append(parcel)

    def _hear(self, size: int, now: float) -> Parcel | None:
        source = self._source
        if (heard := self._heard(size)) is None:
            return None
        if heard.kind in (wire.CHALLENGE, wire.WELCOME):
            if heard.member != source.member:
                self._refused += 1
            elif source.session not in (heard.session, wire.NO_SESSION):
                self._begin_anew(now)  # another process is there now
            elif heard.kind == wire.CHALLENGE:
                source.session, source.cookie = heard.session, heard.cookie
                self._join(now)
            else:
                self._reconnects += not source.welcome and self._known
                source.session, self._known = heard.session, True
                source.welcomed(heard.number, now)
                self._tell(source)
        elif heard.session != source.session or heard.kind in (wire.JOIN, wire.LEAVE):
            self._refused += 1
        elif heard.kind in (wire.NUMBER, wire.BYE):
            source.missed += source.ledger.told(heard.number)
            self._tell(source)
            if heard.kind == wire.BYE:
                source.over = True
                self._leave()
        else:
            return self._message(source, heard, size)
        return None

    def _begin_anew(self, now: float) -> None:
        self._missed = self._missed or self._known
        self._source = Source(None, wire.NO_SESSION, now)
        self._join(now)

    # -- on the keeper's thread

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed or self._source.over:
                return None
            now = time.monotonic()
            waiting = not self._parked
            if waiting and self._asked:
                self._park()
                if self._parked or self._source.over:
                    self._news.ring()
                    waiting = False
            if self._source.join_at <= now:
                self._join(now)
            left = max(self._source.join_at - now, 0.001)
            return Wait(((self._data.fileno(), select.POLLIN),) if waiting and self._asked else (), left)

    @property
    def _asked(self) -> bool:
        """A JOIN is unanswered."""
        return self._source.pause > _FIRST_PAUSE

    def _join(self, now: float) -> None:
        source = self._source
        source.join_at = now + source.pause
        source.pause = min(source.pause * 2, _LAST_PAUSE)
        self._say(wire.join(source.session, source.member, source.cookie, self._topics))

    def _say(self, datagram: bytes) -> None:
        try:
            self._data.send(datagram)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in GONE:
                _log.info("%s: cannot be reached: %s", self._url, error)
            self.trouble = self.trouble or error
