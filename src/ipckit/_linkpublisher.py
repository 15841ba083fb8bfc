"""The publishing side over links: encoded once, given to everybody whose patterns cover the topic.

What a subscriber's link has no room for waits in a queue of its own, bounded, and `on_full` says what happens at the bound. What
is dropped is counted, and the next message to that subscriber carries the count (the last one of all, END, the rest): what it
received and what it was told of is exactly what was published to it.

The keeper's thread lets subscribers in, hears of their end and empties the queues, so that a publisher that is silent, or closed,
still delivers.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from . import _linkwire as wire
from . import errors
from ._linkcrowd import Crowd, Member
from ._linkkeeper import LINGER, keeper
from ._spi import Link, Listener, PublishTerms, Wait, Want
from ._url import Url
from .message import Parcel, compiled

_log = logging.getLogger("ipckit")
_MOST_BYTES = 64 << 20  # in one subscriber's queue; one message may always be
_PATTERNS = 1000
_TOPICS = 4096  # of which it is remembered who gets them


class Reader(Member):
    """A subscriber: what it wants, and what waits for it."""

    def __init__(self, link: Link) -> None:
        super().__init__(link)
        self.patterns: list[Callable[[str], bool]] = []
        self.group: str | None = None
        self.queue: deque[tuple[bytes, int]] = deque()  # frames, each with the gap before it
        self.bytes = 0
        self.gap = 0  # after all that is in the queue
        self.last: bytes | None = None  # END, when everything else has gone

    def wants_topic(self, topic: str) -> bool:
        return any(pattern(topic) for pattern in self.patterns)

    @property
    def behind(self) -> bool:
        return bool(self.queue) or self.unsent or self.last is not None


class LinkPublisher:
    """`Publishing`, and `Tended` by the keeper."""

    def __init__(
        self,
        url: Url,
        listener: Listener,
        terms: PublishTerms,
        backlog: int,
        limit: int,
        handed_over: bool,
        first: Link | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._url = url
        self._handed_over = handed_over  # what a link took survives its close; else the subscriber has to close first
        self._terms, self._backlog, self._limit = terms, backlog, limit
        self._crowd: Crowd[Reader] = Crowd(url, listener, b"", Reader, self._lost, reads=False)
        self._audience: dict[str, tuple[list[Reader], list[deque[Reader]]]] = {}  # by topic; rebuilt when they change
        self._groups: dict[str, deque[Reader]] = {}
        self._retained: dict[str, deque[tuple[int, bytes]]] = {}
        self._order = itertools.count()
        self._sent = self._bytes = self._dropped = 0
        self._watched = False  # the keeper knows that somebody is behind
        self._deadline: float | None = None  # closed, and lingering
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

    # -- Publishing --------------------------------------------------------------------------------------------------

    def try_put(self, parcel: Parcel) -> bool:
        frame = wire.message(parcel)
        if len(frame) > self._limit:
            raise errors.MessageTooLarge(
                f"{len(frame)} bytes with its header, and {self._limit} is the limit",
                url=self._url,
                operation="publish",
                hint="limit= raises it, at both ends",
            )
        with self._lock:
            self._check()
            single, groups = self._audience.get(parcel.topic) or self._find(parcel.topic)
            readers = single + [self._of_group(group) for group in groups] if groups else single
            if self._terms.on_full in ("block", "error"):
                full = [reader for reader in readers if self._full(reader, len(frame)) and not self._pumped(reader)]
                if full and self._terms.on_full == "error":
                    raise errors.QueueFull(
                        f"{len(full)} subscribers do not keep up", url=self._url, operation="publish"
                    )
                if full:
                    return False
            for reader in tuple(single):
                self._offer(reader, frame)
            for group in groups:
                self._offer_group(group, frame)
            if self._terms.retain:
                last = self._retained.setdefault(parcel.topic, deque(maxlen=self._terms.retain))
                last.append((next(self._order), frame))
            self._sent += 1
            self._bytes += len(parcel.body)
            return True

    def try_flush(self) -> bool:
        """With on_full=block, when everybody's link has taken everything; else at once: the keeper goes on."""
        with self._lock:
            self._check()
            behind = [reader for reader in tuple(self._crowd.members) if reader.behind and not self._pumped(reader)]
            if behind and not self._watched:
                self._watched = True
                keeper.look()
            return not behind or self._terms.on_full != "block"

    def subscribers(self) -> int:
        with self._lock:
            self._check()
            return sum(reader.greeted for reader in self._crowd.members)

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check()
            self._crowd.arm()
            return self._crowd.sleep(want)

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return {
                "sent": self._sent,
                "bytes_sent": self._bytes,
                "dropped": self._dropped,
                "subscribers": sum(reader.greeted for reader in self._crowd.members),
                "queued": sum(len(reader.queue) for reader in self._crowd.members),
            }

    def close(self) -> None:
        """Nobody new is let in; what waits for subscribers still goes out, for a while."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._crowd.shut_door()
            self._deadline = time.monotonic() + LINGER
            for reader in tuple(self._crowd.members):
                if reader.greeted:
                    reader.last = wire.end(reader.gap)
                else:
                    self._crowd.dismiss(reader)
            self._wind_up()
        keeper.look()

    def abandon(self) -> None:
        self._crowd.abandon()

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self._url)

    # -- Tended ------------------------------------------------------------------------------------------------------

    def tend(self) -> Wait | None:
        with self._lock:
            for _ in self._crowd.rounds():
                if not self._closed:
                    self._round()
                elif not self._wind_up():
                    return None
            self._crowd.wake()
            return self._crowd.watch.wait(0 if self._crowd.restless else self._deadline)

    def lingers(self) -> bool:
        return self._deadline is not None

    def _round(self) -> None:
        self._listen()
        behind = [reader for reader in tuple(self._crowd.members) if reader.behind and not self._pumped(reader)]
        self._watched = bool(behind)

    def _wind_up(self) -> bool:
        """Whether there is still somebody to deliver to."""
        if self._deadline is None:
            return False
        self._listen()
        for reader in tuple(self._crowd.members):
            if self._pumped(reader) and self._handed_over:
                self._crowd.dismiss(reader)
        if self._crowd.members and time.monotonic() < self._deadline:
            return True
        for reader in self._crowd.members:
            lost = len(reader.queue) + (
                reader.unsent and self._handed_over
            )  # elsewhere, what a link has may still arrive
            self._dropped += lost
            if lost:
                _log.warning("%s: closed, and a subscriber that does not receive lost %d messages", self._url, lost)
        self._deadline = None
        self._crowd.close()
        return False

    # -- giving ------------------------------------------------------------------------------------------------------

    def _full(self, reader: Reader, size: int) -> bool:
        return len(reader.queue) >= self._backlog or (bool(reader.queue) and reader.bytes + size > _MOST_BYTES)

    def _offer(self, reader: Reader, frame: bytes) -> None:
        if not reader.queue and self._sent_now(reader, frame, reader.gap):
            reader.gap = 0
            return
        if reader.lost:
            return
        while self._full(reader, len(frame)):
            self._dropped += 1
            if self._terms.on_full == "drop_new":
                reader.gap += 1
                return
            old, gap = reader.queue.popleft()
            reader.bytes -= len(old)
            self._missed(reader, gap + 1)
        reader.queue.append((frame, reader.gap))
        reader.bytes += len(frame)
        reader.gap = 0

    def _offer_group(self, group: deque[Reader], frame: bytes) -> None:
        while group:
            reader = self._of_group(group)
            self._offer(reader, frame)
            if not reader.lost:
                group.rotate(-1)
                return
            group.remove(reader)

    def _missed(self, reader: Reader, count: int) -> None:
        """So many are missing right before what is first in its queue now."""
        if reader.queue:
            frame, gap = reader.queue[0]
            reader.queue[0] = frame, gap + count
        else:
            reader.gap += count

    def _sent_now(self, reader: Reader, frame: bytes, gap: int) -> bool:
        try:
            return self._crowd.send(reader, wire.with_gap(frame, gap))
        except errors.MessageTooLarge as error:  # its own limit is lower than ours
            _log.warning("%s: a subscriber does not get a message: %s", self._url, error.message)
            self._dropped += 1
            self._missed(reader, gap + 1)
            return True

    def _pumped(self, reader: Reader) -> bool:
        """Whether this reader has everything."""
        while reader.queue:
            frame, gap = reader.queue.popleft()
            if not self._sent_now(reader, frame, gap):
                reader.queue.appendleft((frame, gap))
                return reader.lost
            reader.bytes -= len(frame)
        if reader.last is not None:
            reader.last = wire.end(reader.gap)
            if not self._crowd.send(reader, reader.last):
                return reader.lost
            reader.last = None
        return self._crowd.flush(reader)

    # -- who gets what -----------------------------------------------------------------------------------------------

    def _find(self, topic: str) -> tuple[list[Reader], list[deque[Reader]]]:
        single = [r for r in self._crowd.members if r.greeted and r.group is None and r.wants_topic(topic)]
        groups = [deque(r for r in members if r.wants_topic(topic)) for members in self._groups.values()]
        if len(self._audience) >= _TOPICS:
            self._audience.clear()
        found = self._audience[topic] = single, [group for group in groups if group]
        return found

    def _of_group(self, group: deque[Reader]) -> Reader:
        """The next one in turn that keeps up, or just the next one."""
        for _ in range(len(group)):
            if not group[0].queue:
                break
            group.rotate(-1)
        return group[0]

    def _lost(self, reader: Reader, error: errors.IpcError) -> None:
        self._audience.clear()
        if reader.group is not None and reader in self._groups.get(reader.group, ()):
            self._groups[reader.group].remove(reader)
            if not self._groups[reader.group]:
                del self._groups[reader.group]

    # -- hearing -----------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        self._crowd.stir()
        while (found := self._crowd.next_frame()) is not None:
            reader, frame = found
            try:
                if wire.kind_of(frame) != wire.HELLO or reader.greeted:
                    raise wire.unexpected(frame)
                self._welcome(reader, wire.read_hello(frame, wire.SUBSCRIBER))
            except errors.ProtocolError as error:
                self._crowd.send(reader, wire.refused(error.message))
                self._crowd.lose(reader, error)

    def _welcome(self, reader: Reader, hello: wire.Hello) -> None:
        if not 1 <= len(hello.topics) <= _PATTERNS or not all(hello.topics):
            raise errors.ProtocolError(f"{len(hello.topics)} patterns, or empty ones")
        reader.patterns = [compiled(pattern) for pattern in hello.topics]
        reader.greeted = True
        self._audience.clear()
        reader.queue.append((wire.hello(wire.Hello(wire.PUBLISHER)), 0))
        first = hello.group is None
        if hello.group is not None:
            reader.group = hello.group
            first = hello.group not in self._groups
            self._groups.setdefault(hello.group, deque()).append(reader)
        if first:
            last = [each for topic, kept in self._retained.items() if reader.wants_topic(topic) for each in kept]
            reader.queue.extend((frame, 0) for _, frame in sorted(last))
        reader.bytes = sum(len(frame) for frame, _ in reader.queue)
        self._pumped(reader)
