"""Publish/subscribe: each message to every subscriber, or to one of each group.

    prices = ipckit.publisher("nats://localhost/prices")
    prices.publish(b"101.5", topic="eu.paris")
    for price in ipckit.subscriber("nats://localhost/prices", topics=["eu.*"]):
        print(price.topic, price.value)

Topics are dot-separated levels; in a pattern `*` is one level and `>` at the end is the rest, on every transport. What a slow
subscriber costs is said by `on_full`; whatever is dropped is counted, at the publisher in `stats()`, at the subscriber
in `Message.gap`. Received + dropped = sent.

As in `queue`: the logic once, the shells one line per verb.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from . import _options, errors
from ._endpoint import Endpoint, Opening, Yielding, body_of, located, put_all
from ._spi import Intake, OnFull, Publishing, PublishTerms, Steps, Topics, TopicTerms, Wait, Want
from ._taking import Taking
from ._url import Url
from ._wait import Lane, arun, run
from .codecs import Codec
from .message import AsyncMessage, Message, Parcel, Verdict, check_headers, new_id
from .message import matches as matches

T = TypeVar("T")

_LEVEL = re.compile(r"[^\s.*>\x00-\x1f\x7f\ud800-\udfff]{1,100}\Z")
_GROUP = re.compile(r"[A-Za-z0-9_.:-]{1,100}\Z")
_LOOK_AGAIN = (0.005, 0.05)  # seconds, while somebody publishes, and otherwise; see `_Publishing.wait_for`


@functools.lru_cache(maxsize=1024)
def _is_topic(topic: str, pattern: bool) -> bool:
    levels = topic.split(".") if topic else []
    if pattern and not levels:
        return False
    return len(topic) <= 200 and all(
        _LEVEL.match(level) or (pattern and (level == "*" or (level == ">" and i == len(levels) - 1)))
        for i, level in enumerate(levels)
    )


def check_topic(topic: str, url: Url, *, pattern: bool) -> str:
    """Refuse what is no topic (or no pattern). Raises BadOption."""
    if not isinstance(topic, str) or not _is_topic(topic, pattern):
        kind = "pattern" if pattern else "topic"
        raise errors.BadOption(
            f"{topic!r:.80} is no {kind}",
            url=url,
            hint="levels of 1 to 100 characters with dots between them, 200 in all: eu.paris; in a pattern * is one level, "
            "and > the rest",
        )
    return topic


def check_group(group: str | None, url: Url) -> str | None:
    """Refuse what is no name of a group. Raises BadOption."""
    if group is not None and not (isinstance(group, str) and _GROUP.match(group)):
        raise errors.BadOption(
            f"{group!r:.80} is no name of a group", url=url, hint="1 to 100 letters, digits and '_', '.', ':', '-'"
        )
    return group


class _Publishing:
    """The publishing verbs as steps."""

    __slots__ = ("_outlet", "_publishing", "_url")

    def __init__(self, outlet: Publishing, url: Url, publishing: threading.Lock) -> None:
        self._outlet, self._url = outlet, url
        self._publishing = publishing  # of the thread that is about it, also while it sleeps

    def publish(self, parcels: Sequence[Parcel]) -> Steps[int]:
        return put_all(self._outlet, parcels, self._url, "publish")

    def wait_for(self, count: int) -> Steps[None]:
        """Asks and arms the outlet between two publishings only, and so neither holds up a thread that publishes nor takes from
        it what it is to wake by. Such a thread may take that from us, so we look again by ourselves; while it is at it, or
        held up by a slow subscriber, there are the counters, which anybody may read.
        """
        there = 0
        try:
            while True:
                wait = Wait((), _LOOK_AGAIN[0])
                if self._publishing.acquire(blocking=False):
                    try:
                        there = self._outlet.subscribers()
                        if there < count:
                            fds, at_most = self._outlet.arm(Want.RECV)
                            wait = Wait(fds, _LOOK_AGAIN[1] if at_most is None else min(at_most, _LOOK_AGAIN[1]))
                            there = self._outlet.subscribers()
                    finally:
                        self._publishing.release()
                else:
                    there = self._outlet.counters()["subscribers"]
                if there >= count:
                    return
                yield wait
        except errors.Timeout as timeout:
            raise errors.Timeout(
                f"{there} of {count} subscribers came in time", url=timeout.url, operation=timeout.operation
            ) from None


class _Subscribing(Taking):
    __slots__ = ()

    def settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> Steps[None]:
        if verdict is Verdict.NACK and parcel.token is None:
            # It would be lost, and the user would believe that it is not.
            raise errors.Unsupported(
                "nobody hands this out again",
                url=self._url,
                operation="nack",
                hint="a group does, where the transport declares 'consumer_groups'",
            )
        while not (self._intake.try_settle(parcel, verdict, delay) and self._intake.try_flush()):
            wait = self._intake.arm(Want.SEND)
            if self._intake.try_settle(parcel, verdict, delay) and self._intake.try_flush():
                return
            yield wait


class _BasePublisher(Endpoint, Generic[T]):
    def __init__(self, outlet: Publishing, opening: Opening) -> None:
        super().__init__(outlet, located(outlet, opening.url), opening.capabilities)
        self._outlet = outlet
        self._encode: Callable[[T], Any] = opening.codec.encode
        self._lane = Lane(self._gate, "publish")
        self._steps = _Publishing(outlet, opening.url, self._lane.mutex)

    def _parcel(self, value: T, topic: str, headers: Mapping[str, str] | None) -> Parcel:
        return Parcel(
            body_of(self._encode(value)),
            new_id(),
            check_headers(headers, self.url),
            topic=check_topic(topic, self.url, pattern=False) if topic != "" else "",
        )

    def _waiting(self) -> Lane:
        """Of each who waits for subscribers: nobody has to wait for another one's number."""
        return Lane(self._gate, "wait_for_subscribers")

    def stats(self) -> Mapping[str, int]:
        """Counters since it was opened: "sent", "bytes_sent", "dropped", "subscribers", and what the transport adds."""
        return dict(self._outlet.counters())


class Publisher(_BasePublisher[T]):
    """The publishing side, for threads. Raises Closed, Timeout, QueueFull (`on_full="error"`), MessageTooLarge."""

    def publish(
        self, value: T, topic: str = "", timeout: float | None = None, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Give the value to everyone who subscribed to this topic."""
        run(self._steps.publish([self._parcel(value, topic, headers)]), self._lane, timeout)

    def publish_many(self, values: Sequence[T], topic: str = "", timeout: float | None = None) -> int:
        """Publish them all, confirmed together. Returns how many, which is fewer only when the time was up."""
        return run(self._steps.publish([self._parcel(v, topic, None) for v in values]), self._lane, timeout)

    def wait_for_subscribers(self, count: int, timeout: float | None = None) -> None:
        """Return when `count` subscribers are there, so that nobody misses the first message. Raises Timeout, and says how many
        there are. Another thread can publish meanwhile.
        """
        run(self._steps.wait_for(count), self._waiting(), timeout)

    def close(self) -> None:
        """Immediate. What waits for subscribers still goes out by itself, for 5 s and also at the end of the program; what a
        subscriber that does not receive has lost then is told in the log.
        """
        self._close()

    def __enter__(self) -> Publisher[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncPublisher(_BasePublisher[T]):
    """`Publisher`, awaited."""

    async def publish(
        self, value: T, topic: str = "", timeout: float | None = None, *, headers: Mapping[str, str] | None = None
    ) -> None:
        await arun(self._steps.publish([self._parcel(value, topic, headers)]), self._lane, timeout)

    async def publish_many(self, values: Sequence[T], topic: str = "", timeout: float | None = None) -> int:
        return await arun(self._steps.publish([self._parcel(v, topic, None) for v in values]), self._lane, timeout)

    async def wait_for_subscribers(self, count: int, timeout: float | None = None) -> None:
        await arun(self._steps.wait_for(count), self._waiting(), timeout)

    async def close(self) -> None:
        self._close()

    async def __aenter__(self) -> AsyncPublisher[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _BaseSubscriber(Endpoint, Generic[T]):
    def __init__(self, intake: Intake, opening: Opening) -> None:
        super().__init__(intake, located(intake, opening.url), opening.capabilities)
        self._intake = intake
        self._steps = _Subscribing(intake, self.url, opening.codec.decode)
        self._rx = Lane(self._gate, "recv")
        self._tx = Lane(self._gate, "ack")

    def stats(self) -> Mapping[str, int]:
        """Counters since it was opened: "received", "bytes_received", "dropped" (of a group: none, as the others may have got
        what is not here), and what the transport adds.
        """
        return {"dropped": 0, **self._intake.counters()}


class Subscriber(_BaseSubscriber[T]):
    """The subscribing side, for threads."""

    def recv(self, timeout: float | None = None) -> Message[T]:
        """The next message. `gap` says how many were dropped right before it."""
        return run(self._steps.recv(self._message), self._rx, timeout)

    def recv_many(self, limit: int, timeout: float | None = None) -> list[Message[T]]:
        """Wait for one message, then take what is there, `limit` at most.

        Where one of them is not what was declared, the messages before it are returned, and the next call raises its error.
        """
        return run(self._steps.recv_many(limit, self._message), self._rx, timeout)

    def _message(self, value: T, parcel: Parcel) -> Message[T]:
        return Message(value, parcel, self._settle)

    def _settle(self, parcel: Parcel, verdict: Verdict, delay: float, timeout: float | None) -> None:
        run(self._steps.settle(parcel, verdict, delay), self._tx, timeout)

    def close(self) -> None:
        self._close()

    def __iter__(self) -> Iterator[Message[T]]:
        """Messages until `close()`, or until the publisher closes where there is only one."""
        try:
            while True:
                yield self.recv()
        except (errors.Closed, errors.PeerClosed):
            return

    def __enter__(self) -> Subscriber[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncSubscriber(_BaseSubscriber[T]):
    """`Subscriber`, awaited."""

    async def recv(self, timeout: float | None = None) -> AsyncMessage[T]:
        return await arun(self._steps.recv(self._message), self._rx, timeout)

    async def recv_many(self, limit: int, timeout: float | None = None) -> list[AsyncMessage[T]]:
        return await arun(self._steps.recv_many(limit, self._message), self._rx, timeout)

    def _message(self, value: T, parcel: Parcel) -> AsyncMessage[T]:
        return AsyncMessage(value, parcel, self._settle)

    async def _settle(self, parcel: Parcel, verdict: Verdict, delay: float, timeout: float | None) -> None:
        await arun(self._steps.settle(parcel, verdict, delay), self._tx, timeout)

    async def close(self) -> None:
        self._close()

    async def __aiter__(self) -> AsyncIterator[AsyncMessage[T]]:
        try:
            while True:
                yield await self.recv()
        except (errors.Closed, errors.PeerClosed):
            return

    async def __aenter__(self) -> AsyncSubscriber[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# -- opening ------------------------------------------------------------------------------------------------------


class _TopicOpening(Opening):
    def __init__(
        self,
        url: str | Url | Yielding,
        codec: str | Codec[Any] | None,
        type: Any,
        require: Collection[str],
        operation: str,
    ) -> None:
        super().__init__(url, codec, type, require, "pubsub", operation)
        self._operation = operation
        transport = self.transport
        self._native = (
            transport if isinstance(transport, Topics) and self.end is None and transport.serves(self.url) else None
        )
        if self._native is not None:
            self._options = _options.read(self._native.topic_options, self.url)
        else:
            from . import _linkhub

            self._own, self._options = _options.read_both(_linkhub.Options, self.transport.options, self.url)

    def publisher(self, on_full: OnFull, retain: int) -> Steps[Publishing]:
        if on_full not in ("block", "drop_old", "drop_new", "error"):
            raise errors.BadOption(
                f"on_full={on_full!r} must be 'block', 'drop_old', 'drop_new' or 'error'",
                url=self.url,
                operation=self._operation,
            )
        if not isinstance(retain, int) or retain < 0:
            raise errors.BadOption(
                f"retain={retain!r} must be a number of messages, or 0", url=self.url, operation=self._operation
            )
        terms = PublishTerms(on_full=on_full, retain=retain)
        if self._native is not None:
            return self._native.publisher(self.url, self._options, terms)
        from . import _linkhub

        if self.end is not None:
            link, handed_over = self.end.yield_link(self.operation), self.capabilities.handed_over
            return _linkhub.publisher_over(self.url, link, self._options, self._own, terms, handed_over)
        return _linkhub.publisher(self.transport, self.url, self._options, self._own, terms)

    def subscriber(self, topics: Sequence[str], group: str | None) -> Steps[Intake]:
        if isinstance(topics, str) or not topics:
            raise errors.BadOption("topics must be a list of patterns", url=self.url, operation=self._operation)
        checked = tuple(check_topic(topic, self.url, pattern=True) for topic in topics)
        terms = TopicTerms(topics=checked, group=check_group(group, self.url))
        if self._native is not None:
            return self._native.subscriber(self.url, self._options, terms)
        from . import _linkhub

        if self.end is not None:
            return _linkhub.subscriber_over(self.url, self.end.yield_link(self.operation), terms)
        return _linkhub.subscriber(self.transport, self.url, self._options, self._own, terms)


@overload
def publisher(
    url: str | Url | Yielding,
    *,
    on_full: OnFull = "block",
    retain: int = 0,
    timeout: float | None = None,
    require: Collection[str] = (),
) -> Publisher[bytes]: ...
@overload
def publisher(
    url: str | Url | Yielding,
    *,
    on_full: OnFull = "block",
    retain: int = 0,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Publisher[T]: ...
@overload
def publisher(
    url: str | Url | Yielding,
    *,
    on_full: OnFull = "block",
    retain: int = 0,
    timeout: float | None = None,
    codec: str | Codec[Any],
    require: Collection[str] = (),
) -> Publisher[Any]: ...
def publisher(
    url: str | Url | Yielding,
    *,
    on_full: OnFull = "block",
    retain: int = 0,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Publisher[Any]:
    """Open the publishing side.

    Args:
        url: where; or a Channel, whose link is taken over (see `ipckit.sender`). On transports without a broker the publisher
            has the name.
        on_full: what a subscriber that does not keep up costs: "block" holds the publisher, "drop_old" and "drop_new" drop
            for that subscriber and count it, "error" raises QueueFull.
        retain: how many last messages of each topic a late subscriber is given first, where there is no log to replay.
        timeout: seconds to reach what must be there; None waits.
        codec, type, require: as in `ipckit.listen`.
    """
    opening = _TopicOpening(url, codec, type, require, "publisher")
    return Publisher(opening.run(opening.publisher(on_full, retain), timeout), opening)


@overload
def subscriber(
    url: str | Url | Yielding,
    *,
    topics: Sequence[str] = (">",),
    group: str | None = None,
    timeout: float | None = None,
    require: Collection[str] = (),
) -> Subscriber[bytes]: ...
@overload
def subscriber(
    url: str | Url | Yielding,
    *,
    topics: Sequence[str] = (">",),
    group: str | None = None,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Subscriber[T]: ...
@overload
def subscriber(
    url: str | Url | Yielding,
    *,
    topics: Sequence[str] = (">",),
    group: str | None = None,
    timeout: float | None = None,
    codec: str | Codec[Any],
    require: Collection[str] = (),
) -> Subscriber[Any]: ...
def subscriber(
    url: str | Url | Yielding,
    *,
    topics: Sequence[str] = (">",),
    group: str | None = None,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Subscriber[Any]:
    """Open the subscribing side.

    Args:
        url: where; or a Channel, whose link is taken over (see `ipckit.sender`).
        topics: patterns; `*` is one level, `>` the rest. A message without a topic goes to those who asked for ">".
        group: subscribers of one group share the messages; None: each gets them all.
        timeout: seconds to reach the publisher or broker; None waits.
        codec, type, require: as in `ipckit.listen`.
    """
    opening = _TopicOpening(url, codec, type, require, "subscriber")
    return Subscriber(opening.run(opening.subscriber(topics, group), timeout), opening)


async def apublisher(
    url: str | Url | Yielding,
    *,
    on_full: OnFull = "block",
    retain: int = 0,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T] | None = None,
    require: Collection[str] = (),
) -> AsyncPublisher[T]:
    """`publisher`, awaited."""
    opening = _TopicOpening(url, codec, type, require, "publisher")
    return AsyncPublisher(await opening.arun(opening.publisher(on_full, retain), timeout), opening)


async def asubscriber(
    url: str | Url | Yielding,
    *,
    topics: Sequence[str] = (">",),
    group: str | None = None,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T] | None = None,
    require: Collection[str] = (),
) -> AsyncSubscriber[T]:
    """`subscriber`, awaited."""
    opening = _TopicOpening(url, codec, type, require, "subscriber")
    return AsyncSubscriber(await opening.arun(opening.subscriber(topics, group), timeout), opening)
