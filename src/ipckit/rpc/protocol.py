"""The state machines of a connection: what `ClientCore` (`_clientcore`) and `ServerCore` (`_servercore`) share.

No I/O, no clock, no thread.

Frames and the time go in; what happened comes out as return values, and frames to be sent gather in `outbox`. The shells move the
frames, run the handlers, and have a lock: a core is used by one thread at a time.

A call lives from `Call` to the first of `Result`, `Failure` and the server's `End`; whatever comes for it later is passed
over, because cancels, deadlines and answers cross on their way. Streams are held by credits in bytes: a producer may send
while it has any left (so one item of any size always fits), and the consumer gives back what it has consumed, in lumps of
half a window.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ..errors import ProtocolError
from . import events
from .dialects import Dialect
from .events import WINDOW, Event, Failure

UNLIMITED = 1 << 62


class Stream:
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


C = TypeVar("C", bound=Stream)


class Core(Generic[C]):
    def __init__(self, dialect: Dialect, window: int) -> None:
        self.dialect = dialect
        self.window = window
        self.outbox: deque[bytes] = deque()
        self.calls: dict[int, C] = {}
        self._peer_window = WINDOW if dialect.flow else UNLIMITED
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
        if not 0 < hello.window < UNLIMITED:
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
        call.credit = min(call.credit + event.count, UNLIMITED)
        return call
