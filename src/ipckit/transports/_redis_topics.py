"""Topics on a Redis Stream: everything that is published is in one log, with its topic in a field and a number that counts.

A publisher adds (see `_redis_log.Adding`). A subscriber without a group reads the log at its own pace with XREAD, and keeps what
its patterns match: patterns are matched here, so each subscriber is sent every topic. It goes on where it was after a
reconnection. A group shares the messages by `_redis_queue.GroupIntake`.

Nobody holds up a publisher, for the log takes all. What a log with `maxlen` or `maxage` trims is lost to who had not read it:
the numbers tell exactly how many, and the next message has them as its `gap` (of all topics, as what is gone has none). In a
group, where members take turns, only entries that were handed out and not acknowledged are counted ("trimmed").

`Tail` is also the audit of a queue: it reads along, and takes nothing away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors
from .._spi import PublishTerms, Steps, Wait, Want
from ..message import Parcel, Verdict
from ._redis_address import Address, Native
from ._redis_line import Ear, Line, alive, cards_of, check_fsync, log, me, passes, register, soonest
from ._redis_log import Adding, LogOptions, TopicOptions, read_entry, side_key
from ._redis_scripts import TAIL
from ._redis_wire import Wire, map_redis

_BYTES_AHEAD = 8 << 20  # of messages to come, judged by those that came
_COUNT_EVERY = 0.02  # seconds between two questions who is there, while somebody waits for the answer


class LogPublisher(Adding):
    """A Publishing."""

    def __init__(self, address: Address, options: TopicOptions, terms: PublishTerms) -> None:
        trims = options.maxlen is not None or options.maxage is not None
        if terms.retain:
            raise errors.Unsupported(
                "a log has no retained messages", url=address.url, hint="subscribe with ?replay=all, or an entry's id"
            )
        if terms.on_full in ("drop_new", "error"):
            raise errors.Unsupported(
                f"on_full={terms.on_full!r}: the log takes everything, and never knows who is behind",
                url=address.url,
                hint="on_full='drop_old' with maxlen= or maxage=, or 'block', which never has to",
            )
        if trims is not (terms.on_full == "drop_old"):
            raise errors.Unsupported(
                "maxlen= and maxage= drop what slow subscribers have not read" if trims else "nothing bounds this log",
                url=address.url,
                hint="on_full='drop_old' and maxlen= (or maxage=) go together",
            )
        super().__init__(address, options, counted=True)
        self._readers = side_key(address.name, "readers")
        self._there = 0
        self._counting: Steps[None] | None = None
        self._count_at = 0.0

    def _prepare(self, wire: Wire) -> Steps[None]:
        yield from super()._prepare(wire)
        self._counting = None
        yield from self._count(wire)

    def _count(self, wire: Wire) -> Steps[None]:
        cards = cards_of((yield from wire.ask("HGETALL", self._readers)))
        gone, old = yield from alive(wire, self.line.run, cards)
        self._there = len(cards) - len(gone) - len(old)

    def subscribers(self) -> int:
        now = time.monotonic()
        before = len(self._pending)
        self._turn()
        if len(self._pending) < before:
            self._ear.ring()
        wire = self.line.ready()
        if wire is not None:
            if self._counting is None and now >= self._count_at:
                self._count_at = now + _COUNT_EVERY
                self._counting = self._count(wire)
            if self._counting is not None:
                try:
                    next(self._counting)
                except StopIteration:
                    self._counting = None
                except errors.PeerError as error:
                    self._counting = None
                    self.line.lose(error)
        return self._there

    def arm(self, want: Want) -> Wait:
        wait = super().arm(want)
        if want & Want.RECV:
            return Wait(wait.fds, soonest(wait.at_most, max(self._count_at - time.monotonic(), 0.0)))
        return wait

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "subscribers": self._there, "dropped": 0}


class Tail:
    """An Intake that reads the log by itself. Its lane serialises its callers."""

    def __init__(self, address: Address, options: LogOptions, wanted: Callable[[str], bool] | None) -> None:
        self.native = Native(address.name, address)
        self._address, self._options, self._wanted = address, options, wanted
        self._ear = Ear()
        self._line = Line(address, self._enrol, self._opened, self._ear)
        self._ahead = options.ahead
        self._me = me()
        self._at: str | bytes | None = None if options.replay == "new" else "0"
        if options.replay not in ("all", "new"):
            self._at = options.replay
        self._count: int | None = None  # number of the last message we had
        self._gap = 0
        self._asked = False
        self._large = 0.0
        self._restart: str | None = None
        self._error: errors.IpcError | None = None
        self._buffer = deque[Parcel]()
        self._received = self._bytes = self._dropped = 0

    def open(self) -> Steps[None]:
        try:
            yield from self._line.open()
        except BaseException:
            self.close()
            raise

    def _enrol(self, wire: Wire) -> Steps[None]:
        if self._options.fsync is not None:
            yield from check_fsync(wire, self._address)
        if self._at is None:
            yield from wire.ask("SCRIPT", "LOAD", TAIL.text)
            counter = side_key(self._address.name, "count")
            self._at, self._count = yield from wire.ask("EVALSHA", TAIL.sha, 2, self._address.name, counter)
        if self._wanted is not None:
            readers = side_key(self._address.name, "readers")
            yield from register(wire, self._line.run, readers, self._me)

    def _opened(self, wire: Wire) -> None:
        self._asked = False
        self._ask()

    def _ask(self) -> None:
        wire = self._line.ready()
        room = self._ahead - len(self._buffer)
        if wire is None or self._asked or room <= 0 or self._error is not None or self._at is None:
            return
        if not self._large:
            room = 1  # the first one shows how large they are
        elif self._large * room > _BYTES_AHEAD:
            room = max(int(_BYTES_AHEAD / self._large), 1)
        self._asked = True
        wire.tell(self._read, "XREAD", "COUNT", room, "BLOCK", 0, "STREAMS", self._address.name, self._at)
        self._line.push()

    def _read(self, reply: Any) -> None:
        self._asked = False
        if isinstance(reply, Exception):
            if passes(reply):
                self._restart = f"the server says: {reply}"
            else:
                self._error = map_redis(reply, self._address.url, "recv")
                self._error.__cause__ = reply
            return
        for number, fields in reply[0][1] if reply else ():
            self._at = number
            parcel, count = read_entry(number, fields)
            if count is not None and self._wanted is not None:
                self._note(count)
            if self._wanted is None or self._wanted(parcel.topic):
                parcel.gap, self._gap = self._gap, 0
                self._large = max(len(parcel.body), self._large * 0.9, 1.0)
                self._buffer.append(parcel)

    def _note(self, count: int) -> None:
        if self._count is not None and count > self._count + 1:
            missed = count - self._count - 1
            self._gap += missed
            self._dropped += missed
        elif self._count is not None and count <= self._count:
            log.warning("%s: the log counts anew; how many messages were lost nobody knows", self._address.url)
        self._count = count

    def try_get(self) -> Parcel | None:
        if not self._buffer:
            self._line.pump(unasked=True)
            if self._restart is not None:
                why, self._restart = self._restart, None
                self._line.lose(why)
        if not self._asked and len(self._buffer) * 2 <= self._ahead:
            self._ask()
        if not self._buffer:
            if self._error is not None:
                raise self._error
            return None
        parcel = self._buffer.popleft()
        if self._buffer:
            self._ear.ring()  # tasks that receive at once: there is more, and no descriptor says so any more
        self._received += 1
        self._bytes += len(parcel.body)
        return parcel

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        if verdict is Verdict.NACK:
            raise errors.Unsupported(
                "nobody hands out a log again", url=self._address.url, operation="nack", hint="read with a group="
            )
        return True

    def try_flush(self) -> bool:
        return True

    def arm(self, want: Want) -> Wait:
        return self._ear.wait(self._line.fds(), self._line.at_most())

    def counters(self) -> Mapping[str, int]:
        return {
            "received": self._received,
            "bytes_received": self._bytes,
            "dropped": self._dropped,
            "reconnects": self._line.reconnects,
        }

    def close(self) -> None:
        self._line.close()
        self._ear.close()

    def abandon(self) -> None:
        self._line.abandon()
        self._ear.close()
