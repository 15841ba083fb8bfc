"""Topics on NATS: durable on a JetStream stream, or with `durable=0` on core NATS.

    durable    topic eu.paris of nats://host/prices is the subject prices.eu.paris of the stream `prices`. A subscriber reads
               the log at its own pace: nobody holds anybody up, and only the stream's own limits (`maxlen=` ...) drop
               something. group=None: a consumer of our own, made anew after each loss right behind what we have seen;
               a group: one durable consumer that its subscribers share, acknowledged when the next is asked for.
    durable=0  the same subjects without a stream. What the server drops for a slow subscriber is dropped for ever.

What was missed is counted: on the whole stream by its sequence numbers; under a pattern, and without a stream, by the number
that each publisher gives its messages on each subject (header `Ipckit-From`). In a group nobody can tell what others have got.

Who is there is asked aloud (`_Roll`): the publisher calls on `ipckit.who.<stream>`, and each subscriber answers; one that
comes says so on `ipckit.here.<stream>`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors
from .._spi import Intake, Publishing, PublishTerms, Steps, TopicTerms, Wait, Want
from .._url import Url
from ..message import Parcel, Verdict, matches
from ._bridge import Bell
from ._jetstream import (
    Jet,
    TopicOptions,
    beginning,
    command,
    ensure_stream,
    group_name,
    open_jet,
    opening,
    stream_name,
)
from ._nats_queue import (
    Delivery,
    JetOutlet,
    Pull,
    delivery_facts,
    header_block,
    join,
    parcel_of,
    prefetch_of,
)

FROM = "Ipckit-From"
_ASK_EVERY = 0.2  # seconds between two roll calls while somebody waits for subscribers
_PRESENT = 2.5  # seconds for which an answer counts; an idle subscriber's loop is turned once a second
_BACKLOG = 65536  # messages that a subscriber of core NATS keeps; further ones are dropped, and seen as a gap
_WRITTEN = 4 << 20  # bytes on their way to the socket before a publisher of core NATS waits
_NUMBERS = 100_000  # subjects whose numbers are remembered
_INACTIVE = 300 * 10**9  # ns after which the server drops a consumer whose subscriber was killed


def _covers(pattern: str, other: str) -> bool:
    """Whether all that the other pattern brings comes with this one."""
    return matches(pattern, other) and (pattern.endswith(">") or not other.endswith(">"))


def _overlap(one: str, other: str) -> bool:
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if ">" in (a, b):
            return True
        if "*" not in (a, b) and a != b:
            return False
    return one.count(".") == other.count(".")


def subjects_of(stream: str, topics: tuple[str, ...]) -> tuple[list[str], bool]:
    """Subjects that bring each wanted message once, and whether they bring others as well. Nothing: the whole stream."""
    wanted: list[str] = []
    for topic in sorted(set(topics), key=lambda topic: (">" not in topic, "*" not in topic)):
        if not any(_covers(other, topic) for other in wanted):
            wanted = [other for other in wanted if not _covers(topic, other)] + [topic]
    if ">" in wanted:
        return [], False
    # For us eu.> has eu itself as well.
    wanted += [topic[:-2] for topic in wanted if topic.endswith(".>")]
    if any(_overlap(a, b) for i, a in enumerate(wanted) for b in wanted[:i]):
        return [], True
    return [f"{stream}.{topic}" for topic in wanted], False


class _Numbers:
    """The publisher's side of `Ipckit-From`: <publisher> <number on this subject>."""

    def __init__(self) -> None:
        self._publisher = ""
        self._numbers: dict[str, int] = {}

    def line(self, subject: str) -> str:
        if not self._publisher or len(self._numbers) >= _NUMBERS:
            # Begin again as another publisher, rather than grow for ever.
            self._publisher, self._numbers = secrets.token_hex(6), {}
        number = self._numbers[subject] = self._numbers.get(subject, 0) + 1
        return f"{FROM}: {self._publisher} {number}\r\n"


class _Gaps:
    """The subscriber's side."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}
        self.dropped = 0

    def before(self, message: Any) -> int:
        """How many were missed right before this one."""
        publisher, _, text = (message.headers or {}).get(FROM, "").partition(" ")
        if not text.isdecimal():
            return 0
        if len(self._last) >= _NUMBERS:
            self._last.clear()
        key, number = (publisher, message.subject), int(text)
        last = self._last.get(key)
        self._last[key] = number
        gap = 0 if last is None else max(number - last - 1, 0)
        self.dropped += gap
        return gap


# -- who is there ---------------------------------------------------------------------------------------------------


class _Roll:
    """The publisher calls; who answers is there."""

    def __init__(self, jet: Jet, stream: str) -> None:
        self._jet = jet
        self._news = f"ipckit.here.{stream}"
        self._call = command(f"ipckit.who.{stream}", f"{jet.inbox}.w", b"")
        self._asked = 0.0
        self._seen: dict[bytes, float] = {}
        self.changed: Callable[[], None] = lambda: None

    async def start(self) -> None:
        await self._jet.connection.tap(f"{self._jet.inbox}.w", self._answer)
        await self._jet.connection.tap(self._news, self._answer)
        await self._jet.connection.round_trip()

    def _answer(self, message: Any) -> None:
        name: bytes = message.data
        if name[:1] == b"-":
            self._seen.pop(name[1:], None)
        elif 0 < len(name) <= 64:  # nothing: the server says that nobody is there
            self._seen[name] = time.monotonic()
        self.changed()

    def count(self) -> int:
        now = time.monotonic()
        if now - self._asked > _ASK_EVERY:
            self._asked = now
            self._jet.home.do(lambda: self._jet.connection.write(self._call))
        else:
            self._jet.home.turn()
        return self.present()

    def present(self) -> int:
        now = time.monotonic()
        return sum(now - seen < _PRESENT for seen in tuple(self._seen.values()))


class _Here:
    """The subscriber's announcement, its answers, and its goodbye to those who have called."""

    def __init__(self, jet: Jet, stream: str) -> None:
        self._jet = jet
        self._stream = stream
        self._name = secrets.token_hex(8).encode()
        self._callers = deque[str](maxlen=16)

    async def start(self) -> None:
        await self._jet.connection.tap(f"ipckit.who.{self._stream}", self._called)
        await self._jet.connection.round_trip()
        self._jet.connection.write(command(f"ipckit.here.{self._stream}", "", self._name))

    def _called(self, message: Any) -> None:
        if message.reply:
            self._jet.connection.write(command(message.reply, "", self._name))
            if message.reply not in self._callers:
                self._callers.append(message.reply)

    def goodbye(self) -> None:
        self._jet.connection.write(b"".join(command(caller, "", b"-" + self._name) for caller in self._callers))


# -- publishers -----------------------------------------------------------------------------------------------------


class _DurablePublisher(JetOutlet):
    """A queue's sender, to the subject of the topic."""

    def __init__(self, jet: Jet, stream: str, limit: int, dedup: float, terms: PublishTerms) -> None:
        numbers = _Numbers()

        def subject(parcel: Parcel) -> tuple[str, str]:
            name = f"{stream}.{parcel.topic}" if parcel.topic else stream
            return name, numbers.line(name)

        super().__init__(jet, subject, limit, dedup, terms.on_full)
        self._roll = _Roll(jet, stream)
        self._news = Bell(jet.home)
        self._roll.changed = self._news.ring

    async def start(self) -> None:
        await self._roll.start()
        await super().start()

    def subscribers(self) -> int:
        self._jet.check("wait_for_subscribers")
        return self._roll.count()

    def arm(self, want: Want) -> Wait:
        if want & Want.RECV:
            return self._news.arm()._replace(at_most=_ASK_EVERY)
        return super().arm(want)

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "subscribers": self._roll.present()}

    def close(self) -> None:
        super().close()
        self._news.close()

    def abandon(self) -> None:
        super().abandon()
        self._news.close()


class _CorePublisher:
    """A Publishing that keeps nothing. What is written is the server's, and the server keeps nothing either."""

    def __init__(self, jet: Jet, stream: str, options: TopicOptions) -> None:
        self._jet = jet
        self._stream = stream
        self._limit = options.limit
        self._numbers = _Numbers()
        self._held: list[bytes] = []
        self._bytes = 0
        self._bell = Bell(jet.home)
        self._counters = {"sent": 0, "bytes_sent": 0, "dropped": 0}
        self._roll = _Roll(jet, stream)
        self._roll.changed = self._bell.ring
        jet.connection.mailboxes.add(self)

    async def start(self) -> None:
        await self._roll.start()

    @property
    def native(self) -> Any:
        return self._jet.client

    def ring(self) -> None:
        self._bell.ring()

    def try_put(self, parcel: Parcel) -> bool:
        if not self._jet.up or self._jet.connection.unwritten > _WRITTEN:
            self._jet.home.turn()
            self._jet.check("publish")
            return False
        subject = f"{self._stream}.{parcel.topic}" if parcel.topic else self._stream
        headers = header_block(parcel.id, parcel.headers, self._numbers.line(subject))
        most = min(self._limit, self._jet.client.max_payload - len(headers))
        if len(parcel.body) > most:
            raise errors.MessageTooLarge(
                f"{len(parcel.body)} bytes, and the limit is {most}", url=self._jet.url, operation="publish"
            )
        frame = command(subject, "", parcel.body, headers)
        self._held.append(frame)
        self._bytes += len(frame)
        self._counters["sent"] += 1
        self._counters["bytes_sent"] += len(parcel.body)
        if self._bytes > 64 << 10:
            self._jet.home.do(self._write)
        return True

    def _write(self) -> None:
        """On the loop."""
        held, self._held, self._bytes = self._held, [], 0
        if held and not self._jet.connection.write(b"".join(held)):
            self._counters["dropped"] += len(held)  # the connection went in between

    def try_flush(self) -> bool:
        if self._held:
            self._jet.home.do(self._write)
        if not self._jet.connection.unwritten:
            return True
        self._jet.home.turn()
        self._jet.check("publish")
        return not self._jet.connection.unwritten

    def subscribers(self) -> int:
        self._jet.check("wait_for_subscribers")
        return self._roll.count()

    def arm(self, want: Want) -> Wait:
        # Nobody rings when the socket has taken what was written.
        return self._bell.arm()._replace(at_most=_ASK_EVERY if want & Want.RECV else 0.005)

    def counters(self) -> Mapping[str, int]:
        return self._counters | {"reconnects": self._jet.connection.reconnects, "subscribers": self._roll.present()}

    def close(self) -> None:
        self._jet.connection.mailboxes.discard(self)
        self._jet.close()
        self._bell.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()
        self._bell.close()


# -- subscribers ----------------------------------------------------------------------------------------------------


class _Reading(Pull):
    """A consumer of our own, without acknowledgements, made anew after a loss right behind what we have seen."""

    def __init__(
        self, jet: Jet, stream: str, filters: list[str], replay: str, prefetch: int, ring: Callable[[], None]
    ) -> None:
        super().__init__(jet, stream, "", max(prefetch, 1), ring)
        self._filters = filters
        self._begin = beginning(replay)
        self.seen: int | None = None  # sequence in the stream; None: it is not known yet where we began
        self._due = 1  # sequence in the consumer
        self._making = False
        if "opt_start_seq" in self._begin:
            self.seen = self._begin["opt_start_seq"] - 1

    async def make(self) -> None:
        """A new consumer. Deliveries of the one before are not ours any more."""
        name = f"sub-{secrets.token_hex(8)}"
        config: dict[str, Any] = {
            "name": name,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": _INACTIVE,
            **(self._begin if self.seen is None else beginning(str(self.seen + 1))),
        }
        if len(self._filters) == 1:
            config["filter_subject"] = self._filters[0]
        elif self._filters:
            config["filter_subjects"] = self._filters
        body = {"stream_name": self.stream, "config": config, "action": "create"}
        await self.jet.api(f"CONSUMER.CREATE.{self.stream}.{name}", body)
        self.consumer, self._due, self.asked, self.lost = name, 1, 0, False
        if self._tap is not None:
            self.jet.connection.unsubscribe(self._tap)
        await self.start()

    def brought(self, delivery: Delivery) -> None:
        consumer, _, sequence, number = delivery_facts(delivery.message.reply)
        if consumer != self.consumer or self.lost:
            return
        if number != self._due:
            self.missing()  # the server has dropped some of it on the way; it has them still
            return
        self._due += 1
        self.seen = sequence
        self.buffer.append(delivery)

    def again(self) -> None:
        self.missing()

    def missing(self) -> None:
        self.lost = True
        if not self._making:
            self._making = True
            self.jet.spawn(self._remake())

    async def _remake(self) -> None:
        try:
            await self.make()
        finally:
            self._making = False
        self._ring()


class _DurableSubscriber:
    """An Intake that reads the log for itself."""

    def __init__(self, jet: Jet, stream: str, topics: tuple[str, ...], options: TopicOptions, replay: str) -> None:
        self._jet = jet
        self._stream = stream
        self._bell = Bell(jet.home)
        filters, self._choosy = subjects_of(stream, topics)
        self._topics = topics
        self._whole = not filters and not self._choosy
        self._pull = _Reading(jet, stream, filters, replay, prefetch_of(options), self._bell.ring)
        self._last = self._pull.seen
        self._gaps = _Gaps()
        self._here = _Here(jet, stream)
        self._counters = {"received": 0, "bytes_received": 0, "dropped": 0}
        jet.connection.connected = self._pull.again
        jet.connection.last_words = self._goodbye
        jet.connection.mailboxes.add(self)

    async def start(self) -> None:
        await self._pull.make()
        await self._here.start()
        self._jet.spawn(self._keep())

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            with contextlib.suppress(Exception):  # the connection broke in the midst of it: `again` comes
                await self._pull.tick()

    @property
    def native(self) -> Any:
        return self._jet.native

    def ring(self) -> None:
        self._bell.ring()

    def arm(self, want: Want) -> Wait:
        return self._bell.arm()

    def try_get(self) -> Parcel | None:
        if self._jet.home.eager:
            self._bell.silence()
        turned = False
        while True:
            if not self._pull.buffer:
                if turned:
                    self._jet.check("recv")
                    return None
                turned = True
                self._jet.home.turn()
                continue
            message = self._pull.buffer.popleft().message
            if self._pull.short():
                self._jet.home.do(self._pull.ask)
            sequence = delivery_facts(message.reply)[2]
            gap = 0 if self._last is None else max(sequence - self._last - 1, 0)
            self._last = sequence
            topic = message.subject[len(self._stream) + 1 :]
            if self._choosy and not any(matches(pattern, topic) for pattern in self._topics):
                continue
            if not self._whole:
                gap = self._gaps.before(message)
            self._counters["received"] += 1
            self._counters["bytes_received"] += len(message.data)
            self._counters["dropped"] += gap
            return parcel_of(message, self._stream, sequence, redelivered=0, gap=gap)

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        return True

    def try_flush(self) -> bool:
        return True

    async def _goodbye(self) -> None:
        self._here.goodbye()
        self._pull.hush()
        self._jet.connection.write(command(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._pull.consumer}", "", b""))
        await self._jet.connection.round_trip()

    def counters(self) -> Mapping[str, int]:
        return self._counters | {"reconnects": self._jet.connection.reconnects}

    def close(self) -> None:
        self._jet.connection.mailboxes.discard(self)
        self._jet.close()
        self._bell.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()
        self._bell.close()


class _CoreSubscriber:
    """An Intake of what passes by."""

    def __init__(self, jet: Jet, stream: str, terms: TopicTerms) -> None:
        self._jet = jet
        self._stream = stream
        self._topics = terms.topics
        self._group = terms.group
        self._bell = Bell(jet.home)
        self._messages = deque[Any]()
        self._gaps = _Gaps()
        self._here = _Here(jet, stream)
        self._counters = {"received": 0, "bytes_received": 0}
        jet.connection.last_words = self._goodbye
        jet.connection.mailboxes.add(self)

    async def start(self) -> None:
        subjects, self._choosy = subjects_of(self._stream, self._topics)
        queue = "" if self._group is None else group_name(self._jet.url, self._group)
        for subject in subjects or (self._stream, f"{self._stream}.>"):
            await self._jet.connection.tap(subject, self._deliver, queue)
        await self._here.start()

    def _deliver(self, message: Any) -> None:
        if len(self._messages) < _BACKLOG:
            self._messages.append(message)
            self._bell.ring()

    @property
    def native(self) -> Any:
        return self._jet.client

    def ring(self) -> None:
        self._bell.ring()

    def arm(self, want: Want) -> Wait:
        return self._bell.arm()

    def try_get(self) -> Parcel | None:
        if self._jet.home.eager:
            self._bell.silence()
        if not self._messages:
            self._jet.home.turn()
        while self._messages:
            message = self._messages.popleft()
            topic = message.subject[len(self._stream) + 1 :]
            if self._choosy and not any(matches(pattern, topic) for pattern in self._topics):
                continue
            gap = 0 if self._group is not None else self._gaps.before(message)
            self._counters["received"] += 1
            self._counters["bytes_received"] += len(message.data)
            return parcel_of(message, self._stream, 0, redelivered=0, gap=gap)
        self._jet.check("recv")
        return None

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        return True

    def try_flush(self) -> bool:
        return True

    async def _goodbye(self) -> None:
        self._here.goodbye()
        await self._jet.connection.round_trip()

    def counters(self) -> Mapping[str, int]:
        return self._counters | {"dropped": self._gaps.dropped, "reconnects": self._jet.connection.reconnects}

    def close(self) -> None:
        self._jet.connection.mailboxes.discard(self)
        self._jet.close()
        self._bell.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()
        self._bell.close()


# -- opening --------------------------------------------------------------------------------------------------------


def publisher(url: Url, options: TopicOptions, terms: PublishTerms) -> Steps[Publishing]:
    stream = stream_name(url)
    if terms.retain:
        raise errors.Unsupported("retain= is not for a log", url=url, hint="subscribers say replay= in the URL")
    if not options.durable and terms.on_full != "drop_new":
        raise errors.Unsupported(
            f"on_full={terms.on_full!r}, and core NATS drops what a slow subscriber does not take",
            url=url,
            hint='on_full="drop_new" says so; without durable=0 nothing is dropped',
        )
    jet = yield from open_jet(url, options, "publisher")

    async def begin() -> Publishing:
        if not options.durable:
            core = _CorePublisher(jet, stream, options)
            await core.start()
            return core
        info = (await ensure_stream(jet, stream, options))["config"]
        limits = [info.get("max_msgs", -1), info.get("max_bytes", -1)]
        if terms.on_full in ("drop_new", "error") and info["discard"] == "old" and max(limits) > 0:
            raise errors.Unsupported(
                f"on_full={terms.on_full!r}, and the stream drops its oldest", url=url, hint="discard=new in the URL"
            )
        outlet = _DurablePublisher(jet, stream, options.limit, info["duplicate_window"] / 10**9, terms)
        await outlet.start()
        return outlet

    return (yield from opening(jet, begin, "publisher"))


def subscriber(url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Intake]:
    stream = stream_name(url)
    group = None if terms.group is None else group_name(url, terms.group)
    if not options.durable and options.replay is not None:
        raise errors.Unsupported("replay= without a stream", url=url, hint="leave durable=0 out")
    jet = yield from open_jet(url, options, "subscriber")

    async def begin() -> Intake:
        if not options.durable:
            core = _CoreSubscriber(jet, stream, terms)
            await core.start()
            return core
        info = await ensure_stream(jet, stream, options)
        if group is None:
            replay = options.replay or "new"
            if replay == "new":  # as a number, so that it is the same place after a loss
                replay = str(info["state"]["last_seq"] + 1)
            reader = _DurableSubscriber(jet, stream, terms.topics, options, replay)
            await reader.start()
            return reader
        filters, choosy = subjects_of(stream, terms.topics)
        if choosy:
            raise errors.Unsupported(
                "patterns of a group that cover the same topics", url=url, hint="one pattern that has both"
            )
        here = _Here(jet, stream)
        intake = await join(
            jet, stream, [(group, filters)], options, "new", prefetch_of(options), manual=False, auto=True
        )
        give_back = jet.connection.last_words

        async def goodbye() -> None:
            here.goodbye()
            if give_back is not None:
                await give_back()

        jet.connection.last_words = goodbye
        await here.start()
        return intake

    return (yield from opening(jet, begin, "subscriber"))
