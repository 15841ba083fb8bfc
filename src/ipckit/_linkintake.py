"""The receiving side of a queue over links: messages of many senders in turn, acknowledged in batches, duplicates dropped.

A sender whose link broke does not know which of its last acknowledgements were lost with it, and sends again what they were
for: never more than a window of messages. So of each sender it is remembered which of its messages are in the user's hands, and
which the last window of settled ones were. That is exact as long as the sender and we live, and neither grows with time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from . import _linkwire as wire
from . import errors
from ._linkcrowd import Crowd, Member
from ._linkdialer import Dialer
from ._linkkeeper import keeper
from ._spi import Link, Listener, Wait, Want
from ._url import Url
from .message import Parcel, Verdict

_SESSIONS = 1024  # senders that are gone and remembered all the same


class Session:
    """One sender, over all its links."""

    def __init__(self, window: int) -> None:
        self._window = window
        self.open: dict[str, Ticket] = {}  # in the user's hands
        self._settled: OrderedDict[str, None] = OrderedDict()

    def settle(self, id: str, done: bool) -> None:
        self.open.pop(id, None)
        if done and id:
            self._settled[id] = None
            if len(self._settled) > self._window:
                self._settled.popitem(last=False)

    def __contains__(self, id: str) -> bool:
        return id in self._settled


class Giver(Member):
    """A sender's link."""

    def __init__(self, link: Link, session: Session) -> None:
        super().__init__(link)
        self.session = session
        self.number = 0  # of the last message that came
        self.settled = 0
        self.acks: list[int] = []  # not told yet
        self.nacks: list[tuple[int, float]] = []


class Ticket:
    """What settles a parcel: whose it is, and its number there."""

    __slots__ = ("giver", "number")

    def __init__(self, giver: Giver, number: int) -> None:
        self.giver: Giver | None = giver
        self.number = number


class LinkIntake:
    """`Intake`, and `Tended` where it listens."""

    def __init__(self, url: Url, door: Listener | Dialer[Link], first: Link | None, window: int) -> None:
        self._lock = threading.Lock()
        self._url = url
        hello = wire.hello(wire.Hello(wire.RECEIVER, window=window))
        self._window = window
        self._batch = max(window // 4, 1)
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()
        self._crowd: Crowd[Giver] = Crowd(url, door, hello, self._make, self._lost)
        self._received = self._bytes = self._redelivered = self._duplicates = 0
        self._owing: set[Giver] = set()  # those with verdicts that are not told yet
        self._closed = False
        if first is not None:
            self._crowd.admit(first)
        if not self._crowd.connects:
            keeper.tend(self)

    @property
    def url(self) -> Url:
        return self._crowd.url

    @property
    def native(self) -> Any:
        return self._crowd.native

    # -- Intake ------------------------------------------------------------------------------------------------------

    def try_get(self) -> Parcel | None:
        with self._lock:
            self._crowd.check()
            parcel = self._next()
            if parcel is None:
                self._crowd.stir()
                parcel = self._next()
                if parcel is None:
                    self._tell_all()  # nothing to do but wait: a good moment
                    self._crowd.leave()
                    return None
            self._received += 1
            self._bytes += len(parcel.body)
            self._redelivered += bool(parcel.redelivered)
            self._crowd.leave()
            return parcel

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        if verdict is Verdict.EXTEND:
            return True  # nobody's time runs out here
        with self._lock:
            self._crowd.check()
            ticket: Ticket = parcel.token
            giver, ticket.giver = ticket.giver, None
            if giver is None:
                return True
            giver.session.settle(parcel.id, verdict is Verdict.ACK)
            if giver.lost:
                return True  # it will be sent again, and known again
            if verdict is Verdict.ACK:
                giver.acks.append(ticket.number)
            else:
                giver.nacks.append((ticket.number, delay))
            self._owing.add(giver)
            if len(giver.acks) >= self._batch:
                self._tell(giver)
            return True

    def try_flush(self) -> bool:
        with self._lock:
            self._crowd.check()
            done = self._tell_all()
            self._crowd.leave()
            return done

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
                "redelivered": self._redelivered,
                "duplicates": self._duplicates,
                "senders": len(self._crowd.members),
                "reconnects": self._crowd.reconnects,
            }

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tell_all()
            self._crowd.close()
        keeper.look()

    def abandon(self) -> None:
        self._crowd.abandon()

    # -- Tended: connections are accepted though nobody receives -----------------------------------------------------

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed:
                return None
            self._crowd.stir()
            self._crowd.arm()  # who is at the door; those whom we let in are for the user to try
            self._crowd.stir()
            self._crowd.leave()
            return self._crowd.quiet.wait()

    def lingers(self) -> bool:
        return False

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _make(self, link: Link) -> Giver:
        return Giver(link, Session(self._window))

    def _next(self) -> Parcel | None:
        crowd = self._crowd
        while (found := crowd.next_frame()) is not None:
            giver, frame = found
            try:
                kind = wire.kind_of(frame)
                if kind == wire.MESSAGE:
                    if (parcel := self._message(giver, frame)) is not None:
                        return parcel
                elif kind == wire.HELLO and not giver.number:
                    self._named(giver, wire.read_hello(frame, wire.SENDER).session)
                else:
                    raise wire.unexpected(frame)
            except errors.ProtocolError as error:
                if not crowd.connects:
                    crowd.send(giver, wire.refused(error.message))
                crowd.lose(giver, error)
        return None

    def _message(self, giver: Giver, frame: bytes) -> Parcel | None:
        parcel = wire.read_message(frame)
        giver.number += 1
        if giver.number - giver.settled > max(self._window, wire.FIRST):
            raise errors.ProtocolError("more messages than there is room for")
        session = giver.session
        ticket = Ticket(giver, giver.number)
        if parcel.id:
            held = session.open.get(parcel.id)
            if held is not None and held.giver is not giver:
                # The user has it: what they say about it goes over this link.
                held.giver, held.number = giver, giver.number
                self._duplicates += 1
                return None
            if held is not None or parcel.id in session:
                giver.acks.append(giver.number)
                self._owing.add(giver)
                self._duplicates += 1
                return None
        if parcel.id:
            session.open[parcel.id] = ticket
        parcel.token = ticket
        return parcel

    def _named(self, giver: Giver, name: bytes) -> None:
        session = self._sessions.pop(name, giver.session)
        self._sessions[name] = giver.session = session
        if len(self._sessions) > _SESSIONS:
            live = {each.session for each in self._crowd.members}
            for old in [old for old, each in self._sessions.items() if each not in live][:1]:
                del self._sessions[old]

    def _lost(self, giver: Giver, error: errors.IpcError) -> None:
        self._owing.discard(giver)

    # -- telling -----------------------------------------------------------------------------------------------------

    def _tell_all(self) -> bool:
        told = [self._tell(giver) for giver in tuple(self._owing)]  # each of them, whatever the others say
        gone = [self._crowd.flush(giver) for giver in tuple(self._crowd.members) if giver.unsent]
        return all(told) and all(gone)

    def _tell(self, giver: Giver) -> bool:
        crowd = self._crowd
        if giver.deaf:  # what it has not heard by now, it will never hear
            self._owing.discard(giver)
            return True
        if not giver.hailed:
            return False
        while giver.nacks:
            if not crowd.send(giver, wire.nack(*giver.nacks[0])):
                return giver.lost or giver.deaf
            del giver.nacks[0]
            giver.settled += 1
        if giver.acks:
            if not crowd.send(giver, wire.ack(giver.acks)):
                return giver.lost or giver.deaf
            giver.settled += len(giver.acks)
            giver.acks.clear()
        self._owing.discard(giver)
        return True
