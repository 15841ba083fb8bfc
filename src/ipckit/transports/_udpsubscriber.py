"""Subscribing over UDP: what `_udpgroup` (all publishers of a multicast group) and `_udppeer` (one publisher) share.

Two things go on. The user's calls read the messages and keep the accounts (`_udpledger`). The keeper's thread joins publishers,
and joins again before a lease ends, while nobody calls.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .. import _linkwire, errors
from .._linkkeeper import keeper
from .._spi import TopicTerms, Wait, Want
from .._url import Url
from ..message import UNKNOWN, Parcel, Verdict, matches
from . import _udpwire as wire
from ._udpledger import Ledger

_log = logging.getLogger("ipckit")

RENEW = 2.0  # seconds; see LEASE of the publisher
FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0  # between two JOINs that nobody answers
AT_A_TIME = 256  # datagrams that one try looks at
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
        self.pause = FIRST_PAUSE
        self.said: int | None = None  # its last number, heard beside the messages
        self.missed = 0  # of its messages, by its numbers; not told before it is known that somebody is there

    def welcomed(self, number: int, now: float) -> None:
        self.missed += self.ledger.welcomed(number)
        self.welcome, self.pause, self.join_at = True, FIRST_PAUSE, now + RENEW


class Subscriber(ABC):
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
