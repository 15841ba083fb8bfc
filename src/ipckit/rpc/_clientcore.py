"""A connection to a server, at the client: calls, what became of them, and what the server pushes. `protocol` has the rest."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ..errors import ProtocolError
from . import events
from .dialects import Dialect, Native
from .events import WINDOW, Event, Failure
from .protocol import Core, Stream

#: Correlation ids are 32 bits; 0 is for calls that want no answer.
_LAST_ID = 0xFFFFFFFF


class ClientCall(Stream):
    """A call as the client has it. Once `done`: a `result`, a `failure`, a `complete` stream; or the connection was lost."""

    __slots__ = ("complete", "failure", "result")

    def __init__(self, id: int, credit: int, deadline: float | None) -> None:
        super().__init__(id, credit, deadline)
        self.result: bytes | None = None
        self.failure: Failure | None = None
        self.complete = False


class ClientCore(Core[ClientCall]):
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
