"""Topics on NATS: durable on a JetStream stream, or with `durable=0` on core NATS.

    durable    topic eu.paris of nats://host/prices is the subject prices.eu.paris of the stream `prices`. A subscriber reads
               the log at its own pace: nobody holds anybody up, and only the stream's own limits (`maxlen=` ...) drop
               something. group=None: a consumer of our own, made anew after each loss right behind what we have seen;
               a group: one durable consumer that its subscribers share, acknowledged when the next is asked for.
    durable=0  the same subjects without a stream. What the server drops for a slow subscriber is dropped for ever.

What was missed is counted: on the whole stream by its sequence numbers; under a pattern, and without a stream, by the number
that each publisher gives its messages on each subject (header `Ipckit-From`). In a group nobody can tell what others have got.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors
from .._spi import Intake, Publishing, PublishTerms, Steps, TopicTerms, Wait, Want
from .._url import Url
from ..message import Parcel, Verdict, matches
from ._bridge import Bell
from ._jetstream import (
    ApiError,
    Jet,
    TopicOptions,
    beginning,
    command,
    ensure_stream,
    group_name,
    open_jet,
    opening,
    refusal,
    stream_name,
)
from ._nats_core import CorePublisher, CoreSubscriber
from ._nats_outlet import JetOutlet
from ._nats_pull import Delivery, Pull, delivery_facts, parcel_of
from ._nats_queue import join, prefetch_of
from ._nats_roll import ASK_EVERY, Gaps, Here, Numbers, Roll, subjects_of

_INACTIVE = 300 * 10**9  # ns after which the server drops a consumer whose subscriber was killed


# -- publishers -----------------------------------------------------------------------------------------------------


class _DurablePublisher(JetOutlet):
    """A queue's sender, to the subject of the topic."""

    _verb = "publish"

    def __init__(self, jet: Jet, stream: str, limit: int, dedup: float, terms: PublishTerms) -> None:
        self._numbers = Numbers()
        self._log = stream  # its name

        def subject(parcel: Parcel) -> tuple[str, str]:
            name = self._name(parcel)
            return name, self._numbers.line(name)

        super().__init__(jet, subject, limit, dedup, terms.on_full)
        self._roll = Roll(jet, stream)
        self._news = Bell(jet.home)
        self._roll.changed = self._news.ring

    async def start(self) -> None:
        await self._roll.start()
        await super().start()

    def _name(self, parcel: Parcel) -> str:
        return f"{self._log}.{parcel.topic}" if parcel.topic else self._log

    def try_put(self, parcel: Parcel) -> bool:
        taken = super().try_put(parcel)
        if taken:
            self._numbers.used(self._name(parcel))
        return taken

    def subscribers(self) -> int:
        self._jet.check("wait_for_subscribers")
        return self._roll.count()

    def arm(self, want: Want) -> Wait:
        if want & Want.RECV:
            return self._news.arm()._replace(at_most=ASK_EVERY)
        return super().arm(want)

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "subscribers": self._roll.present()}

    def close(self) -> None:
        super().close()
        self._news.close()

    def abandon(self) -> None:
        super().abandon()
        self._news.close()


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
        self.failed: errors.IpcError | None = None
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
        except ApiError as error:  # the stream is not there any more
            self.failed = refusal(error, self.jet.url, "recv")
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
        self._gaps = Gaps()
        self._here = Here(jet, stream)
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
                    if self._pull.failed is not None:
                        raise self._pull.failed
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
            core = CorePublisher(jet, stream, options)
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
            core = CoreSubscriber(jet, stream, terms)
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
        here = Here(jet, stream)
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
