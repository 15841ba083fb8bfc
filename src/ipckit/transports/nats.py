"""`nats://host:port/name`, `nats+tls://...`: channels, queues, topics and calls through a NATS server or cluster (nats-py).

A channel is two subjects, one in each direction; the listener's name is a third. All of it is core NATS: two parties
that are both there have no use for a stored stream. `nats://a:4222,b:4222/name` names several servers of one cluster.

Core NATS may lose messages; a channel may not. Payloads are numbered (`_natswire`), so a loss is a `PeerError` on the
channel, never a gap. A window of credit (`window=`) makes `send` wait for a slow receiver before the server would drop
anything. A connection that is lost ends its channels with `PeerError`, as nobody knows what was under way; listeners
reconnect, and go on.

The server knows who is there: a request to a subject that nobody subscribes to is answered at once (503, no
responders). So `listen` hears whether the name is taken, `connect` whether somebody listens, and a probe twice a
second whether the peer lives; a paused peer keeps its subscription. A paused peer is dropped by the *server* when it
answers no pings (six minutes by default), or takes no data for ten seconds while more than the sockets hold is
waiting for it.

Calls go to any number of servers of one name, which are a micro service to stock clients (`_nats_calls`).

Queues and topics are JetStream's: `name` is a stream there, which outlives everybody (`_nats_queue`, `_nats_topics`). Locks are
keys of its key-value store (`_nats_lease`).

Whoever may publish in the account can speak on these subjects: give `ipckit.>` and `_INBOX.>` to those you trust.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import replace
from typing import Any, ClassVar, cast

from .. import errors
from .._capabilities import Capabilities
from .._exchange import Calls, Exchange
from .._leasing import Leases, LeaseTerms, Leasing
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
    Wait,
)
from .._url import Url
from . import _mail, _nats_calls, _nats_queue, _nats_topics, _natsclient, _rendezvous
from . import _natswire as wire
from ._jetstream import QueueOptions, TopicOptions
from ._nats_lease import NatsLeaseOptions, open_lease
from ._natsclient import Connection, NatsOptions, map_nats
from ._natslink import Inbox, NatsLink, Outbox, Watch

_CLAIM_FOR = 2.0  # seconds for another claimant to take the name or to withdraw; one that is paused makes us give up
_CLAIM_EVERY = 0.02  # seconds between two looks whether it has
_FRAME_MAX = 256 << 10  # bytes; larger messages go in parts even if the server would take them, to flow evenly
_RETRY = (0.02, 0.5)  # seconds between attempts to reach a server that is not there
_NAME = re.compile(r"/([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\Z")
_WINDOW = (4 << 10, 1 << 30)


class _Cut(errors.IpcError):
    """Whoever is connecting needs another connection."""


class NatsTransport(
    Transport[NatsOptions], Queues[QueueOptions], Topics[TopicOptions], Calls[NatsOptions], Leases[NatsLeaseOptions]
):
    capabilities: ClassVar[Capabilities] = Capabilities(
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
        death_bound=1.0,
        model="messages by subject, through a server or cluster",
        decoupled=True,
        use_case="services that find each other by name, across machines and networks",
    )
    options: ClassVar[type[Any]] = NatsOptions
    queue_options: ClassVar[type[Any]] = QueueOptions
    topic_options: ClassVar[type[Any]] = TopicOptions
    lease_options: ClassVar[type[Any]] = NatsLeaseOptions
    requires: ClassVar[tuple[str, ...]] = ("nats",)
    extra: ClassVar[str | None] = "nats"

    def capabilities_of(self, url: Url) -> Capabilities:
        found = _ENCRYPTED if url.scheme == "nats+tls" else self.capabilities
        lanes = dict(url.options).get("lanes", "")
        return replace(found, priorities=int(lanes)) if lanes.isdecimal() and int(lanes) > 1 else found

    def listen(self, url: Url, options: NatsOptions) -> Steps[Listener]:
        _name(url)
        connection = yield from _natsclient.connect(url, options, "listen", reconnect=True)
        try:
            return (yield from _rendezvous.listen(_Post(connection, options), options.limit, _link))
        finally:
            connection.leave()  # the mailboxes keep it

    def connect(self, url: Url, options: NatsOptions) -> Steps[Link]:
        _name(url)
        pause = _RETRY[0]
        reason: errors.IpcError | None = None
        try:
            while True:
                try:
                    connection = yield from _natsclient.connect(url, options, "connect")
                except errors.NothingListening as nobody:
                    reason = nobody
                else:
                    reason = None
                    try:
                        return (yield from _rendezvous.connect(_Post(connection, options), options.limit, _link))
                    except _Cut as cut:
                        reason = cut
                    finally:
                        connection.leave()
                yield Wait((), pause)
                pause = min(pause * 2, _RETRY[1])
        except errors.Timeout as timeout:
            message = "no NATS server answers" if reason is None else reason.message
            raise errors.NothingListening(message, url=url, operation="connect") from reason or timeout

    def exchange(self, url: Url, options: NatsOptions, *, serving: bool) -> Steps[Exchange]:
        return _nats_calls.open_exchange(url, _name(url), options, serving=serving)

    def sender(self, url: Url, options: QueueOptions) -> Steps[Outlet]:
        return _nats_queue.sender(url, options)

    def receiver(self, url: Url, options: QueueOptions, terms: QueueTerms) -> Steps[Intake]:
        return _nats_queue.receiver(url, options, terms)

    def publisher(self, url: Url, options: TopicOptions, terms: PublishTerms) -> Steps[Publishing]:
        return _nats_topics.publisher(url, options, terms)

    def subscriber(self, url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Intake]:
        return _nats_topics.subscriber(url, options, terms)

    def leasing(self, url: Url, options: NatsLeaseOptions, terms: LeaseTerms) -> Steps[Leasing]:
        return open_lease(url, options, terms)


def _name(url: Url) -> str:
    if url.user is not None and url.password is None:  # a token, as NATS writes it; but every error shows a user
        raise errors.BadUrl(
            "there is a user without a password", url=replace(url, user=None), hint="a token is written ?token=..."
        )
    match = _NAME.match(url.path)
    if not url.hosts or match is None or len(url.path) > 200:
        raise errors.BadUrl(
            "the name is words of letters, digits, '_' and '-', with dots between them",
            url=url,
            hint=f"for example {url.scheme}://127.0.0.1:4222/frames",
        )
    return match[1]


# -- mailboxes --------------------------------------------------------------------------------------------------------


def _link(
    post: _mail.Post, inbox: _mail.Inbox, outbox: _mail.Outbox, watch: _mail.Watch, limit: int, peer_limit: int
) -> Link:
    # They are those that the post below has made.
    return NatsLink(post.url, cast("Inbox", inbox), cast("Outbox", outbox), cast("Watch", watch), limit, peer_limit)


class _Post:
    """Mailboxes of this transport. See `_mail.Post`."""

    window: _mail.Window | None = None  # NatsLink has its own
    priorities = 0

    def __init__(self, connection: Connection, options: NatsOptions) -> None:
        self.url = connection.url
        name = _name(self.url)
        self._rendezvous = f"ipckit.ch.{name}"
        self._claims = f"ipckit.cl.{name}"
        self._session = f"ipckit.ss.{name}."
        self._connection = connection
        self._window = options.window
        room = min(connection.client.max_payload, _FRAME_MAX) - wire.HEAD_SIZE
        if room < _rendezvous.MAX_GREETING:
            raise errors.Unsupported("this server takes too little at a time", url=self.url, hint="see its max_payload")
        self._max_frame = room

    def open_rendezvous(self) -> Steps[_mail.Inbox]:
        """Subscribe, unless somebody else has. An owner need not answer and may be paused, so the server is asked, not the owner.

        Claimants meet on a subject of their own: whoever is alone there may look whether the name is free, and take it before it
        leaves. Of several the one with the lowest id stays, so each that sees another asks again until it is gone.
        """
        connection = self._connection
        identity = secrets.token_hex(8)
        inbox = Inbox(connection, self._rendezvous, None)
        queue = Inbox(connection, self._claims, None)

        def claimed(rival: str) -> None:
            if rival < identity:
                queue.withdraw()

        async def take() -> bool:
            queue.claimed = None  # from here on nobody makes us withdraw; done on the loop, where `claimed` is called
            if queue.withdrawn:
                return False
            await inbox.subscribe()
            return True

        queue.claimed = claimed
        try:
            yield from connection.home.steps(queue.subscribe)
            until = time.monotonic() + _CLAIM_FOR
            while (yield from self._anybody(self._claims, wire.pack(wire.CLAIM, 0, identity.encode()))):
                if queue.withdrawn or time.monotonic() > until:
                    raise self._taken("somebody else is claiming this name")
                yield Wait((), _CLAIM_EVERY)
            if (yield from self._anybody(self._rendezvous, wire.pack(wire.PROBE, 0))):
                raise self._taken("somebody listens at this name already")
            if not (yield from connection.home.steps(take)):
                raise self._taken("somebody else is claiming this name")
        except BaseException:
            inbox.close()
            raise
        finally:
            queue.close()
        return inbox

    def _taken(self, why: str) -> errors.AddressInUse:
        return errors.AddressInUse(why, url=self.url, operation="listen")

    def find(self) -> Steps[_mail.Card | None]:
        if self._connection.cut:
            raise _Cut("the connection to the NATS server was lost", url=self.url) from self._connection.error
        there = yield from self._anybody(self._rendezvous, wire.pack(wire.PROBE, 0))
        return {"subject": self._rendezvous} if there else None

    def _anybody(self, subject: str, payload: bytes) -> Steps[bool]:
        """Whether this payload reached somebody."""
        outbox, watch = self._open(subject, self._window)
        try:
            yield from self._ask(watch, payload)
        finally:
            watch.close()
            outbox.close(None)
        return not watch.nobody

    def _ask(self, watch: Watch, payload: bytes) -> Steps[None]:
        """Publish it; when this returns, the server has said that nobody was there, or somebody was."""
        connection = self._connection

        async def ask() -> None:
            connection.probe(str(watch.peer.address), payload, watch.key)
            await connection.round_trip()  # its answer comes after the verdict

        try:
            yield from connection.home.steps(ask)
        except errors.IpcError:
            raise
        except Exception as error:
            raise map_nats(error, self.url, "open") from error
        connection.check(connection.cut, "open")

    def open_inbox(self) -> Steps[_mail.Inbox]:
        inbox = Inbox(self._connection, self._session + secrets.token_hex(8), self._window)
        try:
            yield from self._connection.home.steps(inbox.subscribe)
        except BaseException:
            inbox.close()
            raise
        return inbox

    def open_outbox(self, card: _mail.Card) -> Steps[tuple[_mail.Outbox, _mail.Watch]]:
        subject, window = card.get("subject"), card.get("window", self._window)
        ours = isinstance(subject, str) and (
            subject == self._rendezvous or re.fullmatch(re.escape(self._session) + "[0-9a-f]{16}", subject)
        )
        if not ours or not isinstance(window, int) or not _WINDOW[0] <= window <= _WINDOW[1]:
            raise errors.ProtocolError("the card names no subject of this channel", url=self.url)
        return self._open(str(subject), window)
        yield  # steps that never wait

    def _open(self, subject: str, window: int) -> tuple[Outbox, Watch]:
        outbox = Outbox(self._connection, subject, min(self._max_frame, max(window // 4, 4096)), window)
        return outbox, Watch(outbox)


_ENCRYPTED = replace(NatsTransport.capabilities, encrypted=True)

TRANSPORT = NatsTransport()
