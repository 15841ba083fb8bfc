"""A client's connection: one link, its state machine, and who waits for what.

Whoever waits turns the loop (ADR 5): there is no I/O thread. One caller at a time holds the *turn* and receives, for
everybody; the others sleep until their call has changed or the turn is handed to them. Sending needs no turn.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from .. import errors
from .._spi import Link, Spinning, Steps, Want
from .._url import Url
from . import events
from ._clientcore import ClientCall, ClientCore

#: What a connection may end with.
BROKEN = (errors.PeerError, errors.ProtocolError, errors.Closed)

#: After so many seconds without a call a connection is looked at before the next one is sent: where the server has ended
#: meanwhile, a call can be sent all the same (TCP takes it), and would be lost.
RESTED = 0.001


class Waiter:
    """A thread that sleeps until it is woken. A wake before the sleep counts."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it was woken already
            self._lock.release()

    def sleep(self, timeout: float | None) -> None:
        self._lock.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX))


class Connection:
    """The part without waiting: every method returns at once. `mutex` guards the core and its outbox."""

    def __init__(self, link: Link, url: Url, pushed: Callable[[events.Push], None]) -> None:
        self.link = link
        self.url = url
        self.core = ClientCore()
        self.mutex = threading.Lock()
        self.turn = threading.Lock()
        self.waiting: deque[Waiter] = deque()
        self.error: errors.IpcError | None = None
        self._dropped: deque[ClientCall] = deque()
        self.since = self.used = time.monotonic()
        self._pushed = pushed
        self._spin = link.spin_recv if isinstance(link, Spinning) else None

    @property
    def good(self) -> bool:
        """New calls may go here."""
        return self.error is None and not self.core.leaving

    def rested(self) -> bool:
        """Nobody has called for a while: its end may lie there unread. From now on somebody has."""
        now = time.monotonic()
        rested, self.used = now - self.used > RESTED, now
        return rested

    def heard(self, frames: list[bytes]) -> None:
        """Frames that were received: to the calls that they belong to, and those who wait for them are told."""
        with self.mutex:
            touched = []
            for frame in frames:
                touched += self.core.receive(frame)
        for each in touched:
            if isinstance(each, ClientCall):
                each.changed()
            else:
                self._pushed(each)

    def try_flush(self) -> bool:
        """Send what the core has to say. True when all of it has gone."""
        with self.mutex:
            while self._dropped:
                self.core.cancel(self._dropped.popleft())
            outbox = self.core.outbox
            while outbox:
                try:
                    if not self.link.try_send(outbox[0]):
                        return False
                    outbox.popleft()
                except errors.MessageTooLarge as error:
                    self.core.unsendable(error.message)
            return self.link.try_flush()

    def drop(self, call: ClientCall) -> bool:
        """Cancel it, from a finalizer: that runs anywhere, and where this thread has the mutex it is left to who flushes next."""
        self._dropped.append(call)
        if not self.mutex.acquire(False):
            return False
        self.mutex.release()
        with suppress(errors.IpcError):
            self.try_flush()
        return True

    def flush(self) -> Steps[None]:
        while not self.try_flush():
            wait = self.link.arm(Want.SEND)
            if self.try_flush():
                return
            yield wait

    def receive(self) -> Steps[list[bytes]]:
        """What is there, one frame at least."""
        while True:
            frames = self._try_receive()
            if frames:
                return frames
            wait = self.link.arm(Want.RECV)
            frames = self._try_receive()
            if frames:
                return frames
            yield wait

    def _try_receive(self) -> list[bytes]:
        frames: list[bytes] = []
        try:
            while len(frames) < 256 and (frame := self.link.try_recv()) is not None:
                frames.append(frame)
        except errors.IpcError:
            if not frames:  # sticky: it is raised again after these were heard
                raise
        return frames

    def glance(self) -> None:
        """Hear what is there already."""
        frames = self._try_receive()
        if frames:
            self.heard(frames)

    def look(self) -> None:
        """For a loop: the answer of a single call is looked for a little, where that has paid, before it sleeps."""
        if self._spin is not None and len(self.core.calls) == 1:
            frame = self._spin()
            if frame is not None:
                self.heard([frame])

    def break_off(self, error: errors.IpcError) -> None:
        """It is over: every call that is under way ends with this error."""
        with self.mutex:
            if self.error is None:
                self.error = error
            lost = self.core.lost()
        for call in lost:
            call.changed()
        for waiter in tuple(self.waiting):
            waiter.wake()

    def hand_over(self) -> None:
        """The turn is free: somebody who waits may take it."""
        with suppress(IndexError):
            self.waiting[0].wake()


def again(error: errors.IpcError, operation: str | None) -> errors.IpcError:
    """The error of a connection, for one more of its calls."""
    copy = type(error)(error.message, url=error.url, operation=operation, hint=error.hint)
    if isinstance(copy, errors.PeerDied) and isinstance(error, errors.PeerDied):
        copy.pid = error.pid
    return copy
