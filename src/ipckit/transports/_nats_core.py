"""Topics on core NATS (`durable=0`): nothing is stored, nobody is held up, and what was missed is counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from .. import errors
from .._spi import TopicTerms, Wait, Want
from ..message import Parcel, Verdict, matches
from ._bridge import Bell
from ._jetstream import Jet, TopicOptions, command, group_name
from ._nats_outlet import header_block
from ._nats_pull import parcel_of
from ._nats_roll import ASK_EVERY, Gaps, Here, Numbers, Roll, subjects_of

_BACKLOG = 65536  # messages that a subscriber keeps; further ones are dropped, and seen as a gap
_WRITTEN = 4 << 20  # bytes on their way to the socket before a publisher waits


class CorePublisher:
    """A Publishing that keeps nothing. What is written is the server's, and the server keeps nothing either."""

    def __init__(self, jet: Jet, stream: str, options: TopicOptions) -> None:
        self._jet = jet
        self._stream = stream
        self._limit = options.limit
        self._numbers = Numbers()
        self._held: list[bytes] = []
        self._bytes = 0
        self._bell = Bell(jet.home)
        self._counters = {"sent": 0, "bytes_sent": 0, "dropped": 0}
        self._roll = Roll(jet, stream)
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
        headers = header_block(self._jet.url, parcel.id, parcel.headers, self._numbers.line(subject))
        most = min(self._limit, self._jet.client.max_payload - len(headers))
        if len(parcel.body) > most:
            raise errors.MessageTooLarge(
                f"{len(parcel.body)} bytes, and the limit is {most}",
                url=self._jet.url,
                operation="publish",
                hint="raise limit=" if most == self._limit else "the server's own limit is its max_payload",
            )
        self._numbers.used(subject)
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
        return self._bell.arm()._replace(at_most=ASK_EVERY if want & Want.RECV else 0.005)

    def counters(self) -> Mapping[str, int]:
        return self._counters | {"reconnects": self._jet.connection.reconnects, "subscribers": self._roll.present()}

    def close(self) -> None:
        self._jet.connection.mailboxes.discard(self)
        self._jet.close()
        self._bell.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()
        self._bell.close()


class CoreSubscriber:
    """An Intake of what passes by."""

    def __init__(self, jet: Jet, stream: str, terms: TopicTerms) -> None:
        self._jet = jet
        self._stream = stream
        self._topics = terms.topics
        self._group = terms.group
        self._bell = Bell(jet.home)
        self._messages = deque[Any]()
        self._gaps = Gaps()
        self._here = Here(jet, stream)
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
