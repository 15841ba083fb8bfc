"""Queue: each message to one of the receivers that compete for it.

    with ipckit.sender("redis://localhost/0/jobs") as jobs:
        jobs.send(b"resize 17")
    with ipckit.receiver("redis://localhost/0/jobs", group="workers", ack="manual") as jobs:
        for job in jobs:
            handle(job.value); job.ack()

As in `channel`: the logic once (`_Sending`, `_Receiving`), the shells one line per verb. A transport that has queues of its own
brings an Outlet and an Intake; the others get them over links from `_linkqueue`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, overload

from . import _options, errors
from ._endpoint import Endpoint, Opening, Yielding, body_of, confirm, located, put, put_all
from ._spi import Draining, Intake, Outlet, Queues, QueueTerms, SidedQueues, Steps, Want
from ._taking import M, Taking, Wrap
from ._url import Url
from ._wait import Lane, arun, run
from .codecs import Codec
from .message import AsyncMessage, Message, Parcel, Verdict, check_headers, check_id, new_id

T = TypeVar("T")
Ack = Literal["auto", "manual"]


class _Sending:
    """The sending verbs as steps over an Outlet."""

    __slots__ = ("_outlet", "_url")

    def __init__(self, outlet: Outlet, url: Url) -> None:
        self._outlet, self._url = outlet, url

    def send(self, parcel: Parcel) -> Steps[str]:
        yield from put(self._outlet, parcel)
        yield from confirm(self._outlet, (parcel,), self._url, "send")
        return parcel.id

    def send_many(self, parcels: Sequence[Parcel]) -> Steps[int]:
        return put_all(self._outlet, parcels, self._url, "send")

    def drain(self) -> Steps[None]:
        outlet = self._outlet
        while isinstance(outlet, Draining) and not outlet.try_drain():
            wait = self._outlet.arm(Want.RECV)
            if outlet.try_drain():
                return
            yield wait


class _Receiving(Taking):
    """The receiving verbs as steps over an Intake.

    `auto`: what was handed out is acknowledged when the next is asked for, so that a crash in between redelivers it.
    """

    __slots__ = ("_auto", "_open")

    def __init__(self, intake: Intake, url: Url, decode: Callable[[bytes], Any], manual: bool) -> None:
        super().__init__(intake, url, decode)
        self._auto = not manual
        self._open: list[Parcel] = []

    def recv(self, wrap: Wrap[M]) -> Steps[M]:
        yield from self.finish()
        return (yield from super().recv(wrap))

    def _hand_out(self, parcel: Parcel) -> None:
        if self._auto:
            self._open.append(parcel)

    def finish(self) -> Steps[None]:
        """Acknowledge what was handed out automatically."""
        while self._open:
            parcel = self._open[0]
            yield from self._settle(parcel, Verdict.ACK, 0.0)
            self._settled(parcel)

    def settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> Steps[None]:
        yield from self._settle(parcel, verdict, delay)
        while not self._intake.try_flush():
            wait = self._intake.arm(Want.SEND)
            if self._intake.try_flush():
                break
            yield wait
        self._settled(parcel)

    def _settled(self, parcel: Parcel) -> None:
        with suppress(ValueError):  # by another thread as well
            self._open.remove(parcel)

    def _settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> Steps[None]:
        while not self._intake.try_settle(parcel, verdict, delay):
            wait = self._intake.arm(Want.SEND)
            if self._intake.try_settle(parcel, verdict, delay):
                break
            yield wait


class _BaseSender(Endpoint, Generic[T]):
    def __init__(self, outlet: Outlet, opening: Opening) -> None:
        super().__init__(outlet, located(outlet, opening.url), opening.capabilities)
        self._outlet = outlet
        self._steps = _Sending(outlet, opening.url)
        self._encode: Callable[[T], Any] = opening.codec.encode
        self._lane = Lane(self._gate, "send")

    def _parcel(self, value: T, id: str | None, headers: Mapping[str, str] | None, priority: int) -> Parcel:
        return Parcel(
            body_of(self._encode(value)),
            new_id() if id is None else check_id(id, self.url),
            check_headers(headers, self.url),
            priority,
        )

    def stats(self) -> Mapping[str, int]:
        """Counters since it was opened: "sent", "bytes_sent", and what the transport adds ("reconnects" ...)."""
        return dict(self._outlet.counters())


class Sender(_BaseSender[T]):
    """The sending side of a queue, for threads. Raises Closed, Timeout, PeerDied, QueueFull, MessageTooLarge."""

    def send(
        self,
        value: T,
        timeout: float | None = None,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        priority: int = 0,
    ) -> str:
        """Send one message; returns its id.

        Returns when somebody who outlives this process has it, where there is somebody (a broker, the kernel).

        Raises: OutcomeUnknown with the id when that was not confirmed in time: sending again with `id=` it makes no duplicate.
        """
        return run(self._steps.send(self._parcel(value, id, headers, priority)), self._lane, timeout)

    def send_many(self, values: Sequence[T], timeout: float | None = None) -> int:
        """Send them all, confirmed together. Returns how many, which is fewer only when the time was up.

        Raises: OutcomeUnknown, whose `message_ids` are those of the values that left, the first ones; send each of them again by
            `send` with its id, and the others anew.
        """
        return run(self._steps.send_many([self._parcel(v, None, None, 0) for v in values]), self._lane, timeout)

    def drain(self, timeout: float | None = None) -> None:
        """Return when nothing that was sent depends on this process any more. Raises Timeout; nothing is lost by it.

        Where nobody outlives it (queues over links) that is when receivers have acknowledged everything; a broker
        or the kernel has everything when `send` returns, and this returns at once.
        """
        run(self._steps.drain(), self._lane, timeout)

    def close(self) -> None:
        self._close()

    def __enter__(self) -> Sender[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncSender(_BaseSender[T]):
    """`Sender`, awaited."""

    async def send(
        self,
        value: T,
        timeout: float | None = None,
        *,
        id: str | None = None,
        headers: Mapping[str, str] | None = None,
        priority: int = 0,
    ) -> str:
        return await arun(self._steps.send(self._parcel(value, id, headers, priority)), self._lane, timeout)

    async def send_many(self, values: Sequence[T], timeout: float | None = None) -> int:
        return await arun(self._steps.send_many([self._parcel(v, None, None, 0) for v in values]), self._lane, timeout)

    async def drain(self, timeout: float | None = None) -> None:
        await arun(self._steps.drain(), self._lane, timeout)

    async def close(self) -> None:
        self._close()

    async def __aenter__(self) -> AsyncSender[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _BaseReceiver(Endpoint, Generic[T]):
    def __init__(self, intake: Intake, opening: Opening, terms: QueueTerms) -> None:
        super().__init__(intake, located(intake, opening.url), opening.capabilities)
        self._intake = intake
        self._steps = _Receiving(intake, self.url, opening.codec.decode, terms.manual)
        self._rx = Lane(self._gate, "recv")
        self._tx = Lane(self._gate, "ack")

    def stats(self) -> Mapping[str, int]:
        """Counters since it was opened: "received", "bytes_received", and what the transport adds ("redelivered" ...)."""
        return dict(self._intake.counters())


class Receiver(_BaseReceiver[T]):
    """The receiving side of a queue, for threads."""

    def recv(self, timeout: float | None = None) -> Message[T]:
        """The next message. With `ack="auto"` this acknowledges the one before.

        Raises: SchemaError or CodecError for a body that is not what was declared. `error.undecoded` is that message: with
            `ack="manual"` settle it; else it is acknowledged like any other.
        """
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
        """Immediate. What was handed out and not acknowledged is handed out again, to somebody else."""
        self._close()

    def __iter__(self) -> Iterator[Message[T]]:
        """Messages until `close()`, or until the sender closes where there is only one (a Channel in place of a URL)."""
        try:
            while True:
                yield self.recv()
        except (errors.Closed, errors.PeerClosed):
            return

    def __enter__(self) -> Receiver[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.closed:
                run(self._steps.finish(), self._tx, None)
        finally:
            self.close()


class AsyncReceiver(_BaseReceiver[T]):
    """`Receiver`, awaited."""

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

    async def __aenter__(self) -> AsyncReceiver[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self.closed:
                await arun(self._steps.finish(), self._tx, None)
        finally:
            await self.close()


# -- opening ------------------------------------------------------------------------------------------------------


class _QueueOpening(Opening):
    def __init__(
        self,
        url: str | Url | Yielding,
        codec: str | Codec[Any] | None,
        type: Any,
        require: Collection[str],
        operation: str,
    ) -> None:
        super().__init__(url, codec, type, require, "queue", operation)
        transport = self.transport
        self._native = (
            transport if isinstance(transport, Queues) and self.end is None and transport.serves(self.url) else None
        )
        if self._native is not None:
            self.options = _options.read(self._native.queue_options, self.url)
        else:
            from . import _linkqueue

            self.own, self.options = _options.read_both(_linkqueue.Options, self.transport.options, self.url)

    def sender(self, listen: bool) -> Steps[Outlet]:
        if isinstance(self._native, SidedQueues):
            return self._native.sender(self.url, self.options, listen)
        if self._native is not None:
            return self._native.sender(self.url, self.options)
        from . import _linkqueue

        if self.end is not None:
            return _linkqueue.sender_over(self.url, self.end.yield_link(self.operation))
        return _linkqueue.sender(self.transport, self.url, self.options, self.own, listen)

    def receiver(self, listen: bool, terms: QueueTerms) -> Steps[Intake]:
        if isinstance(self._native, SidedQueues):
            return self._native.receiver(self.url, self.options, terms, listen)
        if self._native is not None:
            return self._native.receiver(self.url, self.options, terms)
        from . import _linkqueue

        if self.end is not None:
            return _linkqueue.receiver_over(self.url, self.end.yield_link(self.operation), self.own)
        return _linkqueue.receiver(self.transport, self.url, self.options, self.own, terms, listen)


@overload
def sender(
    url: str | Url | Yielding, *, listen: bool = False, timeout: float | None = None, require: Collection[str] = ()
) -> Sender[bytes]: ...
@overload
def sender(
    url: str | Url | Yielding,
    *,
    listen: bool = False,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Sender[T]: ...
@overload
def sender(
    url: str | Url | Yielding,
    *,
    listen: bool = False,
    timeout: float | None = None,
    codec: str | Codec[Any],
    require: Collection[str] = (),
) -> Sender[Any]: ...
def sender(
    url: str | Url | Yielding,
    *,
    listen: bool = False,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Sender[Any]:
    """Open the sending side of a queue.

    Args:
        url: where; or a Channel, such as one end of `ipckit.pair("pipe://")`: its link is taken over, the other end's party does
            the same, and the channel itself is closed. When the link ends, so does the queue: PeerClosed, PeerDied.
        listen: on transports without a place of their own for messages (unix, tcp, shm, ...), which side has the name: one
            sender that listens feeds many receivers, one receiver that listens is fed by many senders. Others have no sides.
        timeout: seconds to reach what must be there; None waits.
        codec, type, require: as in `ipckit.listen`.
    """
    opening = _QueueOpening(url, codec, type, require, "sender")
    return Sender(opening.run(opening.sender(listen), timeout), opening)


@overload
def receiver(
    url: str | Url | Yielding,
    *,
    group: str | None = None,
    ack: Ack = "auto",
    listen: bool = True,
    timeout: float | None = None,
    require: Collection[str] = (),
) -> Receiver[bytes]: ...
@overload
def receiver(
    url: str | Url | Yielding,
    *,
    group: str | None = None,
    ack: Ack = "auto",
    listen: bool = True,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Receiver[T]: ...
@overload
def receiver(
    url: str | Url | Yielding,
    *,
    group: str | None = None,
    ack: Ack = "auto",
    listen: bool = True,
    timeout: float | None = None,
    codec: str | Codec[Any],
    require: Collection[str] = (),
) -> Receiver[Any]: ...
def receiver(
    url: str | Url | Yielding,
    *,
    group: str | None = None,
    ack: Ack = "auto",
    listen: bool = True,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Receiver[Any]:
    """Open the receiving side of a queue.

    Args:
        url: where; or a Channel, such as one end of `ipckit.pair("pipe://")`: its link is taken over, the other end's party does
            the same, and the channel itself is closed. When the link ends, so does the queue: PeerClosed, PeerDied.
        group: receivers of one group share the messages; each group gets them all (capability `consumer_groups`).
        ack: "auto" acknowledges a message when the next one is asked for, by whomever: threads or tasks that share a receiver
            take "manual", which leaves it to `Message.ack`.
        listen: see `sender`; by default receivers have the name.
        timeout: seconds to reach what must be there; None waits.
        codec, type, require: as in `ipckit.listen`.
    """
    opening = _QueueOpening(url, codec, type, require, "receiver")
    terms = _terms(opening, group, ack)
    return Receiver(opening.run(opening.receiver(listen, terms), timeout), opening, terms)


def _terms(opening: Opening, group: str | None, ack: Ack) -> QueueTerms:
    if ack not in ("auto", "manual"):
        raise errors.BadOption(f"ack={ack!r} must be 'auto' or 'manual'", url=opening.url, operation="receiver")
    if group is not None and not opening.capabilities.consumer_groups:
        raise errors.Unsupported(
            "this transport has no consumer groups", url=opening.url, operation="receiver", hint="leave group= out"
        )
    return QueueTerms(group=group, manual=ack == "manual")


async def asender(
    url: str | Url | Yielding,
    *,
    listen: bool = False,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T] | None = None,
    require: Collection[str] = (),
) -> AsyncSender[T]:
    """`sender`, awaited."""
    opening = _QueueOpening(url, codec, type, require, "sender")
    return AsyncSender(await opening.arun(opening.sender(listen), timeout), opening)


async def areceiver(
    url: str | Url | Yielding,
    *,
    group: str | None = None,
    ack: Ack = "auto",
    listen: bool = True,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T] | None = None,
    require: Collection[str] = (),
) -> AsyncReceiver[T]:
    """`receiver`, awaited."""
    opening = _QueueOpening(url, codec, type, require, "receiver")
    terms = _terms(opening, group, ack)
    return AsyncReceiver(await opening.arun(opening.receiver(listen, terms), timeout), opening, terms)
