"""Queues on JetStream: a stream is the log, a durable consumer of it is a group, its pull requests are our prefetch.

    sender    the message, to the subject <stream>, or <stream>.p<lane>, with its id in `Nats-Msg-Id`
              -> the server confirms each one; what it does not confirm is sent again, with its id, while the server knows ids
    receiver  one consumer for each lane; several messages are always asked for, and lie here before anybody wants them
              -> ack: +ACK, nack: -NAK, extend: +WPI, given up: a copy to <stream>-dead, then +TERM

What is held in this process survives no kill, and does not have to: unconfirmed messages are the caller's still, and
unacknowledged ones go to somebody else after `ack_wait`. So each line here may be the last one, and after a broken
connection everything unconfirmed is simply said again. A server that is killed may have forgotten what it delivered last
(`Pull.reconcile`), and delivers it again; what was acknowledged here is then acknowledged once more, and not handed out.

Limits: a message fits into one payload of the server (1 MiB by default). What a receiver has prefetched counts as
delivered when it is killed; so with `max_deliver` nothing is prefetched unless `prefetch=` says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from .. import errors
from .._spi import Intake, Outlet, QueueTerms, Steps, Wait, Want
from .._url import Url
from ..message import Parcel, Verdict
from ._bridge import Bell
from ._jetstream import (
    Jet,
    JetOptions,
    QueueOptions,
    command,
    ensure_consumer,
    ensure_stream,
    group_name,
    open_jet,
    opening,
    stream_name,
)
from ._nats_outlet import MSG_ID, JetOutlet, header_block
from ._nats_pull import Delivery, Pull, delivery_facts, parcel_of

_ACKS = 64  # acknowledgements that are written together
_ACK_SOON = 0.005  # seconds that one of them waits for others, while somebody receives
_TICK = 0.25  # seconds between two looks at what is unconfirmed
_RESEND = 1.0  # seconds without an answer before it is said again
_PREFETCH = 64
_DONE = 16384  # acknowledged messages that are known again when the server has forgotten that
_NS = 10**9


class JetIntake:
    """An Intake over one consumer, or one for each lane, the most urgent first."""

    def __init__(
        self, jet: Jet, stream: str, *, manual: bool, ack_wait: float, max_deliver: int | None, auto: bool = False
    ) -> None:
        self._jet = jet
        self._stream = stream
        self._confirm = manual
        self._auto = auto  # acknowledge what was handed out when the next is asked for
        self._ack_wait = ack_wait
        # In the worst case they wait for the caretaker of the loop, who comes after a second.
        self._ack_soon = _ACK_SOON if ack_wait > 5 else 0.0
        self._max_deliver = max_deliver
        self._pulls: list[Pull] = []
        self._bell = Bell(jet.home)
        self._ack_bell = Bell(jet.home)
        self._reply = f"{jet.inbox}.k."
        self._number = 0
        self._acks: list[bytes] = []
        self._acks_since = 0.0
        self._unconfirmed: dict[int, tuple[bytes, Delivery]] = {}
        self._done: dict[tuple[str, str], None] = {}  # acknowledged of late, the oldest first
        self._generation = 0  # of the connection
        self._said = 0.0
        self._open = set[Delivery]()  # handed out, not settled
        self._last: Delivery | None = None
        self._counters = dict.fromkeys(("received", "bytes_received", "redelivered", "repeated", "stale", "dead"), 0)
        jet.connection.connected = self._again
        jet.connection.last_words = self._give_back
        jet.connection.mailboxes.add(self)

    async def start(self, consumers: list[str], prefetch: int) -> None:
        connection = self._jet.connection
        await connection.tap(self._reply + "*", self._noted)
        self._pulls = [Pull(self._jet, self._stream, name, prefetch, self._bell.ring) for name in consumers]
        for pull in self._pulls:
            await pull.start()
        self._jet.spawn(self._keep())

    @property
    def native(self) -> Any:
        return self._jet.native

    def ring(self) -> None:
        self._bell.ring()
        self._ack_bell.ring()

    def arm(self, want: Want) -> Wait:
        if not want & Want.RECV:
            return self._ack_bell.arm()
        wait = self._bell.arm()
        return wait._replace(at_most=_ACK_SOON) if self._acks and self._jet.up else wait

    def try_get(self) -> Parcel | None:
        if self._auto and self._last is not None:
            self._settle(self._last, b"+ACK")
            self._last = None
        if self._jet.home.eager:
            self._bell.silence()
        delivery = self._take()
        if delivery is None:
            if self._late_acks() or not all(pull.asked for pull in self._pulls):
                self._jet.home.poke(self._ask_and_write)
            self._jet.home.turn()
            delivery = self._take()
            if delivery is None:
                self._check("recv")
                return None
        elif self._late_acks():
            self._jet.home.poke(self._write)
        return self._hand_out(delivery)

    def _late_acks(self) -> bool:
        """Whether acknowledgements have waited for others long enough. A call to the system costs more than all else here."""
        return bool(self._acks) and (
            self._confirm or len(self._acks) >= _ACKS or time.monotonic() - self._acks_since > self._ack_soon
        )

    def _check(self, operation: str) -> None:
        self._jet.check(operation)
        for pull in self._pulls:
            if pull.lost:
                raise errors.PeerError(
                    f"the group {pull.consumer!r} of the stream {self._stream!r} was deleted", url=self._jet.url
                )

    def _take(self) -> Delivery | None:
        for pull in self._pulls:
            while pull.buffer:
                delivery = pull.buffer.popleft()
                if pull.prefetch and pull.short():
                    self._jet.home.poke(pull.ask)
                if delivery.identity in self._done:
                    self._counters["repeated"] += 1
                    self._say(delivery, b"+ACK")
                elif delivery.forgotten:
                    pass  # it comes again
                elif time.monotonic() - delivery.at > self._ack_wait * 0.9:
                    self._counters["stale"] += 1  # somebody else gets it, or has it
                elif self._max_deliver and delivery_facts(delivery.message.reply)[1] > self._max_deliver:
                    self._jet.home.do(lambda buried=delivery: self._jet.spawn(self._bury(buried)))  # type: ignore[misc]
                else:
                    return delivery
        return None

    def _hand_out(self, delivery: Delivery) -> Parcel:
        message = delivery.message
        _, deliveries, sequence, _ = delivery_facts(message.reply)
        self._open.add(delivery)
        if self._auto:
            self._last = delivery
        counters = self._counters
        counters["received"] += 1
        counters["bytes_received"] += len(message.data)
        counters["redelivered"] += deliveries > 1
        return parcel_of(message, self._stream, sequence, redelivered=deliveries - 1, token=delivery)

    # settling

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        delivery: Delivery | None = parcel.token
        if delivery is None or delivery.settled:
            return True
        if verdict is Verdict.EXTEND:
            self._say(delivery, b"+WPI")
        elif verdict is Verdict.ACK:
            self._settle(delivery, b"+ACK")
        else:
            self._settle(delivery, b'-NAK {"delay":%d}' % int(delay * _NS) if delay > 0 else b"-NAK")
        return True

    def _settle(self, delivery: Delivery, word: bytes) -> None:
        if delivery.settled:
            return
        delivery.settled = True
        self._open.discard(delivery)
        if word == b"+ACK":
            self._done[delivery.identity] = None
            if len(self._done) > _DONE:
                self._done.pop(next(iter(self._done)), None)
        if not delivery.forgotten:
            self._say(delivery, word, confirm=self._confirm)

    def _say(self, delivery: Delivery, word: bytes, *, confirm: bool = False) -> None:
        reply = ""
        if confirm:
            self._number += 1
            reply = f"{self._reply}{self._number}"
        frame = command(delivery.message.reply, reply, word)
        if confirm:
            self._unconfirmed[self._number] = frame, delivery
        if not self._acks:
            self._acks_since = time.monotonic()
        self._acks.append(frame)

    def try_flush(self) -> bool:
        if self._acks:
            self._jet.home.poke(self._write)
        elif self._unconfirmed:
            self._jet.home.turn()
        if self._unconfirmed or self._acks:
            self._check("ack")
            return False
        return True

    # on the loop

    def _write(self) -> None:
        count = len(self._acks)  # further ones may be appended by another thread
        if count and self._jet.connection.write(b"".join(self._acks[:count])):
            self._said = time.monotonic()
            del self._acks[:count]

    def _ask_and_write(self) -> None:
        self._write()
        for pull in self._pulls:
            if not pull.asked:
                pull.ask()

    def _noted(self, message: Any) -> None:
        if (message.headers or {}).get("Status") == "503":
            return  # nobody there who could note it: said again later
        self._confirmed(int(message.subject.rpartition(".")[2]))

    def _confirmed(self, number: int) -> None:
        self._unconfirmed.pop(number, None)
        if not self._unconfirmed:
            self._ack_bell.ring()

    def _again(self) -> None:
        """Connected again: first of all, what does the server know?"""
        self._generation += 1
        for pull in self._pulls:
            pull.paused = True
        self._jet.spawn(self._resume(self._generation))

    async def _resume(self, generation: int) -> None:
        await self._reconcile()
        if generation == self._generation:
            for pull in self._pulls:
                pull.paused = False
                pull.again()
            self.ring()

    async def _reconcile(self) -> None:
        handed_out = [*self._open, *(delivery for _, delivery in self._unconfirmed.values())]
        for pull in self._pulls:
            await pull.reconcile(handed_out)
        for number, (_, delivery) in list(self._unconfirmed.items()):
            if delivery.forgotten:
                self._confirmed(number)
        self._repeat()

    def _repeat(self) -> None:
        self._acks.extend([frame for frame, _ in self._unconfirmed.values()])  # said twice it is harmless
        self._write()

    async def _keep(self) -> None:
        looked_after = time.monotonic()
        while True:
            await asyncio.sleep(_TICK)
            try:
                now = time.monotonic()
                self._write()
                if self._unconfirmed and now - self._said > _RESEND:
                    await self._reconcile()
                if now - looked_after > self._ack_wait / 3:
                    looked_after = now
                    self._look_after(now)
                for pull in self._pulls:
                    await pull.tick()
            except Exception as error:  # the connection broke in the midst of it; the next tick finds another
                self._jet.connection.error = error

    def _look_after(self, now: float) -> None:
        """What lies here unasked for must not go to somebody else as well."""
        waiting = [d for pull in self._pulls for d in tuple(pull.buffer) if now - d.at < self._ack_wait * 0.9]
        lines = b"".join(command(d.message.reply, "", b"+WPI") for d in waiting)
        if lines and self._jet.connection.write(lines):
            for delivery in waiting:
                delivery.at = now

    async def _bury(self, delivery: Delivery) -> None:
        """Copy it to the stream of the dead, then give it up. Killed in between, it is copied again, with its id."""
        message = delivery.message
        facts = delivery_facts(message.reply)
        headers = dict(message.headers or {})
        id = f"{headers.pop(MSG_ID, '')}@{self._stream}.{facts[0]}.{facts[2]}"
        headers = {name: value for name, value in headers.items() if not name.startswith("Nats-")}
        headers |= {"x-dead-from": self._stream, "x-dead-group": facts[0], "x-dead-deliveries": str(facts[1] - 1)}
        await self._jet.insist(f"{self._stream}-dead", message.data, header_block(self._jet.url, id, headers))
        self._counters["dead"] += 1
        self._say(delivery, b"+TERM", confirm=True)
        self._write()

    async def _give_back(self) -> None:
        """Before the connection closes: everything that was not acknowledged goes to somebody else, now."""
        self._write()
        for pull in self._pulls:
            pull.hush()
            self._open.update(tuple(pull.buffer))
            pull.buffer.clear()
        self._jet.connection.write(
            b"".join(command(d.message.reply, "", b"-NAK") for d in tuple(self._open) if not d.settled)
        )
        await self._jet.connection.round_trip()  # and those that were on their way were given back on the way

    def counters(self) -> Mapping[str, int]:
        return self._counters | {"reconnects": self._jet.connection.reconnects}

    def close(self) -> None:
        self._jet.connection.mailboxes.discard(self)
        self._jet.close()
        self._bell.close()
        self._ack_bell.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()
        self._bell.close()
        self._ack_bell.close()


# -- opening --------------------------------------------------------------------------------------------------------


def sender(url: Url, options: QueueOptions) -> Steps[Outlet]:
    stream = stream_name(url)
    subjects = [stream] + [f"{stream}.p{lane}" for lane in range(1, options.lanes)]

    def subject(parcel: Parcel) -> tuple[str, str]:
        if not 0 <= parcel.priority < options.lanes:
            raise errors.Unsupported(
                f"priority {parcel.priority}, and there are {options.lanes} lanes",
                url=url,
                operation="send",
                hint="lanes=4 in the URL of senders and receivers has priorities 0 to 3",
            )
        return subjects[parcel.priority], ""

    jet = yield from open_jet(url, options, "sender")

    async def begin() -> JetOutlet:
        info = await ensure_stream(jet, stream, options)
        outlet = JetOutlet(jet, subject, options.limit, info["config"]["duplicate_window"] / _NS)
        await outlet.start()
        return outlet

    return (yield from opening(jet, begin, "sender"))


def receiver(url: Url, options: QueueOptions, terms: QueueTerms) -> Steps[Intake]:
    stream, group = stream_name(url), group_name(url, terms.group)
    jet = yield from open_jet(url, options, "receiver")

    async def begin() -> JetIntake:
        await ensure_stream(jet, stream, options)
        if options.max_deliver:
            await ensure_stream(jet, f"{stream}-dead", JetOptions(replicas=options.replicas))
        lanes = [(group, [])] if options.lanes == 1 else _lanes(stream, group, options.lanes)
        prefetch = prefetch_of(options, 0 if options.max_deliver else _PREFETCH, len(lanes))
        return await join(jet, stream, lanes, options, "all", prefetch, terms.manual, options.max_deliver)

    return (yield from opening(jet, begin, "receiver"))


def prefetch_of(options: JetOptions, otherwise: int = _PREFETCH, lanes: int = 1) -> int:
    prefetch = otherwise if options.prefetch is None else options.prefetch
    return max(prefetch // lanes, 1) if prefetch else 0


async def join(
    jet: Jet,
    stream: str,
    consumers: list[tuple[str, list[str]]],
    options: JetOptions,
    replay: str,
    prefetch: int,
    manual: bool,
    max_deliver: int | None = None,
    *,
    auto: bool = False,
) -> JetIntake:
    """An Intake over these durable consumers."""
    ack_wait = float("inf")
    for name, filters in consumers:
        info = await ensure_consumer(jet, stream, name, options, filters, options.replay or replay)
        ack_wait = min(ack_wait, info["config"]["ack_wait"] / _NS)
    intake = JetIntake(jet, stream, manual=manual, ack_wait=ack_wait, max_deliver=max_deliver, auto=auto)
    await intake.start([name for name, _ in consumers], prefetch)
    return intake


def _lanes(stream: str, group: str, lanes: int) -> list[tuple[str, list[str]]]:
    urgent = [(f"{group}-p{lane}", [f"{stream}.p{lane}"]) for lane in range(lanes - 1, 0, -1)]
    return [*urgent, (f"{group}-p0", [stream])]
