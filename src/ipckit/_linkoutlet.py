"""The sending side of a queue over links: each message to one receiver that has room, and to another if that one dies.

Every receiver says how many messages it takes before it has acknowledged the first of them (its window). A message goes to the
next one in turn that has room in its window and on its link; when nobody has, the sender waits, and so nothing piles up here:
what is kept is what is out there without an acknowledgement. The receiver's link ends, or it says "again": then the message goes
to whoever has room next, before anything new, marked as delivered once more.

Who looks after that while the user does not call? The keeper's thread. While the user does, it wakes for arrivals and ends, and
every `_TICK` to see whether they still do; when they do not, and something is out, it hears the receivers itself.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import _linkwire as wire
from . import errors
from ._linkcrowd import Crowd, Member
from ._linkdialer import Dialer
from ._linkkeeper import keeper
from ._spi import Link, Listener, Wait, Want
from ._url import Url
from .message import Parcel

_log = logging.getLogger("ipckit")
#: Bytes out at one receiver without an acknowledgement; one message may always be.
_MOST_BYTES = 64 << 20
_TICK = 0.05
_AT_ONCE = 64  # messages of a batch that one receiver is given before the next one's turn
_GLANCE = 32  # messages after which acknowledgements are read though there is room


class Taker(Member):
    """A receiver: what it may be given, and what it has."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.window = 0
        self.number = 0  # of the last message that its link took
        self.out: dict[int, Parcel] = {}
        self.bytes_out = 0

    def has_room(self, size: int) -> bool:
        return (
            self.hailed
            and not self.deaf
            and len(self.out) < self.window
            and (not self.out or self.bytes_out + size <= _MOST_BYTES)
        )

    def note(self, parcel: Parcel) -> None:
        """Its link has taken this one."""
        self.number += 1
        self.out[self.number] = parcel
        self.bytes_out += len(parcel.body)

    def reserve(self, parcel: Parcel) -> bool:
        """`note` it if there is room, before its link takes it."""
        room = not parcel.priority and self.has_room(len(parcel.body))
        if room:
            self.note(parcel)
        return room

    def release(self) -> None:
        """The link did not take the last one that was reserved."""
        self.bytes_out -= len(self.out.pop(self.number).body)
        self.number -= 1


class LinkOutlet:
    """`Outlet`, `Batching`, `Draining`, and `Tended` by the keeper."""

    def __init__(self, url: Url, door: Listener | Dialer[Link], first: Link | None) -> None:
        self._lock = threading.Lock()
        self._url = url
        hello = wire.hello(wire.Hello(wire.SENDER, session=os.urandom(16)))
        self._crowd: Crowd[Taker] = Crowd(url, door, hello, self._make, self._lost, ends=True)
        self._again: deque[Parcel] = deque()  # to be handed out before anything new
        self._delayed: list[tuple[float, int, Parcel]] = []
        self._order = itertools.count()
        self._since_glance = 0
        self._sent = self._bytes = self._redelivered = self._acknowledged = 0
        self._calls = self._calls_seen = 0
        self._asleep = False  # the keeper, until somebody comes or goes
        self._closed = False
        if first is not None:
            self._crowd.admit(first)
        keeper.tend(self)

    @property
    def url(self) -> Url:
        return self._crowd.url

    @property
    def native(self) -> Any:
        return self._crowd.native

    # -- Outlet ------------------------------------------------------------------------------------------------------

    def try_put(self, parcel: Parcel) -> bool:
        if parcel.priority:
            raise errors.Unsupported(
                "this transport has no priorities", url=self._url, operation="send", hint="see `ipckit transports`"
            )
        with self._lock:
            self._crowd.check()
            self._since_glance += 1
            if self._since_glance >= _GLANCE or self._again or self._delayed:
                self._listen()
            if not self._hand_out_again() or not self._give(parcel):
                self._listen()  # acknowledgements make room
                if not self._hand_out_again() or not self._give(parcel):
                    self._crowd.leave()
                    return False
            self._given((parcel,))
            self._crowd.leave()
            return True

    def try_put_many(self, parcels: Sequence[Parcel]) -> int:
        with self._lock:
            self._crowd.check()
            self._listen()
            taken = 0
            share = -(
                -len(parcels) // max(len(self._crowd.members), 1)
            )  # nobody idles while another has the whole batch
            while taken < len(parcels) and self._hand_out_again():
                given = self._give_some(parcels[taken : taken + min(share, _AT_ONCE)])
                if not given:
                    break
                taken += given
            self._given(parcels[:taken])
            self._crowd.leave()
            return taken

    def _given(self, parcels: Sequence[Parcel]) -> None:
        self._sent += len(parcels)
        self._bytes += sum(len(parcel.body) for parcel in parcels)
        self._calls += 1
        if self._asleep:
            self._asleep = False
            keeper.look()

    def try_flush(self) -> bool:
        with self._lock:
            self._crowd.check()
            gone = [self._crowd.flush(taker) for taker in tuple(self._crowd.members) if taker.unsent]
            if all(gone) and not self._again:
                return True
            self._listen()
            done = self._hand_out_again() and not any(taker.unsent for taker in self._crowd.members)
            self._crowd.leave()
            return done

    def try_drain(self) -> bool:
        """True when receivers have acknowledged every message."""
        with self._lock:
            self._crowd.check()
            self._listen()
            self._hand_out_again()
            self._crowd.leave()
            return not self._outstanding()

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._crowd.check()
            self._crowd.arm()
            return self._crowd.sleep(want, self._delayed[0][0] if self._delayed else None)

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return {
                "sent": self._sent,
                "bytes_sent": self._bytes,
                "acknowledged": self._acknowledged,
                "unacknowledged": self._outstanding(),
                "redelivered": self._redelivered,
                "receivers": sum(taker.greeted for taker in self._crowd.members),
                "reconnects": self._crowd.reconnects,
            }

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            stranded = len(self._again) + len(self._delayed)
            if stranded:
                _log.warning("%s: closed with %d messages that no receiver took", self._url, stranded)
            self._crowd.close()
        keeper.look()

    def abandon(self) -> None:
        self._crowd.abandon()

    # -- Tended ------------------------------------------------------------------------------------------------------

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed:
                return None
            for _ in self._crowd.rounds():
                self._round()
            self._crowd.wake()
            if self._crowd.restless:
                return self._crowd.watch.wait(0)
            idle, self._calls_seen = self._calls == self._calls_seen, self._calls
            if self._again or self._delayed or any(taker.unsent for taker in self._crowd.members):
                return self._crowd.watch.wait(self._delayed[0][0] if self._delayed else None)
            if not idle:
                return self._crowd.quiet.wait(time.monotonic() + _TICK)
            if self._outstanding():
                return self._crowd.watch.wait()
            self._asleep = True
            return self._crowd.quiet.wait()

    def lingers(self) -> bool:
        return False

    def _round(self) -> None:
        self._listen()
        self._hand_out_again()
        for taker in tuple(self._crowd.members):
            self._crowd.flush(taker)

    # -- giving ------------------------------------------------------------------------------------------------------

    def _give(self, parcel: Parcel) -> bool:
        frame = wire.message(parcel)
        members = self._crowd.members
        for _ in range(len(members)):
            taker = members[0]
            if taker.has_room(len(parcel.body)) and self._crowd.send(taker, frame):
                taker.note(parcel)
                self._next()
                return True
            if not taker.lost:
                self._next()
            if not members:
                break
        return False

    def _give_some(self, parcels: Sequence[Parcel]) -> int:
        """As `_give`: how many of them, to the next receiver that has room for any."""
        members = self._crowd.members
        for _ in range(len(members)):
            taker = members[0]
            some = list(itertools.takewhile(taker.reserve, parcels))
            sent = self._crowd.send_many(taker, [wire.message(parcel) for parcel in some]) if some else 0
            if taker.lost or taker.deaf:  # whichever it did not acknowledge before it ended go out again
                return len(some)
            for _ in range(len(some) - sent):
                taker.release()
            self._next()
            if sent:
                return sent
        return 0

    def _next(self) -> None:
        members = self._crowd.members
        if len(members) > 1:
            members.append(members.pop(0))

    def _hand_out_again(self) -> bool:
        """Whether nothing is left that has to go out before anything new."""
        now = time.monotonic()
        while self._delayed and self._delayed[0][0] <= now:
            self._again.append(heapq.heappop(self._delayed)[2])
        while self._again:
            parcel = self._again[0]
            try:
                if not self._give(parcel):
                    return False
            except errors.MessageTooLarge as error:  # its first receiver took more than this one does
                _log.error("%s: message %s is lost: %s", self._url, parcel.id, error)
            self._again.popleft()
            self._redelivered += 1
        return True

    def _outstanding(self) -> int:
        return sum(len(taker.out) for taker in self._crowd.members) + len(self._again) + len(self._delayed)

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _make(self, link: Link) -> Taker:
        taker = Taker(link)
        if self._crowd.connects:  # it may not call for a while: begin
            taker.window = wire.FIRST
        return taker

    def _listen(self) -> None:
        self._since_glance = 0
        crowd = self._crowd
        crowd.stir()
        while (found := crowd.next_frame()) is not None:
            taker, frame = found
            try:
                self._heard(taker, frame)
            except errors.ProtocolError as error:
                if not crowd.connects:
                    crowd.send(taker, wire.refused(error.message))
                crowd.lose(taker, error)

    def _heard(self, taker: Taker, frame: bytes) -> None:
        kind = wire.kind_of(frame)
        if kind == wire.HELLO and not taker.greeted:
            window = wire.read_hello(frame, wire.RECEIVER).window
            taker.window = max(window, wire.FIRST) if self._crowd.connects else window
            taker.greeted = True
        elif kind == wire.ACK:
            for first, count in wire.read_ack(frame):
                if count > len(taker.out):
                    raise errors.ProtocolError(f"{count} messages acknowledged, and {len(taker.out)} are there")
                for number in range(first, first + count):
                    self._settled(taker, number)
                    self._acknowledged += 1
        elif kind == wire.NACK:
            number, delay = wire.read_nack(frame)
            parcel = self._settled(taker, number)
            parcel = replace(parcel, redelivered=parcel.redelivered + 1)
            if delay:
                heapq.heappush(self._delayed, (time.monotonic() + delay, next(self._order), parcel))
                keeper.look()
            else:
                self._again.append(parcel)
        else:
            raise wire.unexpected(frame)

    def _settled(self, taker: Taker, number: int) -> Parcel:
        parcel = taker.out.pop(number, None)
        if parcel is None:
            raise errors.ProtocolError(f"message {number} settled, which is not there")
        taker.bytes_out -= len(parcel.body)
        return parcel

    def _lost(self, taker: Taker, error: errors.IpcError) -> None:
        """Everything it had goes out again, in order."""
        for number in sorted(taker.out, reverse=True):
            parcel = taker.out[number]
            self._again.appendleft(replace(parcel, redelivered=parcel.redelivered + 1))
        taker.out.clear()
        if self._again:
            keeper.look()
