"""The messages of one JetStream consumer, asked for before they are wanted.

Several messages are always asked for, by pull requests that overlap, so that receiving one at a time costs no trip to the
server. A request ends by itself after a while; the server says so, and says every few seconds that it still knows it. So
silence means that it was lost (with a server, with a leader), and it is made again: a subscription that has gone dead
without a word is the known trouble of pull consumers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..message import Parcel
from ._jetstream import ApiError, Jet, command, pauses
from ._nats_outlet import MSG_ID

_EXPIRES = 30.0  # seconds of one pull request
_HEARTBEAT = 5.0  # seconds between two signs of life of a pull request that brings nothing
_NS = 10**9


class Delivery:
    """One message as the server brought it: `parcel.token`."""

    __slots__ = ("at", "forgotten", "message", "pull", "settled")

    def __init__(self, message: Any, pull: Pull, now: float) -> None:
        self.message = message
        self.pull = pull
        self.at = now  # when the server last heard that it is looked after
        self.settled = False
        self.forgotten = False  # by the server: see `Pull.reconcile`

    @property
    def identity(self) -> tuple[str, str]:
        """Which stored message it is, at every delivery: its sequence in the stream, and when it was stored."""
        tokens = self.message.reply.split(".")
        at = 5 if len(tokens) < 11 else 7
        return tokens[at], tokens[at + 2]


def delivery_facts(reply: str) -> tuple[str, int, int, int]:
    """Consumer, deliveries, sequence in the stream, sequence in the consumer: $JS.ACK.[domain.account.]stream.consumer..."""
    tokens = reply.split(".")
    at = 3 if len(tokens) < 11 else 5
    return tokens[at], int(tokens[at + 1]), int(tokens[at + 2]), int(tokens[at + 3])


class Pull:
    """The messages of one consumer, asked for before they are wanted. All of it on the loop but `take`."""

    def __init__(self, jet: Jet, stream: str, consumer: str, prefetch: int, ring: Callable[[], None]) -> None:
        self.jet = jet
        self.stream = stream
        self.consumer = consumer
        self.prefetch = prefetch
        self.buffer = deque[Delivery]()
        self.closing = False
        self.asked = 0  # messages that requests which are under way may still bring
        self.heard = 0.0
        self.lost = False  # the consumer is not there any more
        self.paused = False  # until it is known what the server knows
        self._ring = ring
        self._key = 0
        self._tap: Any = None
        self._pauses = pauses()
        self._not_before = 0.0

    async def start(self) -> None:
        self._key += 1
        self._tap = await self.jet.connection.tap(f"{self._inbox}.*", self._deliver)
        await self.jet.connection.round_trip()  # requests overtake what the client has not written yet
        self.ask()

    @property
    def _inbox(self) -> str:
        return f"{self.jet.inbox}.m{self.consumer}.{self._key}"

    def short(self) -> bool:
        """Whether it is time to ask for more."""
        return self.asked + len(self.buffer) <= self.prefetch // 2

    def ask(self) -> None:
        wanted = max(self.prefetch, 1) - self.asked - len(self.buffer)
        if wanted <= 0 or self.lost or self.paused or self.closing or time.monotonic() < self._not_before:
            return
        body = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (wanted, _EXPIRES * _NS, _HEARTBEAT * _NS)
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.consumer}"
        if self.jet.connection.write(command(subject, f"{self._inbox}.r", body)):
            self.asked += wanted
            self.heard = time.monotonic()

    def _deliver(self, message: Any) -> None:
        """In the midst of the client's work: it must not raise."""
        now = self.heard = time.monotonic()
        if message.reply.startswith("$JS.ACK."):
            self.asked = max(self.asked - 1, 0)
            if self.closing:
                self.jet.connection.write(b"PUB %s 4\r\n-NAK\r\n" % message.reply.encode())
                return
            self.brought(Delivery(message, self, now))
            self._ring()
            return
        headers = message.headers or {}
        status = headers.get("Status")
        if status == "100":
            return
        left = headers.get("Nats-Pending-Messages")
        self.asked = max(self.asked - int(left), 0) if left is not None and left.isdecimal() else 0
        if status == "409" and "Consumer Deleted" in headers.get("Description", ""):
            self.missing()
        elif status in ("404", "408"):
            self._pauses = pauses()
            if self.prefetch:
                self.ask()
        else:  # no leader, shutting down, nobody there: in a while
            self._not_before = now + self._pauses()
        self._ring()

    def brought(self, delivery: Delivery) -> None:
        self.buffer.append(delivery)

    def missing(self) -> None:
        self.lost = True

    def again(self) -> None:
        """After a reconnection: what was asked for before is forgotten by the server."""
        self.asked = 0
        self._not_before = 0.0
        self.ask()

    async def tick(self) -> None:
        now = time.monotonic()
        if not self.jet.up or self.lost or self.paused:
            return
        if self.asked and now - self.heard > 2.5 * _HEARTBEAT:
            # Silence: unless it is only we who have not listened, that request is dead.
            await self.jet.connection.round_trip()
            if time.monotonic() - self.heard > 2.5 * _HEARTBEAT:
                self.jet.connection.unsubscribe(self._tap)
                self.asked = 0
                await self.start()
        elif not self.asked and self._not_before and now >= self._not_before:
            self._not_before = 0.0
            if not await self._exists():
                self.missing()
                self._ring()
            elif self.prefetch:
                self.ask()
        elif self.prefetch and self.short():
            self.ask()

    async def _exists(self) -> bool:
        return await self._delivered() is not None

    async def _delivered(self) -> int | None:
        """The last sequence in the stream that the server has handed out, as far as it remembers. None: no consumer."""
        try:
            info = await self.jet.api(f"CONSUMER.INFO.{self.stream}.{self.consumer}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return int(info["delivered"]["stream_seq"])

    async def reconcile(self, handed_out: list[Delivery]) -> None:
        """Find out which deliveries the server has forgotten.

        It confirms what is published when that is on the disk; what it delivers, it writes down later. Killed in between,
        it hands the same messages out again as if for the first time, and does not answer to acknowledgements of
        what it knows nothing of.
        """
        mine = [delivery for delivery in handed_out if delivery.pull is self]
        waiting = list(self.buffer)
        known = await self._delivered()
        if known is None:
            self.missing()
            return
        for delivery in mine + waiting:
            delivery.forgotten = int(delivery.identity[0]) > known

    def hush(self) -> None:
        """No more of it; what the server has sent already is given back."""
        self.closing = True
        if self._tap is not None:
            self.jet.connection.write(b"UNSUB %d\r\n" % self._tap._id)


def parcel_of(message: Any, stream: str, sequence: int, *, redelivered: int, token: Any = None, gap: int = 0) -> Parcel:
    headers = message.headers
    id = ""
    if headers:
        id = headers.pop(MSG_ID, "")
        if headers:
            headers = {
                name.lower(): value for name, value in headers.items() if not name.startswith(("Nats-", "Ipckit-"))
            }
    subject = message.subject[len(stream) + 1 :]
    return Parcel(
        message.data,
        id or str(sequence),  # of a message that another program published
        headers or {},
        int(subject[1:]) if subject[:1] == "p" and subject[1:].isdecimal() else 0,
        subject,
        redelivered,
        gap,
        token,
    )
