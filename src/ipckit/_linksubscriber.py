"""The subscribing side over links: says what it wants, and receives until the publisher has closed.

It is there, and misses nothing, from when it was opened: the publisher answers. A publisher that dies, and comes back, is found
again; what was published in between nobody can count, so the first message after it has the gap -1, "some".
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from . import _linkwire as wire
from . import errors
from ._linkcrowd import Crowd, Member
from ._linkdialer import Dialer
from ._spi import Link, Listener, Steps, TopicTerms, Wait, Want
from ._url import Url
from .message import UNKNOWN, Parcel, Verdict


class LinkSubscriber:
    """`Intake`."""

    def __init__(self, url: Url, door: Listener | Dialer[Link], link: Link, terms: TopicTerms) -> None:
        self._lock = threading.Lock()
        self._url = url
        hello = wire.hello(wire.Hello(wire.SUBSCRIBER, topics=terms.topics, group=terms.group))
        self._crowd: Crowd[Member] = Crowd(url, door, hello, Member, self._lost)
        self._received = self._bytes = self._dropped = 0
        self._missed = False  # an unknown number
        self._over = False
        self._crowd.admit(link)

    @property
    def native(self) -> Any:
        return self._crowd.native

    def greeted(self) -> Steps[None]:
        """Wait until the publisher knows us."""
        try:
            while not self._try_greeted():
                wait = self.arm(Want.RECV)
                if self._try_greeted():
                    break
                yield wait
        except errors.Timeout as timeout:
            raise errors.NothingListening(
                "somebody listens there, but is no publisher that answers", url=self._url, operation="subscriber"
            ) from timeout

    def _try_greeted(self) -> bool:
        with self._lock:
            self._crowd.check()
            self._crowd.stir()
            while not any(member.greeted for member in self._crowd.members):
                if (found := self._crowd.next_frame()) is None:
                    self._crowd.check()
                    self._crowd.leave()
                    return False
                self._heard(*found)
            return True

    # -- Intake ------------------------------------------------------------------------------------------------------

    def try_get(self) -> Parcel | None:
        with self._lock:
            self._crowd.check()
            parcel = self._next()
            if parcel is None:
                self._crowd.stir()
                parcel = self._next()
                if parcel is None:
                    self._crowd.check()
                    self._crowd.leave()
                    return None
            self._received += 1
            self._bytes += len(parcel.body)
            self._dropped += parcel.gap
            if self._missed:
                parcel.gap, self._missed = UNKNOWN, False
            self._crowd.leave()
            return parcel

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        return True  # nobody keeps it

    def try_flush(self) -> bool:
        return True

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._crowd.check()
            self._crowd.arm()
            return self._crowd.sleep(want)

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return {
                "received": self._received,
                "bytes_received": self._bytes,
                "dropped": self._dropped,
                "reconnects": self._crowd.reconnects,
            }

    def close(self) -> None:
        with self._lock:
            self._crowd.close()

    def abandon(self) -> None:
        self._crowd.abandon()

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _next(self) -> Parcel | None:
        if self._over:
            raise errors.PeerClosed("the publisher closed", url=self._url)
        while (found := self._crowd.next_frame()) is not None:
            if (parcel := self._heard(*found)) is not None:
                return parcel
        return None

    def _heard(self, member: Member, frame: bytes) -> Parcel | None:
        try:
            kind = wire.kind_of(frame)
            if kind == wire.MESSAGE and member.greeted:
                return wire.read_message(frame)
            if kind == wire.HELLO and not member.greeted:
                wire.read_hello(frame, wire.PUBLISHER)
                member.greeted = True
            elif kind == wire.END and member.greeted:
                self._dropped += wire.read_end(frame)
                self._over = True
                self._crowd.shut_door()
                self._crowd.dismiss(member)  # which tells the publisher that all of it has arrived
                raise errors.PeerClosed("the publisher closed", url=self._url)
            else:
                raise wire.unexpected(frame)
        except errors.ProtocolError as error:
            self._crowd.lose(member, error)
        return None

    def _lost(self, member: Member, error: errors.IpcError) -> None:
        self._missed = self._missed or member.greeted
