"""One client's connection, at the server: what it may ask for, calls, streams, subscriptions. `protocol` has the rest."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ..errors import ProtocolError
from . import events
from ._rate import Bucket
from .dialects import Dialect, Native
from .envelope import Envelope
from .events import WINDOW, Event, Failure
from .protocol import UNLIMITED, Core, Stream

#: Types that one client may subscribe to: what it asks for is kept here.
_MOST_TYPES = 10_000

#: What a client may be refused. The other events belong to calls that were let in.
_Asking: TypeAlias = (
    events.Call | events.Subscribe | events.Unsubscribe | events.Discover | events.Heartbeat | events.Malformed
)
_ASKING = typing.get_args(_Asking)

#: What a core counts.
CORE_COUNTS = ("rate_limited", "shutdown_rejections", "backpressure_rejections", "subscriptions_processed")


class ServerCall(Stream):
    """A call as the server has it.

    Attributes:
        cancelled: why nobody waits for it any more ("cancelled", "deadline", "disconnected"), or None.
        credit: bytes of items that may be sent; send while it is above zero.
    """

    __slots__ = (
        "body",
        "cancelled",
        "metadata",
        "method",
        "oneway",
        "reply",
        "reply_to",
        "stream",
        "target",
        "unanswered",
    )

    def __init__(self, event: events.Call, credit: int, now: float) -> None:
        super().__init__(event.id, credit, None if event.ttl is None else now + event.ttl)
        self.target = event.target
        self.method = event.method
        self.body = event.body
        self.metadata = event.metadata
        self.reply = event.id != 0
        self.stream = event.stream
        self.oneway = event.oneway
        self.reply_to = event.reply_to
        self.unanswered = False  # under way, and counted as such, although nobody waits for it
        self.cancelled: str | None = None


class Started(NamedTuple):
    """A new call: run its handler, and tell the core what comes of it; at the end `finish` it."""

    call: ServerCall


class Changed(NamedTuple):
    """A call has more input or credit, or was cancelled."""

    call: Stream


class ServerCore(Core[ServerCall]):
    """One client's connection, at the server.

    `targets`: asked for the fingerprints when a client says hello. `max_calls`: handlers that may run for this client at once.
    `rate`: what it may ask for. `counts`: where refusals and subscriptions are counted.

    Attributes:
        refused: requests above the rate, since the shell last set it to 0.
        freed: calls that were waiting for the answers before theirs, and may go on; for the shell, to tell and to clear.
    """

    def __init__(
        self,
        dialect: Dialect | None = None,
        *,
        targets: Callable[[], Mapping[str, str]] = dict,
        window: int = WINDOW,
        max_calls: int = 1000,
        rate: Bucket | None = None,
        counts: dict[str, int] | None = None,
    ) -> None:
        super().__init__(dialect or Native(), window)
        self._envelope = dialect if isinstance(dialect, Envelope) else None
        self._rate = rate
        self._counts = counts if counts is not None else dict.fromkeys(CORE_COUNTS, 0)
        self.refused = 0
        self._unanswered = 0
        self.freed: list[ServerCall] = []
        self._targets = targets
        self._max_calls = max_calls
        self.leaving = False
        self.subscribed: set[str] = set()
        self._missed: dict[str, int] = {}

    def receive(self, frame: bytes, now: float) -> list[Started | Changed | events.Discover]:
        """Raises ProtocolError; the connection is to be closed then."""
        happened: list[Started | Changed | events.Discover] = []
        for event in self.dialect.decode(frame):
            if not isinstance(event, _ASKING) or self._admitted(event, now):
                self._heard(event, now, happened)
        return happened

    def _admitted(self, event: _Asking, now: float) -> bool:
        """First it matters whether we are leaving, then the rate, and only then what was asked."""
        id = 0 if isinstance(event, events.Heartbeat) else event.id
        if self.leaving:
            if isinstance(event, events.Heartbeat):
                return True
            self._refuse(id, "SHUTTING_DOWN", "the server takes no new calls")
            return False
        if self._rate is None or not (wait := self._rate.take(now)):
            return True
        self._counts["rate_limited"] += 1
        self.refused += 1
        if id or isinstance(event, events.Heartbeat):
            self._say(Failure(id, "RATE_LIMITED", "more requests than the server allows", retry_after=wait))
        return False

    def _heard(self, event: Event, now: float, happened: list[Started | Changed | events.Discover]) -> None:
        call: ServerCall | None = None
        if isinstance(event, events.Call):
            if (started := self.begin(event, now)) is not None:
                happened.append(Started(started))
        elif isinstance(event, events.Item):
            call = self._arrived(event)
        elif isinstance(event, events.Credit):
            call = self._credited(event)
        elif isinstance(event, events.End):
            call = self.calls.get(event.id)
            if call is not None:
                call.inbox_ended = True
        elif isinstance(event, events.Cancel):
            call = self.calls.get(event.id)
            if call is not None:
                self._drop(call, "cancelled")
        elif isinstance(event, events.Hello):
            self._greeted(event)
            self._say(events.Hello(self.window, dict(self._targets())))
        elif isinstance(event, events.Heartbeat):
            self._say(event)
        elif isinstance(event, events.Subscribe | events.Unsubscribe):
            self._subscription(event)
        elif isinstance(event, events.Discover):
            happened.append(event)
        elif isinstance(event, events.Malformed):
            self._say(Failure(event.id, "CODEC", event.why))
        else:
            raise ProtocolError(f"a client sent {type(event).__name__}")
        if call is not None:
            happened.append(Changed(call))

    def begin(self, event: events.Call, now: float) -> ServerCall | None:
        """A call from here on under way, or refused."""
        if event.id in self.calls:
            raise ProtocolError(f"the call {event.id} is under way already")
        if self.leaving:
            self._refuse(event.id, "SHUTTING_DOWN", "the server takes no new calls")
        elif (under_way := len(self.calls) + self._unanswered) >= self._max_calls:
            self._refuse(event.id, "TARGET_BUSY", f"{under_way} calls of this connection are under way")
        else:
            return self.adopt(event, now)
        return None

    def adopt(self, event: events.Call, now: float) -> ServerCall:
        """A call that has been let in, whatever has become of us since: its handler may be running already."""
        held = self._envelope is not None and self._envelope.waits(event.id)
        call = ServerCall(event, 0 if held else self._peer_window, now)
        if call.reply:
            self._register(call)
        else:
            self._count_unanswered(call)
        return call

    def _say(self, event: Event) -> None:
        super()._say(event)
        if self._envelope is not None:
            for id in self._envelope.released():
                if (call := self.calls.get(id)) is not None:
                    call.credit = UNLIMITED
                    self.freed.append(call)

    def accept(self, call: ServerCall) -> None:
        """It has found its handler. Where it is `oneway`, its caller hears no more, and may go."""
        if call.oneway:
            self._say(events.Accepted(call.id))
            call.reply = False
            self.calls.pop(call.id, None)
            self._count_unanswered(call)

    def _count_unanswered(self, call: ServerCall) -> None:
        call.unanswered = True
        self._unanswered += 1

    def _refuse(self, id: int, code: str, why: str) -> None:
        self._counts["shutdown_rejections" if code == "SHUTTING_DOWN" else "backpressure_rejections"] += 1
        if id:
            self._say(Failure(id, code, why))

    def _subscription(self, event: events.Subscribe | events.Unsubscribe) -> None:
        self._counts["subscriptions_processed"] += 1
        if isinstance(event, events.Subscribe):
            if len(self.subscribed) + len(event.types) > _MOST_TYPES:
                self._refuse(event.id, "TARGET_BUSY", f"nobody subscribes to more than {_MOST_TYPES} types")
                return
            self.subscribed.update(event.types)
        else:
            self.subscribed.difference_update(event.types or tuple(self.subscribed))
        if event.id:
            self._say(events.Result(event.id, self.listing()))

    def listing(self) -> bytes:
        """The subscribed types, as a body."""
        import msgspec

        types = sorted(self.subscribed)
        return msgspec.msgpack.encode(types) if self.dialect.format == "msgpack" else msgspec.json.encode(types)

    # What handlers come to. Nothing is sent for a call that is over.

    def result(self, call: ServerCall, body: bytes) -> None:
        if self._last(call):
            self._say(events.Result(call.id, body))

    def fail(self, call: ServerCall, failure: Failure) -> None:
        if self._last(call):
            self._say(failure)

    def end(self, call: ServerCall) -> None:
        """The stream of results is complete."""
        if self._last(call):
            self._say(events.End(call.id))

    def item(self, call: ServerCall, body: bytes) -> bool:
        """One more of a stream of results. False: nobody wants it any more."""
        self.outbox.extend(self.item_frames(call, body))
        return not call.done

    def item_frames(self, call: ServerCall, body: bytes) -> Sequence[bytes]:
        """`item`, for who sends its frames itself. None of them: nobody wants it any more."""
        return () if call.done else self._item_frames(call, body)

    def _last(self, call: ServerCall) -> bool:
        if call.done:
            return False
        call.done = True
        return call.reply

    def finish(self, call: ServerCall) -> None:
        """Its handler has returned."""
        call.done = True
        self.calls.pop(call.id, None)
        if call.unanswered:
            call.unanswered = False
            self._unanswered -= 1

    def push(self, type: str, body: bytes) -> bool:
        """To this client, if it subscribed to the type."""
        if type not in self.subscribed:
            return False
        self._say(events.Push(type, body, self._missed.pop(type, 0)))
        return True

    def miss(self, type: str) -> bool:
        """It did not keep up: this one is dropped, and the next that it is sent tells it. True if it subscribed to the type."""
        if type in self.subscribed:
            self._missed[type] = min(self._missed.get(type, 0) + 1, 0xFFFFFFFF)
        return type in self.subscribed

    def say(self, event: Event) -> None:
        """An answer of the shell's own, such as `Discovered`."""
        self._say(event)

    # What time and the world do.

    def expire(self, now: float) -> list[ServerCall]:
        """The calls whose deadline has passed: answered, and cancelled."""
        found = self._overdue(now)
        for call in found:
            self.fail(call, Failure(call.id, "DEADLINE_EXCEEDED", "the server did not finish in time"))
            self._drop(call, "deadline")
        return found

    def goodbye(self) -> None:
        """Take no new calls."""
        if not self.leaving:
            self.leaving = True
            self._say(events.Goodbye())

    def abort(self) -> list[ServerCall]:
        """The drain is over: what still runs is cancelled, and its callers are told."""
        for call in self.calls.values():
            self.fail(call, Failure(call.id, "SHUTTING_DOWN", "the server shut down before the call was done"))
        return self.lost("shutdown")

    def lost(self, why: str = "disconnected") -> list[ServerCall]:
        """The connection is gone: every call is cancelled."""
        found = [call for call in self.calls.values() if call.cancelled is None]
        for call in found:
            self._drop(call, why)
        return found

    def _too_large(self, failure: Failure) -> None:
        call = self.calls.get(failure.id)
        if call is not None:
            self._drop(call, "its answer is too large")
        if failure.id:
            self.outbox.extendleft(reversed(self.dialect.encode(failure)))

    def _drop(self, call: ServerCall, why: str) -> None:
        call.done = True
        call.inbox.clear()
        if call.cancelled is None:
            call.cancelled = why
