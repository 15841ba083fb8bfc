"""The receiving side of a consumer group on Redis Streams: of queues, and of topics that a group shares.

Two connections. On `reading` an XREADGROUP BLOCK 0 is outstanding while there is room for messages (`prefetch`), so a
message is pushed as it is added. On `command` go the verdicts (XACK, pipelined, sent again after a loss) and, about once a
second, a *look* for what others left:

    given back, and due          nack() moves an entry to nobody, and into a sorted set by the time it is due
    of consumers that are gone   each registers the number of its reading connection; the server knows which are connected.
                                 A paused process is. After a restart of the server this waits until they registered again.
    not settled for `claim`      whoever holds it, unless extend() began its time anew

Each of these is one script, so that a kill between two steps loses nothing (see `_redis_scripts`). What was handed out
`max_deliver` times goes to the stream of dead letters instead. Messages that wait here, fetched and not handed out yet, are
extended; one whose time ran out anyway is dropped here, for somebody else may have it.

After a reconnection, what the server counts as ours and we never got is fetched again. A group that is gone (its stream was
evicted, flushed) is made again where we were, with the pauses of a lost connection.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .. import errors
from .._spi import Steps, Wait, Want
from ..message import Parcel, Verdict
from ._redis_address import Address, Native
from ._redis_line import Ear, Line, alive, cards_of, check_fsync, log, me, passes, register, soonest
from ._redis_log import LogOptions, lane_key, read_entry, side_key
from ._redis_orders import Order, Orders
from ._redis_scripts import CLAIM, EXTEND, NACK, TAIL
from ._redis_wire import Wire, Word, map_redis

_LOOK_EVERY = 1.0  # seconds, at most
_BYTES_AHEAD = 8 << 20  # of messages to come, judged by those that came
_PARTLY = 50  # ms that a read of some of the lanes takes at most
_ACKS = 64  # acknowledgements that one command carries


class _Held:
    """A parcel's token: an entry that is ours to settle."""

    __slots__ = ("buffered", "id", "lane", "settled", "since")

    def __init__(self, lane: _Lane, id: bytes, since: float) -> None:
        self.lane, self.id, self.since = lane, id, since
        self.buffered = True
        self.settled = False


class _Lane:
    """One stream, and what we have of it."""

    def __init__(self, name: str, priority: int, group: str, dead: str) -> None:
        self.key, self.priority, self.dead = lane_key(name, priority), priority, dead
        self.later = side_key(self.key, "later", group)
        self.readers = side_key(self.key, "readers", group)
        self.buffer = deque[Parcel]()
        self.held: dict[bytes, _Held] = {}  # fetched and not settled, here or in the user's hands
        self.acks: list[bytes] = []  # to be sent
        self.more = False  # with several lanes: the last read may have left some there
        self.floor: bytes | None = None  # the last entry that we know the group had


def _order(id: bytes) -> tuple[int, int]:
    head, _, tail = id.partition(b"-")
    return int(head), int(tail or 0)


class GroupIntake:
    """An Intake. One thread may receive while another settles."""

    def __init__(
        self,
        address: Address,
        options: LogOptions,
        group: str,
        *,
        lanes: int = 1,
        wanted: Callable[[str], bool] | None = None,
    ) -> None:
        """`wanted`: topics. With it, what was handed out is acknowledged when the next message is asked for."""
        self.native = Native(address.name, address)
        self._address, self._options, self._group = address, options, group
        self._ahead = options.ahead
        self._me = me()
        dead = options.dead or f"{address.name}:dead"
        self._lanes = [_Lane(address.name, lane, group, dead) for lane in reversed(range(lanes))]
        self._by_key = {lane.key.encode(): lane for lane in self._lanes}
        self._wanted = wanted
        self._open: list[Parcel] = []  # handed out, to be acknowledged for the user
        self._lock = threading.Lock()
        self._rx, self._tx = Ear(), Ear()
        self._reading = Line(address, self._enrol, self._reading_opened, self._rx)
        self._orders = Orders(address, self._prepare, self._look_soon, self._answered, self._rx, self._tx)
        self._asked = False
        self._asked_for: list[_Lane] = []
        self._asked_count = 0
        self._number = 0  # of our last reading connection
        self._run = ""  # the server's run that it belonged to
        self._large = 0.0  # bytes of the largest message, lately
        self._restart: str | None = None  # why the reading connection is to be made again
        self._looking: Steps[None] | None = None
        self._look_at = 0.0
        self._looked = 0.0  # into the reading connection
        self._extend_at = time.monotonic() + options.claim / 3
        self._error: errors.IpcError | None = None
        self._counts = dict.fromkeys(
            ("received", "bytes_received", "redelivered", "dead_letters", "trimmed", "overdue", "regrouped"), 0
        )

    def open(self) -> Steps[None]:
        try:
            yield from self._orders.line.open()
            yield from self._reading.open()
        except BaseException:
            self.close()
            raise

    # the connections

    def _prepare(self, wire: Wire) -> Steps[None]:
        if self._options.fsync is not None:
            yield from check_fsync(wire, self._address)
        for script in (CLAIM, NACK, EXTEND):
            yield from wire.ask("SCRIPT", "LOAD", script.text)

    def _look_soon(self) -> None:
        self._looking = None
        self._look_at = 0.0

    def _enrol(self, wire: Wire) -> Steps[None]:
        """Make the groups, say that we are there, and fetch what is ours and never reached us."""
        for script in (CLAIM, TAIL):
            yield from wire.ask("SCRIPT", "LOAD", script.text)
        run = self._reading.run
        if self._number and self._run == run:
            # Half dead, it could still be given messages in our name.
            with suppress(errors.IpcError):
                yield from wire.ask("CLIENT", "KILL", "ID", self._number)
        self._number, self._run = wire.number, run
        for lane in self._lanes:
            yield from self._make_group(wire, lane)
            yield from wire.ask("HSET", lane.readers, self._me, f"{run} {wire.number}")
            yield from self._recover(wire, lane)
        if self._wanted is not None:
            yield from register(wire, run, side_key(self._address.name, "readers"), self._me)

    def _make_group(self, wire: Wire, lane: _Lane) -> Steps[None]:
        start: str | bytes = {"all": "0", "new": "$"}.get(self._options.replay, self._options.replay)
        if lane.floor is not None:
            last, _ = yield from wire.ask("EVALSHA", TAIL.sha, 2, lane.key, side_key(lane.key, "count"))
            # From where we were; a log whose ids are lower is another one, of which nobody has read anything.
            start = lane.floor if _order(lane.floor) <= _order(last) or last == b"0-0" else "0"
        try:
            yield from wire.ask("XGROUP", "CREATE", lane.key, self._group, start, "MKSTREAM")
        except errors.IpcError as error:
            if "BUSYGROUP" not in error.message:
                raise
        else:
            if lane.floor is not None:
                self._counts["regrouped"] += 1
                log.warning("%s: the group %r was gone, and is made again", self._address.url, self._group)
        for group in (yield from wire.ask("XINFO", "GROUPS", lane.key)):
            facts = dict(zip(group[::2], group[1::2], strict=True))
            if facts[b"name"] == self._group.encode() and lane.floor is None:
                lane.floor = facts[b"last-delivered-id"]

    def _recover(self, wire: Wire, lane: _Lane) -> Steps[None]:
        # Not what the user has settled, and the server has not heard of yet: that goes on the other connection.
        settled = {*lane.acks, *(word for words in self._orders.flight for word in words)}
        start = "-"
        while True:
            mine = yield from wire.ask("XPENDING", lane.key, self._group, start, "+", 500, self._me)
            missing = [entry[0] for entry in mine if entry[0] not in lane.held and entry[0] not in settled]
            if missing:
                reply = yield from wire.ask(*self._claim(lane, len(missing), mine=missing))
                self._claimed(lane, reply)
            if len(mine) < 500:
                return
            start = "(" + mine[-1][0].decode()

    def _reading_opened(self, wire: Wire) -> None:
        self._asked = False

    def _ask(self) -> None:
        """Have an XREADGROUP outstanding for the lanes that have room."""
        wire = self._reading.ready()
        if wire is None or self._asked or self._error is not None:
            return
        ahead = self._ahead if self._large else 1  # the first one shows how large they are
        if self._large * ahead > _BYTES_AHEAD:
            ahead = max(int(_BYTES_AHEAD / self._large), 1)
        rooms = [ahead - len(lane.buffer) for lane in self._lanes]
        lanes = [lane for lane, room in zip(self._lanes, rooms, strict=True) if room > 0]
        if not lanes:
            return
        count = min(room for room in rooms if room > 0)
        keys = [lane.key for lane in lanes]
        self._asked, self._asked_for, self._asked_count = True, lanes, count
        words: Order = ("XREADGROUP", "GROUP", self._group, self._me, "COUNT", count)
        if not any(lane.more for lane in lanes):
            # A lane that is full now may have room later, and then must not wait for a message in another.
            words += ("BLOCK", 0 if len(lanes) == len(self._lanes) else _PARTLY)
        wire.tell(self._read, *words, "STREAMS", *keys, *(">" for _ in keys))
        self._reading.push()

    def _read(self, reply: Any) -> None:
        self._asked = False
        if isinstance(reply, Exception):
            if passes(reply) or str(reply).startswith(("NOGROUP", "OOM")):
                self._restart = f"the server says: {reply}"
            else:
                self._error = map_redis(reply, self._address.url, "recv")
                self._error.__cause__ = reply
            return
        now = time.monotonic()
        if now - self._looked > self._options.claim / 4:
            self._extend_at = 0.0  # nobody knows how long they have been lying in the socket
        for lane in self._asked_for:
            lane.more = False
        for key, entries in reply or ():
            lane = self._by_key[key]
            lane.more = len(self._lanes) > 1 and len(entries) == self._asked_count
            for number, fields in entries:
                lane.floor = number
                self._keep(lane, number, fields, 0, now)

    def _keep(self, lane: _Lane, number: bytes, fields: list[bytes], deliveries: int, now: float) -> None:
        known = lane.held.get(number)
        if known is not None and known.buffered:
            known.since = now
            return
        parcel, _ = read_entry(number, fields)
        if self._wanted is not None and not self._wanted(parcel.topic):
            lane.acks.append(number)
            return
        parcel.token = lane.held[number] = _Held(lane, number, now)
        parcel.priority, parcel.redelivered = lane.priority, deliveries
        self._large = max(len(parcel.body), self._large * 0.9, 1.0)
        lane.buffer.append(parcel)

    # receiving

    def try_get(self) -> Parcel | None:
        with self._lock:
            if self._open:
                for done in self._open:
                    self._settle(done, Verdict.ACK, 0.0)
                self._open.clear()
            now = time.monotonic()
            parcel = self._pop(now)
            if parcel is None or now >= self._look_at or self._looking is not None or self._restart is not None:
                self._turn(now)
                if parcel is None:
                    parcel = self._pop(now)
            self._send_acks()
            if parcel is None:
                if self._error is not None:
                    raise self._error
                self._ask()
                return None
            if self._ahead > 1 and not self._asked and self._low():
                self._ask()
            self._counts["received"] += 1
            self._counts["bytes_received"] += len(parcel.body)
            self._counts["redelivered"] += parcel.redelivered > 0
            if self._wanted is not None:
                self._open.append(parcel)
            if any(lane.buffer for lane in self._lanes):
                self._rx.ring()  # tasks that receive at once: there is more, and no descriptor says so any more
            return parcel

    def _low(self) -> bool:
        return any(len(lane.buffer) * 2 < self._ahead for lane in self._lanes)

    def _pop(self, now: float) -> Parcel | None:
        if now >= self._extend_at:
            self._extend_buffered(now)
        for lane in self._lanes:
            while lane.buffer:
                parcel = lane.buffer.popleft()
                held: _Held = parcel.token
                if held.settled:
                    continue
                held.buffered = False
                if now - held.since < self._options.claim * 0.9:
                    return parcel
                lane.held.pop(held.id, None)  # whose time ran out: by now it may be somebody else's
                self._counts["overdue"] += 1
            if lane.more:
                return None  # what is still there goes before the lanes below
        return None

    def _turn(self, now: float) -> None:
        """Both connections get further; a look begins when it is time, and goes on."""
        orders = len(self._orders.flight)
        self._reading.pump(unasked=True)
        self._looked = now
        if self._restart is not None:
            why, self._restart = self._restart, None
            self._reading.lose(why)
        self._orders.pump(self._tx)
        self._go_on_looking(now)
        if len(self._orders.flight) != orders:
            self._tx.ring()  # the look heard their replies

    def _go_on_looking(self, now: float) -> None:
        wire = self._orders.line.ready()
        if wire is None:
            return
        if self._looking is None and now >= self._look_at:
            pace = min(self._options.claim / 4, _LOOK_EVERY)
            self._look_at = now + pace * random.uniform(0.75, 1.0)
            self._looking = self._look(wire)
        if self._looking is not None:
            try:
                next(self._looking)
            except StopIteration:
                self._looking = None
                self._rx.ring()  # whoever armed meanwhile does not know when the next one is due
            except errors.PeerError as error:
                self._looking = None
                self._orders.line.lose(error)
            except errors.IpcError as error:
                self._looking = None  # NOGROUP: the reading connection mends it. Others: what reads will meet it too
                log.debug("%s: looking for what others left: %s", self._address.url, error.message)

    def _look(self, wire: Wire) -> Steps[None]:
        for lane in self._lanes:
            summary = yield from wire.ask("XPENDING", lane.key, self._group)
            cards = cards_of((yield from wire.ask("HGETALL", lane.readers)))
            cards.pop(self._me, None)
            gone, old = yield from alive(wire, self._orders.line.run, cards)
            room = self._ahead - len(lane.buffer)
            if room > 0 and (summary[0] or gone or old):
                before = len(lane.buffer)
                reply = yield from wire.ask(*self._claim(lane, room, gone, old))
                self._claimed(lane, reply)
                if len(lane.buffer) - before >= room:
                    self._look_at = 0.0

    def _claim(
        self,
        lane: _Lane,
        room: int,
        gone: Mapping[str, str] | None = None,
        old: Mapping[str, str] | None = None,
        mine: Sequence[Word] = (),
    ) -> Order:
        options = self._options
        keys = (lane.key, lane.later, lane.dead, lane.readers)
        terms = (self._group, self._me, room, int(options.claim * 1000), options.max_deliver)
        words: list[Word] = ["EVALSHA", CLAIM.sha, 4, *keys, *terms]
        for cards in (gone or {}, old or {}):
            words.append(len(cards))
            for card in cards.items():
                words += card
        return (*words, len(mine), *mine)

    def _claimed(self, lane: _Lane, reply: Any) -> None:
        entries, buried, vanished, due = reply
        now = time.monotonic()
        for number, fields, deliveries in entries:
            self._keep(lane, number, fields, deliveries, now)
        if buried:
            self._counts["dead_letters"] += buried
            log.warning("%s: %d messages became dead letters in %r", self._address.url, buried, lane.dead)
        if vanished:
            self._counts["trimmed"] += vanished
            log.warning("%s: %d messages were trimmed before they were acknowledged", self._address.url, vanished)
        if due >= 0:
            self._look_at = min(self._look_at, now + due / 1000)

    def _extend_buffered(self, now: float) -> None:
        self._extend_at = now + self._options.claim / 3
        for lane in self._lanes:
            if lane.buffer:
                waiting: list[_Held] = [parcel.token for parcel in lane.buffer]
                self._extend(lane, waiting)

    # settling

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        with self._lock:
            self._settle(parcel, verdict, delay)
            return True

    def _settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> None:
        held: _Held = parcel.token
        lane = held.lane
        if held.settled:
            return
        if verdict is Verdict.EXTEND:
            self._extend(lane, [held])
            return
        held.settled = True
        if lane.held.get(held.id) is held:
            del lane.held[held.id]
        if verdict is Verdict.ACK:
            lane.acks.append(held.id)
            if not self._orders.flight or len(lane.acks) >= _ACKS:
                self._send_acks()
        else:
            self._nack(lane, [held.id], delay, 0)
            self._look_at = min(self._look_at, time.monotonic() + delay)
            self._rx.ring()

    def _nack(self, lane: _Lane, ids: Sequence[bytes], delay: float, undo: int) -> None:
        milliseconds = min(int(max(delay, 0.0) * 1000 + 0.999), 1 << 42)
        keys = (lane.key, lane.later)
        self._orders.give(("EVALSHA", NACK.sha, 2, *keys, self._group, self._me, milliseconds, undo, *ids))

    def _extend(self, lane: _Lane, held: Sequence[_Held]) -> None:
        order: Order = ("EVALSHA", EXTEND.sha, 1, lane.key, self._group, self._me, *(one.id for one in held))
        if order in self._orders.flight:
            return  # the caller asks whether it is done
        now = time.monotonic()
        for one in held:
            one.since = now
        self._orders.give(order)

    def _send_acks(self) -> None:
        for lane in self._lanes:
            if lane.acks:
                self._orders.give(("XACK", lane.key, self._group, *lane.acks))
                lane.acks.clear()

    def _answered(self, order: Order, reply: Any) -> None:
        if isinstance(reply, list) and reply:  # of EXTEND
            self._lost(str(order[3]), reply)

    def _lost(self, key: str, ids: Sequence[bytes]) -> None:
        """Extended too late: what waits here is not handed out any more."""
        lane = self._by_key[key.encode()]
        for id in ids:
            held = lane.held.pop(id, None)
            self._counts["overdue"] += 1
            if held is not None and held.buffered:
                held.settled = True

    def try_flush(self) -> bool:
        with self._lock:
            self._send_acks()
            if self._orders.flight:
                self._orders.pump(self._rx)
                if self._orders.flight:
                    return False
            self._orders.check()
            return True

    def arm(self, want: Want) -> Wait:
        with self._lock:
            if want & Want.RECV:
                fds = (*self._reading.fds(), *self._orders.line.fds())
                look = max(self._look_at - time.monotonic(), 0.0) if self._looking is None else None
                return self._rx.wait(fds, soonest(look, self._reading.at_most(), self._orders.line.at_most()))
            return self._tx.wait(self._orders.line.fds(), self._orders.line.at_most())

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            lost = {"dropped": self._counts["trimmed"]} if self._wanted is not None else {}
            return self._counts | lost | {"reconnects": self._reading.reconnects + self._orders.line.reconnects}

    def close(self) -> None:
        """What waits here goes back as if it had never been fetched, what was handed out as handed out once more."""
        with suppress(errors.IpcError):
            self._reading.pump(unasked=True)
            self._send_acks()
            for lane in self._lanes:
                waiting = [parcel.token.id for parcel in lane.buffer if not parcel.token.settled]
                if waiting:
                    self._nack(lane, waiting, 0.0, 1)
                others = [held.id for held in lane.held.values() if not held.buffered]
                if others:
                    self._nack(lane, others, 0.0, 0)
        self._reading.close()
        self._orders.line.close()
        self._rx.close()
        self._tx.close()

    def abandon(self) -> None:
        self._reading.abandon()
        self._orders.line.abandon()
        self._rx.close()
        self._tx.close()
