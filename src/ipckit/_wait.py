"""The only two places that sleep: `run` for threads, `arun` for an event loop.

Both drive the same generators (`Steps`): take the next `Wait`, sleep until one of its descriptors is ready, go on. A `Gate`
belongs to every endpoint: it knows whether we closed it, wakes everyone who sleeps there when we do, and refuses the
child of a fork. A `Lane` is one direction of an endpoint, in which callers queue up.
"""

from __future__ import annotations

import functools
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from . import errors
from ._spi import Steps, Wait

if TYPE_CHECKING:  # a third of the import time of everything; who never runs a loop does not pay for it
    import asyncio

T = TypeVar("T")

_POLLIN = select.POLLIN
_POLLOUT = select.POLLOUT

_generation = 0  # counts the forks between the first process and this one


def _forked() -> None:
    global _generation
    _generation += 1


os.register_at_fork(after_in_child=_forked)


class Gate:
    """Open once, closed once. `release` runs when it is closed and nobody is inside any more."""

    __slots__ = ("_bell", "_generation", "_inside", "_loops", "_mutex", "_release", "closed", "url", "why")

    def __init__(self, url: object, release: Callable[[], None]) -> None:
        self.url = url
        self.closed = False
        self.why = "this endpoint is closed"
        self._release: Callable[[], None] | None = release
        self._generation = _generation
        self._mutex = threading.Lock()
        self._inside = 0
        self._bell = -1
        self._loops: dict[asyncio.AbstractEventLoop, _Readiness] = {}

    @property
    def foreign(self) -> bool:
        """This process is a forked child of the one that opened the endpoint."""
        return self._generation != _generation

    def check(self, operation: str) -> None:
        """Raise ForkedError in a child, Closed after `close`. Without the lock: for one who will not wait inside."""
        self.refuse_foreign(operation)
        if self.closed:
            raise errors.Closed(self.why, url=self.url, operation=operation)

    def refuse_foreign(self, operation: str) -> None:
        """Raise ForkedError in a child. Comes before every lock: a thread that the child does not have may hold it."""
        if self._generation != _generation:
            raise errors.ForkedError(
                "opened before a fork, used in the child",
                url=self.url,
                operation=operation,
                hint="open the endpoint in the process that uses it",
            )

    def enter(self, operation: str) -> None:
        self.refuse_foreign(operation)
        with self._mutex:
            if self.closed:
                raise errors.Closed(self.why, url=self.url, operation=operation)
            self._inside += 1

    def leave(self) -> None:
        with self._mutex:
            self._inside -= 1
            last = self.closed and not self._inside
        if last:
            self._finish()

    @property
    def bell(self) -> int:
        """A descriptor that becomes readable when the gate closes."""
        with self._mutex:
            if self._bell < 0:
                self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                if self.closed:
                    os.eventfd_write(self._bell, 1)
            return self._bell

    def prepare(self) -> None:
        """Take now the descriptor that the first sleep would take: who must not fail for want of one calls this early."""
        assert self.bell >= 0

    def readiness(self) -> _Readiness:
        import asyncio

        loop = asyncio.get_running_loop()
        found = self._loops.get(loop)
        if found is None:
            found = self._loops[loop] = _Readiness(loop)
        return found

    def close(self) -> None:
        """Idempotent. Returns at once; whoever sleeps inside wakes and raises `Closed`.

        In a forked child nothing is released: the name and the goodbye are the parent's.
        """
        if self.foreign:
            self.closed = True
            return
        with self._mutex:
            if self.closed:
                return
            self.closed = True
            last = not self._inside
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)
        for readiness in tuple(self._loops.values()):
            readiness.close()
        if last:
            self._finish()

    def surrender(self, why: str, operation: str) -> None:
        """Close, and release nothing: what is behind the gate is somebody else's from now on. Raises Closed, ConfigError."""
        if self.foreign:
            self.closed, self.why = True, why
            return
        with self._mutex:
            if self.closed:
                raise errors.Closed(self.why, url=self.url, operation=operation)
            if self._inside:
                raise errors.ConfigError("somebody waits in a call of this endpoint", url=self.url, operation=operation)
            self.closed, self.why, self._release = True, why, None
        for readiness in tuple(self._loops.values()):
            readiness.close()
        self._finish()

    def _finish(self) -> None:
        with self._mutex:
            release, self._release = self._release, None
            bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)
        if release is not None:
            release()


class Lane:
    """One direction of one endpoint: who is in it may wait, the others wait for it.

    `passing`: what is waited for here belongs to something else afterwards (a handshake's descriptors go to the link), or
    is closed; so an event loop forgets it after every sleep.
    `asleep`: the tasks that sleep here. Descriptors do not tell them of what another task has read into the link's own
    buffer together with what it took; so whoever leaves lets the eldest look again.
    """

    __slots__ = ("asleep", "gate", "mutex", "operation", "passing")

    def __init__(self, gate: Gate, operation: str, *, passing: bool = False) -> None:
        self.gate = gate
        self.operation = operation
        self.passing = passing
        self.mutex = threading.Lock()
        self.asleep: list[_Sleeper] = []

    def nudge(self) -> None:
        """There may be more: the eldest sleeper looks. From any loop."""
        for sleeper in tuple(self.asleep):
            if not sleeper.done and sleeper.nudge():
                break


# -- threads ------------------------------------------------------------------------------------------------------


def run(steps: Steps[T], lane: Lane, timeout: float | None) -> T:
    """Drive `steps` to its result on this thread.

    `timeout`: seconds; None waits, 0 tries once. Raises what `steps` raises; at the deadline, what it makes of `Timeout`.
    """
    gate = lane.gate
    gate.refuse_foreign(lane.operation)
    if timeout is not None and not timeout >= 0:
        raise no_timeout()
    deadline = None if timeout is None else time.monotonic() + timeout
    if not lane.mutex.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
        steps.close()
        if gate.closed:
            raise errors.Closed("this endpoint is closed", url=gate.url, operation=lane.operation)
        raise _timed_out(lane, timeout)
    try:
        gate.enter(lane.operation)
        try:
            try:
                wait = next(steps)
                bell = gate.bell
                while True:
                    _poll(wait, bell, deadline)
                    if gate.closed:
                        raise errors.Closed("closed while waiting", url=gate.url, operation=lane.operation)
                    if deadline is not None and time.monotonic() >= deadline:
                        wait = next(steps)  # what came at the last moment still counts
                        steps.throw(_timed_out(lane, timeout))
                        raise RuntimeError("the steps ignored their timeout")
                    wait = next(steps)
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                steps.close()
        finally:
            gate.leave()
    finally:
        lane.mutex.release()


def _poll(wait: Wait, bell: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(bell, _POLLIN)
    for fd, events in wait.fds:
        poll.register(fd, events)
    if deadline is None:
        remaining = wait.at_most
    else:
        remaining = max(deadline - time.monotonic(), 0)
        if wait.at_most is not None:
            remaining = min(remaining, wait.at_most)
    # Rounded up: to wake before the deadline would be to wait twice. A day at most: poll counts milliseconds in an int.
    poll.poll(None if remaining is None else int(min(remaining, 86_400) * 1000 + 0.999))


def _timed_out(lane: Lane, timeout: float | None) -> errors.Timeout:
    return errors.Timeout(f"nothing happened within {timeout:g} s", url=lane.gate.url, operation=lane.operation)


def no_timeout() -> ValueError:
    return ValueError("timeout must be None, 0 or positive")


# -- the event loop -----------------------------------------------------------------------------------------------


async def arun(steps: Steps[T], lane: Lane, timeout: float | None) -> T:
    """Drive `steps` to its result on the running loop. As `run`; cancelling it closes `steps`, which loses nothing."""
    gate = lane.gate
    gate.check(lane.operation)
    if timeout is not None and not timeout >= 0:
        raise no_timeout()
    try:
        wait = next(steps)
    except StopIteration as stop:  # the common case: nothing to wait for
        if lane.asleep:
            lane.nudge()
        result: T = stop.value
        return result
    gate.enter(lane.operation)
    try:
        readiness = gate.readiness()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            await readiness.wait(wait, deadline, lane)
            if gate.closed:
                raise errors.Closed("closed while waiting", url=gate.url, operation=lane.operation)
            if deadline is not None and time.monotonic() >= deadline:
                wait = next(steps)
                steps.throw(_timed_out(lane, timeout))
                raise RuntimeError("the steps ignored their timeout")
            wait = next(steps)
    except StopIteration as stop:
        last: T = stop.value
        return last
    finally:
        steps.close()
        if lane.asleep:
            lane.nudge()  # whatever the end: a nudge that we had is passed on
        gate.leave()


class _Sleeper:
    """A future that one task awaits and one callback ends.

    asyncio's own Future wakes its task through the loop's queue: one more turn of the loop, one more system call, 2-3 µs of a
    round trip. Readiness callbacks run on the loop with no task active, so this one runs the task's next step
    right there. It is the part of the Future protocol that `asyncio.Task` uses.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_cancelled", "_context", "_loop", "done")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asyncio_future_blocking = False
        self._callback: Callable[[Any], None] | None = None
        self._context: Any = None
        self._cancelled: Any = None
        self.done = False

    def __await__(self) -> Generator[Any, None, None]:
        if not self.done:
            self._asyncio_future_blocking = True
            yield self
        self.result()

    __iter__ = __await__

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, callback: Callable[[Any], None], *, context: Any = None) -> None:
        self._callback, self._context = callback, context

    def remove_done_callback(self, callback: Callable[[Any], None]) -> int:
        found = int(self._callback is callback)
        self._callback = None
        return found

    def result(self) -> None:
        if self._cancelled is not None:
            import asyncio

            raise asyncio.CancelledError(*self._cancelled)

    def exception(self) -> None:
        self.result()

    def cancelled(self) -> bool:
        return self._cancelled is not None

    def cancel(self, msg: Any = None) -> bool:
        if self.done:
            return False
        self._cancelled = () if msg is None else (msg,)
        self.done = True
        self._loop.call_soon(self._resume)
        return True

    def wake(self) -> None:
        """End the sleep, and run the sleeping task now. Call it from the loop, never from a task."""
        if not self.done:
            self.done = True
            self._resume()

    def wake_soon(self) -> None:
        if not self.done:
            self.done = True
            self._loop.call_soon(self._resume)

    def nudge(self) -> bool:
        """Wake it soon, from any thread. False: its loop is closed, and its task with it."""
        import asyncio

        try:
            here = asyncio.get_running_loop() is self._loop
            (self._loop.call_soon if here else self._loop.call_soon_threadsafe)(self.wake)
        except RuntimeError:
            return False
        return True

    def _resume(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            if self._context is None:
                callback(self)
            else:
                self._context.run(callback, self)


@functools.lru_cache(maxsize=256)
def _keys(fds: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return tuple((fd, bit) for fd, events in fds for bit in (_POLLIN, _POLLOUT) if events & bit)


#: Who sleeps at which readable descriptor, of each loop. Seen by that loop's thread only.
_bedrooms: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, list[_Sleeper]]] = weakref.WeakKeyDictionary()


def sleepers_at(loop: asyncio.AbstractEventLoop, fd: int) -> list[_Sleeper]:
    """Those tasks of this loop, which is running here, that sleep until `fd` is readable.

    For a descriptor that says no more than "look again", and is written on this loop: `wake` them, with no task active, and it
    need not be written and read.
    """
    return list(_bedrooms.get(loop, {}).get(fd, ()))


class _Readiness:
    """The descriptors of one endpoint on one loop, kept registered between calls.

    Registering costs two system calls a message, so a callback stays until it fires with nobody waiting; then
    it goes, because a ready descriptor that nobody reads would spin the loop.
    """

    __slots__ = ("_bedroom", "_closed", "_loop", "_sleepers")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._bedroom = _bedrooms.setdefault(loop, {})
        self._sleepers: dict[tuple[int, int], list[_Sleeper]] = {}
        self._closed = False

    async def wait(self, wait: Wait, deadline: float | None, lane: Lane) -> None:
        if self._closed:
            return
        sleeper = _Sleeper(self._loop)
        keys = _keys(wait.fds)
        for key in keys:
            queue = self._sleepers.get(key)
            if queue is None:
                queue = self._sleepers[key] = []
                if key[1] == _POLLIN:
                    self._bedroom[key[0]] = queue
                add = self._loop.add_reader if key[1] == _POLLIN else self._loop.add_writer
                add(key[0], self._fire, key)
            queue.append(sleeper)
        limit = wait.at_most
        if deadline is not None:
            remaining = max(deadline - time.monotonic(), 0)
            limit = remaining if limit is None else min(limit, remaining)
        timer = None if limit is None else self._loop.call_later(limit, sleeper.wake)
        lane.asleep.append(sleeper)
        try:
            await sleeper
        finally:
            lane.asleep.remove(sleeper)
            if timer is not None:
                timer.cancel()
            for key in keys:
                queue = self._sleepers.get(key)
                if queue is not None:
                    queue.remove(sleeper)
                    if lane.passing and not queue:
                        self._forget(key)

    def _fire(self, key: tuple[int, int]) -> None:
        queue = self._sleepers[key]
        if queue:
            for sleeper in tuple(queue):
                sleeper.wake()
        else:
            self._forget(key)

    def _forget(self, key: tuple[int, int]) -> None:
        queue = self._sleepers.pop(key)
        if key[1] == _POLLIN and self._bedroom.get(key[0]) is queue:
            del self._bedroom[key[0]]
        remove = self._loop.remove_reader if key[1] == _POLLIN else self._loop.remove_writer
        remove(key[0])

    def close(self) -> None:
        """Let go of the loop before the descriptors are closed; everyone who sleeps here wakes."""
        self._closed = True
        if self._loop.is_closed():
            return
        sleepers = [sleeper for queue in self._sleepers.values() for sleeper in queue]
        for key in tuple(self._sleepers):
            self._forget(key)
        for sleeper in sleepers:
            sleeper.wake_soon()
