"""The state machines of a connection: `ClientCore` and `ServerCore`. No I/O, no clock, no thread.

Frames and the time go in; what happened comes out as return values, and frames to be sent gather in `outbox`. The shells move the
frames, run the handlers, and have a lock: a core is used by one thread at a time.

A call lives from `Call` to the first of `Result`, `Failure` and the server's `End`; whatever comes for it later is passed
over, because cancels, deadlines and answers cross on their way. Streams are held by credits in bytes: a producer may send
while it has any left (so one item of any size always fits), and the consumer gives back what it has consumed, in lumps of
half a window.
"""

from __future__ import annotations

import heapq
import itertools
import typing
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from ..errors import ProtocolError
from . import events
from ._rate import Bucket
from .dialects import Dialect, Native
from .envelope import Envelope
from .events import WINDOW, Event, Failure

_UNLIMITED = 1 << 62
#: Correlation ids are 32 bits; 0 is for calls that want no answer.
_LAST_ID = 0xFFFFFFFF
#: Types that one client may subscribe to: what it asks for is kept here.
_MOST_TYPES = 10_000


class _Stream:
    """What the calls of both sides have: an inbox, and credit for what is sent."""

    __slots__ = ("_owed", "_unread", "credit", "deadline", "done", "id", "inbox", "inbox_ended", "watchers")

    def __init__(self, id: int, credit: int, deadline: float | None) -> None:
        self.id = id
        self.deadline = deadline
        self.inbox: deque[events.Item] = deque()
        self.inbox_ended = False
        self.credit = credit
        self.done = False  # on the wire: nothing is sent or heard any more
        self.watchers: list[Callable[[], None]] = []  # the shell's: something has changed
        self._unread = 0
        self._owed = 0

    def changed(self) -> None:
        """For the shell: tell whoever waits for something of this call. Not under a lock."""
        for each in tuple(self.watchers):
            each()


class ServerCall(_Stream):
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


class ClientCall(_Stream):
    """A call as the client has it. Once `done`: a `result`, a `failure`, a `complete` stream; or the connection was lost."""

    __slots__ = ("complete", "failure", "result")

    def __init__(self, id: int, credit: int, deadline: float | None) -> None:
        super().__init__(id, credit, deadline)
        self.result: bytes | None = None
        self.failure: Failure | None = None
        self.complete = False


C = TypeVar("C", bound=_Stream)


class _Core(Generic[C]):
    def __init__(self, dialect: Dialect, window: int) -> None:
        self.dialect = dialect
        self.window = window
        self.outbox: deque[bytes] = deque()
        self.calls: dict[int, C] = {}
        self._peer_window = WINDOW if dialect.flow else _UNLIMITED
        self._deadlines: list[tuple[float, int]] = []

    def _say(self, event: Event) -> None:
        self.outbox.extend(self.dialect.encode(event))

    def _register(self, call: C) -> None:
        self.calls[call.id] = call
        if call.deadline is not None:
            heapq.heappush(self._deadlines, (call.deadline, call.id))
            if len(self._deadlines) > 2 * len(self.calls) + 64:  # mostly of calls that are long over
                self._deadlines = [each for each in self._deadlines if each[1] in self.calls]
                heapq.heapify(self._deadlines)

    def unsendable(self, why: str) -> None:
        """The first frame of the outbox is more than the link takes: it is dropped, and its call fails."""
        whose = self.dialect.whose(self.outbox.popleft())
        self._too_large(Failure(whose, "TOO_LARGE", why))

    def _too_large(self, failure: Failure) -> None:
        raise NotImplementedError

    @property
    def next_deadline(self) -> float | None:
        """When `expire` has something to do, on the clock of `now`."""
        while self._deadlines:
            when, id = self._deadlines[0]
            call = self.calls.get(id)
            if call is not None and not call.done:
                return when
            heapq.heappop(self._deadlines)
        return None

    def _overdue(self, now: float) -> list[C]:
        found = []
        while (when := self.next_deadline) is not None and when <= now:
            found.append(self.calls[heapq.heappop(self._deadlines)[1]])
        return found

    def _greeted(self, hello: events.Hello) -> None:
        if hello.version != 1:
            raise ProtocolError(f"the peer speaks version {hello.version} of the call protocol, we speak 1")
        if not 0 < hello.window < _UNLIMITED:
            raise ProtocolError(f"a window of {hello.window} bytes")
        self._peer_window = hello.window

    def _arrived(self, item: events.Item) -> C | None:
        """Into the inbox of its call. None: nobody wants it any more."""
        call = self.calls.get(item.id)
        if call is None or call.done or call.inbox_ended:
            return None
        if self.dialect.flow and call._unread >= self.window:
            raise ProtocolError("more of a stream was sent than the window allows")
        call._unread += item.cost
        call.inbox.append(item)
        return call

    def take(self, call: C) -> bytes | None:
        """The next item of the inbox, or None when there is none now. Gives credit back."""
        if not call.inbox:
            return None
        item = call.inbox.popleft()
        call._unread -= item.cost
        call._owed += item.cost
        if call._owed * 2 >= self.window and self.dialect.flow and not call.done and not call.inbox_ended:
            self._say(events.Credit(call.id, call._owed))
            call._owed = 0
        return item.body

    def _item_frames(self, call: C, body: bytes) -> Sequence[bytes]:
        frames = self.dialect.encode(events.Item(call.id, body))
        if self.dialect.flow:
            call.credit -= sum(map(len, frames))
        return frames

    def _credited(self, event: events.Credit) -> C | None:
        call = self.calls.get(event.id)
        if call is None or call.done:
            return None
        call.credit = min(call.credit + event.count, _UNLIMITED)
        return call


# -- the server's side ------------------------------------------------------------------------------------------------

#: What a client may be refused. The other events belong to calls that were let in.
_Asking: TypeAlias = (
    events.Call | events.Subscribe | events.Unsubscribe | events.Discover | events.Heartbeat | events.Malformed
)
_ASKING = typing.get_args(_Asking)

#: What a core counts.
CORE_COUNTS = ("rate_limited", "shutdown_rejections", "backpressure_rejections", "subscriptions_processed")


class Started(NamedTuple):
    """A new call: run its handler, and tell the core what comes of it; at the end `finish` it."""

    call: ServerCall


class Changed(NamedTuple):
    """A call has more input or credit, or was cancelled."""

    call: _Stream


class ServerCore(_Core[ServerCall]):
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
            held = self._envelope is not None and self._envelope.waits(event.id)
            call = ServerCall(event, 0 if held else self._peer_window, now)
            if call.reply:
                self._register(call)
            else:
                self._count_unanswered(call)
            return call
        return None

    def _say(self, event: Event) -> None:
        super()._say(event)
        if self._envelope is not None:
            for id in self._envelope.released():
                if (call := self.calls.get(id)) is not None:
                    call.credit = _UNLIMITED
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
        self._say(events.Push(type, body))
        return True

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


# -- the client's side ------------------------------------------------------------------------------------------------


class ClientCore(_Core[ClientCall]):
    """A connection to a server, at the client."""

    def __init__(self, dialect: Dialect | None = None, *, window: int = WINDOW) -> None:
        super().__init__(dialect or Native(), window)
        self._ids = itertools.count(1)
        self.leaving = False
        self.server: events.Hello | None = None
        self.refusal: Failure | None = None  # of the connection as a whole

    def hello(self, targets: Mapping[str, str]) -> None:
        self._say(events.Hello(self.window, dict(targets)))

    def next_id(self) -> int:
        """A correlation id that is not in use. The one method that any thread may call at any time."""
        while True:
            id = next(self._ids) & _LAST_ID
            if id and id not in self.calls:
                return id

    def begin(
        self,
        target: str,
        method: str,
        body: bytes,
        now: float,
        *,
        deadline: float | None = None,
        metadata: Mapping[str, str] | None = None,
        id: int = 0,
    ) -> ClientCall:
        """A new call, under way. `id`: one that `next_id` gave."""
        call = ClientCall(id or self.next_id(), self._peer_window, deadline)
        ttl = None if deadline is None else max(deadline - now, 0.0)
        self._say(events.Call(call.id, target, method, body, ttl, metadata or {}))
        self._register(call)
        return call

    def adopt(self, id: int, deadline: float | None) -> ClientCall:
        """A call whose frame was sent past the machine, as `begin` would have."""
        call = ClientCall(id, self._peer_window, deadline)
        self._register(call)
        return call

    def notice(self, target: str, method: str, body: bytes, metadata: Mapping[str, str] | None = None) -> None:
        """Fire and forget."""
        self._say(events.Call(0, target, method, body, None, metadata or {}))

    def subscribe(self, types: list[str], deadline: float | None = None) -> ClientCall:
        call = ClientCall(self.next_id(), 0, deadline)
        self._say(events.Subscribe(call.id, types))
        self._register(call)
        return call

    def unsubscribe(self, types: list[str]) -> None:
        self._say(events.Unsubscribe(0, types))

    def item(self, call: ClientCall, body: bytes) -> bool:
        """One more of the stream that this call sends. False: the call is over, nobody wants it."""
        if call.done:
            return False
        self.outbox.extend(self._item_frames(call, body))
        return True

    def end(self, call: ClientCall) -> None:
        """The stream that this call sends is complete."""
        if not call.done:
            self._say(events.End(call.id))

    def cancel(self, call: ClientCall) -> None:
        """We no longer wait for it."""
        if not call.done:
            call.done = True
            self.calls.pop(call.id, None)
            self._say(events.Cancel(call.id))

    def _too_large(self, failure: Failure) -> None:
        call = self.calls.get(failure.id)
        if call is not None:
            self.cancel(call)
            call.failure = failure

    def receive(self, frame: bytes) -> list[ClientCall | events.Push]:
        """The calls to which something happened, and pushes. Raises ProtocolError."""
        happened: list[ClientCall | events.Push] = []
        for event in self.dialect.decode(frame):
            found = self._heard(event)
            if found is not None:
                happened.append(found)
        return happened

    def _heard(self, event: Event) -> ClientCall | events.Push | None:
        if isinstance(event, events.Result | Failure | events.End):
            call = self.calls.pop(event.id, None)
            if call is not None:
                call.done = call.inbox_ended = True
                if isinstance(event, events.Result):
                    call.result = event.body
                elif isinstance(event, Failure):
                    call.failure = event
                else:
                    call.complete = True
            elif isinstance(event, Failure) and not event.id:
                self.refusal = event
            return call
        if isinstance(event, events.Item):
            return self._arrived(event)
        if isinstance(event, events.Credit):
            return self._credited(event)
        if isinstance(event, events.Push):
            return event
        if isinstance(event, events.Hello):
            self._greeted(event)
            self.server = event
        elif isinstance(event, events.Goodbye):
            self.leaving = True
        elif not isinstance(event, events.Heartbeat):
            raise ProtocolError(f"a server sent {type(event).__name__}")
        return None

    def expire(self, now: float) -> list[ClientCall]:
        """The calls whose deadline has passed: failed, and the server is told."""
        found = self._overdue(now)
        for call in found:
            self.cancel(call)
            call.failure = Failure(call.id, "DEADLINE_EXCEEDED", "no answer before the deadline")
        return found

    def lost(self) -> list[ClientCall]:
        """The connection is gone: no call will hear any more."""
        found = list(self.calls.values())
        self.calls.clear()
        for call in found:
            call.done = call.inbox_ended = True
        return found
