"""`redis://host:port/db/name`, `rediss://` (TLS), `redis+unix:///socket?db=0&name=NAME`: everything over Redis Streams.

Works with Redis 6.2 and later, and Valkey, alone or watched by Sentinels. Queues are one stream and consumer groups (`_redis_log`
adds, `_redis_queue` receives), topics one stream that everybody reads (`_redis_topics`), calls one stream that the servers share
(`_redis_calls`), locks are leases (`_redis_lease`). This module has the channels.

Each side of a channel makes one stream and reads it, the other writes it:

    ipckit:{NAME}:listener    string: the card of the listener
    ipckit:{NAME}:desk:ID     stream: its rendezvous mailbox
    ipckit:{NAME}:box:ID      stream: the inbox of one side of one channel

A side has two connections. On one an XREAD BLOCK 0 is always outstanding, so a message is pushed as it is added; the other
pipelines XADD and asks now and then whether the peer's connection is still there (CLIENT LIST ID). The server knows when a
process was killed, and a paused process is still connected: no heartbeats, no timers, no thread.

Frames have the ids 1-0, 2-0, 3-0 ...: a frame that was evicted or lost is a gap that the reader sees, and never a silent loss.
What was read is trimmed; a sender stops `window` messages ahead of its reader. All keys are deleted at close, and expire
after `ttl` if both sides were killed. A channel is a session: it does not outlive its two processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import _options, errors
from .._capabilities import Capabilities
from .._exchange import Calls, Exchange
from .._leasing import Leases, LeaseTerms, Leasing
from .._options import integer, option
from .._spi import (
    Intake,
    Link,
    Listener,
    Outlet,
    Publishing,
    PublishTerms,
    Queues,
    QueueTerms,
    Steps,
    Topics,
    TopicTerms,
    Transport,
)
from .._url import Url
from ..message import matches
from . import _redis_calls, _rendezvous
from ._redis_address import PlaceOptions, read_address, read_lock_address
from ._redis_lease import RedisLease
from ._redis_log import MAX_LANES, Adding, QueueOptions, TopicOptions
from ._redis_mail import Post, make_channel
from ._redis_queue import GroupIntake
from ._redis_topics import LogPublisher, Tail

GROUP = "ipckit"  # of a queue's receivers that name none
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,99}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisOptions(PlaceOptions):
    window: int = option(1024, integer(2, 1 << 20), "messages that a sender may be ahead of its reader")
    ttl: float = option(86400.0, _options.duration, "after which keys expire that nobody used")


class RedisTransport(
    Transport[RedisOptions], Queues[QueueOptions], Topics[TopicOptions], Calls[RedisOptions], Leases[PlaceOptions]
):
    capabilities = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        durable=True,
        headers=True,
        redelivery=True,
        consumer_groups=True,
        replay=True,
        native_topics=True,
        locks=True,
        cross_machine=True,
        broker=True,
        death="lease",
        death_bound=2.0,
        model="append-only logs in a server",
        synchronisation="no",
        data="messages with ids",
        decoupled=True,
        use_case="services that share a Redis already, on one machine or many",
    )
    options = RedisOptions
    queue_options = QueueOptions
    topic_options = TopicOptions
    lease_options = PlaceOptions
    requires = ("redis", "hiredis")
    extra = "redis"

    def capabilities_of(self, url: Url) -> Capabilities:
        from dataclasses import replace

        lanes = dict(url.options).get("lanes", "")  # that it is a number is checked when it is opened
        levels = int(lanes) if lanes.isdecimal() and 1 < int(lanes) <= MAX_LANES else 0
        return replace(
            self.capabilities,
            priorities=levels,
            encrypted=url.scheme == "rediss",
            cross_machine=url.scheme != "redis+unix",
        )

    def listen(self, url: Url, options: RedisOptions) -> Steps[Listener]:
        post = Post(read_address(url, options), options.window, options.ttl)
        try:
            return (yield from _rendezvous.listen(post, options.limit, make_channel))
        except BaseException:
            post.close()
            raise

    def connect(self, url: Url, options: RedisOptions) -> Steps[Link]:
        post = Post(read_address(url, options), options.window, options.ttl)
        try:
            return (yield from _rendezvous.connect(post, options.limit, make_channel))
        finally:
            post.close()

    def exchange(self, url: Url, options: RedisOptions, *, serving: bool) -> Steps[Exchange]:
        return _redis_calls.open_exchange(read_address(url, options), options.limit, options.ttl, serving=serving)

    def sender(self, url: Url, options: QueueOptions) -> Steps[Outlet]:
        outlet = Adding(read_address(url, options), options, lanes=options.lanes)
        yield from outlet.open()
        return outlet

    def receiver(self, url: Url, options: QueueOptions, terms: QueueTerms) -> Steps[Intake]:
        address = read_address(url, options)
        if options.audit:
            if terms.group is not None or options.lanes > 1:
                raise errors.BadOption("an audit reads one stream, and has no group", url=url, operation="receiver")
            tail = Tail(address, options, None)
            yield from tail.open()
            return tail
        group = GROUP if terms.group is None else _group(url, terms.group)
        intake = GroupIntake(address, options, group, lanes=options.lanes)
        yield from intake.open()
        return intake

    def publisher(self, url: Url, options: TopicOptions, terms: PublishTerms) -> Steps[Publishing]:
        publisher = LogPublisher(read_address(url, options), options, terms)
        yield from publisher.open()
        return publisher

    def subscriber(self, url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Intake]:
        address = read_address(url, options)
        wanted = _wanted(terms.topics)
        intake: Tail | GroupIntake
        if terms.group is None:
            intake = Tail(address, options, wanted)
        else:
            intake = GroupIntake(address, options, _group(url, terms.group), wanted=wanted)
        yield from intake.open()
        return intake

    def leasing(self, url: Url, options: PlaceOptions, terms: LeaseTerms) -> Steps[Leasing]:
        lease = RedisLease(read_lock_address(url, options), terms)
        yield from lease.open()
        return lease


def _group(url: Url, group: str) -> str:
    if not _GROUP.match(group):
        raise errors.BadOption(f"{group!r} is no name of a group", url=url, hint="letters, digits and '_.:-'")
    return group


def _wanted(patterns: Sequence[str]) -> Callable[[str], bool]:
    if ">" in patterns:
        return lambda topic: True
    return lambda topic: any(matches(pattern, topic) for pattern in patterns)


TRANSPORT = RedisTransport()
