"""What queues and topics on Redis Streams have in common: the options, how a message is an entry, how one is added.

An entry's fields are, in this order: `n` (published messages: their number), `body`, `id`, `topic` (of published ones), then
the headers under their own names. Entries that others added are read too: without `body`, what `data` holds is the body, and
without `id`, the entry's own id is the message's.

`Adding` is the sending side. Each message is one call of a script that adds it unless its id was added before; what was not
acknowledged when the connection broke is sent again on the next one, with the same ids, in the same order. So a message is in
the log once or, if the user gave up waiting (OutcomeUnknown), at most once; and sending it again with its id stays harmless
for as long as the server remembers ids (`dedup=`). What was sent longer ago than that, and never confirmed, is not sent again:
nobody can tell any more, so it is raised as OutcomeUnknown.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import _options, errors
from .._options import choice, integer, lasting, option, text
from .._spi import Steps, Wait, Want
from ..message import Parcel
from ._redis_address import Address, Native, PlaceOptions
from ._redis_line import Ear, Line, check_fsync, passes
from ._redis_scripts import Script, add
from ._redis_wire import Wire, Word, map_redis

MAX_LANES = 16
_MAX_HELD = 4 << 20  # bytes without an acknowledgement
_MAX_WAITING = 8192  # messages without an acknowledgement
_RESERVED = frozenset({"body", "id", "topic", "n"})
_ENTRY_ID = re.compile(r"\d{1,20}(-\d{1,20})?\Z")


class Length(NamedTuple):
    """How many entries a log keeps; roughly, in whole nodes of the server's memory, unless exact."""

    entries: int
    exact: bool


def _length(written: str) -> Length:
    exact = not written.startswith("~")
    return Length(integer(1, 1 << 40)(written.lstrip("~")), exact)


def _start(written: str) -> str:
    if written not in ("all", "new") and not _ENTRY_ID.match(written):
        raise ValueError("all, new, or the id of an entry, after which it begins")
    return written


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions(PlaceOptions):
    replay: str = option("all", _start, "where a new group begins: all, new, or after the entry with this id")
    maxlen: Length | None = option(  # noqa: RUF009 - a field, as all of them
        None, _length, "sender: entries the log keeps; ~N trims roughly, and faster"
    )
    maxage: float | None = option(None, lasting(0.01), "sender: how long the log keeps entries")
    dedup: float = option(120.0, lasting(0.01), "sender: how long the server remembers the ids of messages")
    prefetch: int | None = option(
        None, integer(1, 1 << 16), "receiver: messages fetched before they are asked for: 32, and 1 with max_deliver"
    )
    claim: float = option(30.0, lasting(0.01), "receiver: after which a message nobody settled is handed out again")
    max_deliver: int = option(0, integer(0, 1 << 30), "receiver: hand-outs after which it is a dead letter; 0: never")
    dead: str | None = option(None, text, "receiver: the stream of the dead letters, instead of NAME:dead")
    fsync: str | None = option(None, choice("always"), "always: refuse a server that acknowledges before it syncs")

    @property
    def ahead(self) -> int:
        """What a killed receiver has fetched counts as handed out. So with `max_deliver` no more than one is: a message that
        kills its receivers would take those behind it along, into the dead letters.
        """
        return self.prefetch or (1 if self.max_deliver else 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions(LogOptions):
    lanes: int = option(1, integer(1, MAX_LANES), "priorities 0 to N-1, each with a stream of its own")
    audit: bool = option(False, _options.flag, "receiver: read along, outside of all groups")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicOptions(LogOptions):
    replay: str = option("new", _start, "where a subscriber or new group begins: all, new, or after this entry")


def lane_key(name: str, lane: int) -> str:
    return f"{name}:{lane}" if lane else name


def side_key(key: str, *parts: str) -> str:
    return ":".join((f"ipckit:{{{key}}}", *parts))


def read_entry(number: bytes, fields: list[bytes]) -> tuple[Parcel, int | None]:
    """The message, and its number if it has one."""
    count, at = None, 0
    if len(fields) >= 6 and fields[0] == b"n" and fields[1].isdigit():
        count, at = int(fields[1]), 2
    if len(fields) >= at + 4 and fields[at] == b"body" and fields[at + 2] == b"id":
        parcel = Parcel(fields[at + 1], fields[at + 3].decode(errors="replace"))
        at += 4
        if len(fields) > at:
            headers = {
                fields[i].decode(errors="replace"): fields[i + 1].decode(errors="replace")
                for i in range(at, len(fields) - 1, 2)
            }
            parcel.topic = headers.pop("topic", "")
            parcel.headers = headers
        return parcel, count
    found = dict(zip(fields[::2], fields[1::2], strict=False))
    body = found.pop(b"body", None)
    if body is None:
        body = found.pop(b"data", b"")
    id = found.pop(b"id", number).decode(errors="replace")
    headers = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in found.items()}
    return Parcel(body, id, headers, topic=headers.pop("topic", "")), count


# -- adding ---------------------------------------------------------------------------------------------------------------


class _Pending:
    __slots__ = ("parcel", "since", "size", "words")

    def __init__(self, words: tuple[Word, ...], parcel: Parcel) -> None:
        self.words, self.parcel, self.size = words, parcel, len(parcel.body)
        self.since: float | None = None  # when the server may have heard of it first


class Adding:
    """An Outlet. Its lane serialises its callers."""

    def __init__(self, address: Address, options: LogOptions, *, lanes: int = 1, counted: bool = False) -> None:
        self.native = Native(address.name, address)
        self._address, self._options, self._lanes = address, options, lanes
        self._topics = counted
        self._keys = [lane_key(address.name, lane) for lane in range(lanes)]
        self._sent_key = side_key(address.name, "sent", "")
        self._count_key = side_key(address.name, "count")
        length, age = options.maxlen, options.maxage
        self._script: Script = add(
            dedup=int(options.dedup * 1000),
            exact=length is not None and length.exact,
            maxlen=None if length is None else length.entries,
            maxage=None if age is None else int(age * 1000),
            counted=counted,
        )
        self._ear = Ear()
        self.line = Line(address, self._prepare, self._opened, self._ear)
        self._pending = deque[_Pending]()
        self._held = 0
        self._again: Exception | None = None  # why what is pending must be sent once more
        self._sent = self._bytes = self._known = 0

    def open(self) -> Steps[None]:
        try:
            yield from self.line.open()
        except BaseException:
            self.close()
            raise

    def _prepare(self, wire: Wire) -> Steps[None]:
        if self._options.fsync is not None:
            yield from check_fsync(wire, self._address)
        yield from wire.ask("SCRIPT", "LOAD", self._script.text)

    def _opened(self, wire: Wire) -> None:
        # Two clocks: the server forgets an id by its own.
        too_old = time.monotonic() - self._options.dedup * 0.9
        for pending in tuple(self._pending):
            if pending.since is not None and pending.since < too_old:
                self._pending.remove(pending)
                self._held -= pending.size
                pending.parcel.failure = errors.OutcomeUnknown(
                    "sent, and not confirmed for so long that the server may have forgotten its id",
                    url=self._address.url,
                    operation="send",
                    message_id=pending.parcel.id,
                    hint="look whether it is there before you send it again; dedup= says how long ids are remembered",
                )
            else:
                self._tell(wire, pending)

    def _tell(self, wire: Wire, pending: _Pending) -> None:
        if pending.since is None:
            pending.since = time.monotonic()
        wire.tell(self._added, *pending.words)

    def try_put(self, parcel: Parcel) -> bool:
        if self._held >= _MAX_HELD or len(self._pending) >= _MAX_WAITING:
            self._turn()
            if self._held >= _MAX_HELD or len(self._pending) >= _MAX_WAITING:
                return False
        wire = self.line.ready()
        pending = _Pending(self._words(parcel), parcel)
        self._pending.append(pending)
        self._held += pending.size
        if wire is not None:
            self._tell(wire, pending)
            if len(self._pending) == 1 or wire.held >= 64 << 10:
                self.line.push()
        return True

    def _words(self, parcel: Parcel) -> tuple[Word, ...]:
        url = self._address.url
        if len(parcel.body) > self._options.limit:
            raise errors.MessageTooLarge(
                f"{len(parcel.body)} bytes, the limit is {self._options.limit}", url=url, hint="limit= in the URL"
            )
        if not 0 <= parcel.priority < self._lanes:
            raise errors.Unsupported(
                f"there is no lane for priority {parcel.priority}, and there are {self._lanes}",
                url=url,
                operation="send",
                hint=f"lanes={min(max(parcel.priority, 1) + 1, MAX_LANES)} at every sender and receiver",
            )
        fields: list[Word] = ["body", parcel.body, "id", parcel.id]
        if self._topics:
            fields += ("topic", parcel.topic)
        elif parcel.topic:
            raise errors.Unsupported("a queue has no topics", url=url)
        if parcel.headers:
            for name, value in parcel.headers.items():
                if name in _RESERVED:
                    raise errors.Unsupported(
                        f"a header cannot be called {name!r} here", url=url, operation="send", hint="take another name"
                    )
                fields += (name, value)
        keys: tuple[Word, ...] = (self._keys[parcel.priority], self._sent_key + parcel.id)
        if self._topics:
            keys += (self._count_key,)
        return ("EVALSHA", self._script.sha, len(keys), *keys, *fields)

    def _added(self, reply: Any) -> None:
        if self._again is not None:
            return  # that one is still pending, so this is: it is sent again, and the server knows its id
        if isinstance(reply, Exception) and passes(reply):
            self._again = reply
            return
        pending = self._pending.popleft()
        self._held -= pending.size
        if isinstance(reply, Exception):
            pending.parcel.failure = map_redis(reply, self._address.url, "send")
            pending.parcel.failure.__cause__ = reply
        else:
            self._sent += 1
            self._bytes += pending.size
            self._known += reply == 0

    def _turn(self) -> None:
        before = len(self._pending)
        self.line.pump(unasked=True)
        if before > 1 and len(self._pending) < before:
            self._ear.ring()  # tasks that share this sender: what we heard may have been for another, who sleeps
        if self._again is not None:
            why, self._again = self._again, None
            self.line.lose(f"the server says: {why}")

    def try_flush(self) -> bool:
        if self._pending:
            self._turn()
        return not self._pending

    def arm(self, want: Want) -> Wait:
        return self._ear.wait(self.line.fds(), self.line.at_most())

    def counters(self) -> Mapping[str, int]:
        return {
            "sent": self._sent,
            "bytes_sent": self._bytes,
            "unconfirmed": len(self._pending),
            "deduplicated": self._known,
            "reconnects": self.line.reconnects,
        }

    def close(self) -> None:
        self.line.close()
        self._ear.close()

    def abandon(self) -> None:
        self.line.abandon()
        self._ear.close()
