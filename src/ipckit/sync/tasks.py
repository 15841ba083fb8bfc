"""The primitives for tasks of an event loop: `ipckit.aio.Lock` and its kin. What waits is awaited; what never waits is not.

A task tries on the loop's thread; where it must wait, a thread of the native core sleeps on the futexes for it and writes to an
eventfd, which the loop awaits as it awaits any endpoint (py_attempt.c; docs/adr/0021). Cancelling gives the attempt up: what it
was let into at that very moment is given back.

To other processes the owner is the loop's thread, so tasks of one loop may give back what another of them took, as with asyncio's
own locks. Only an RLock looks at the task: it counts for the one that holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from .._wait import Gate, Lane, arun
from . import _places, barrier, condition, event, lock, rwlock, semaphore
from ._verdict import DONE, INHERITED, LISTENER, OUT, PARTY, PLAIN, READ, RECOVER, REPAIR, UNIT, WRITE

T = TypeVar("T")


def _steps(attempt: Any, undo: Callable[[], object]) -> Steps[int]:
    """Until the attempt is over; OUT: not in time. Closed early, it is given up, and `undo` gives back what it got."""
    bell = -1
    try:
        while (verdict := attempt.poll()) is None:
            if bell < 0:
                bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            attempt.arm(bell)
            try:
                yield Wait(((bell, select.POLLIN),))
            except errors.Timeout:
                return DONE if attempt.give_up() else OUT
            except GeneratorExit:
                if attempt.give_up():
                    undo()
                raise
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
        return int(verdict)
    finally:
        if bell >= 0:
            os.close(bell)


def _joined(attempt: Any) -> Steps[None]:
    """Until a listener has its slot: at once, unless another process is about to get its own."""
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        while attempt.poll() is None and not attempt.slot:
            attempt.arm(bell)
            yield Wait(((bell, select.POLLIN),))
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
    finally:
        os.close(bell)


class _Waits:
    """One object, and where its tasks wait."""

    __slots__ = ("__weakref__", "_core", "_lane")

    def __init__(self, core: Any) -> None:
        self._core = core
        self._lane = self._fresh_lane()

    def _fresh_lane(self) -> Lane:
        return Lane(Gate(self._core.url or "anonymous", lambda: None), "acquire", passing=True)

    async def _run(self, steps: Steps[T], timeout: float | None) -> T:
        if self._lane.gate.foreign:
            self._lane = self._fresh_lane()  # the lock is inherited; the loop that waited for it is the parent's
        return await arun(steps, self._lane, timeout)

    async def _get(self, attempt: Any, block: bool, timeout: float | None, undo: Callable[[], object]) -> int:
        """DONE, INHERITED or OUT."""
        if block and (timeout is None or timeout > 0):
            return await self._run(_steps(attempt, undo), timeout)
        verdict = attempt.now()
        return OUT if verdict is None else int(verdict)

    @property
    def url(self) -> Url | None:
        url: Url | None = self._core.url
        return url

    def unlink(self) -> None:
        """Remove the name; see `ipckit.sync.Lock.unlink`."""
        self._core.unlink()

    def __reduce__(self) -> Any:
        return _wrap, (type(self), self._core)

    def __repr__(self) -> str:
        return f"<aio of {self._core!r}>"


def _wrap(cls: Any, core: Any) -> Any:
    self = cls.__new__(cls)
    self._adopt(core)
    return self


class Lock(_Waits):
    """`ipckit.sync.Lock` for tasks: `async with lock:`, `await lock.acquire(block=True, timeout=None)`, `lock.release()`."""

    __slots__ = ("_inherited",)
    _kind: type[lock.Lock] | type[lock.RLock] = lock.Lock

    def __new__(cls, url: str | Url | None = None, *, on_owner_died: lock.OnOwnerDied = "raise") -> Self:
        elsewhere = _places.lock(url, tasks=True) if cls._kind is lock.Lock else None
        if elsewhere is not None:
            made: Self = elsewhere(url)
            return made
        return super().__new__(cls)

    def __init__(self, url: str | Url | None = None, *, on_owner_died: lock.OnOwnerDied = "raise") -> None:
        self._adopt(self._kind(url, on_owner_died=on_owner_died))

    def _adopt(self, core: Any) -> None:
        super().__init__(core)
        self._inherited = False

    async def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Whether it got it within `timeout` seconds. Raises OwnerDied, without it."""
        verdict = await self._get(self._core._attempt(PLAIN), block, timeout, self._core.release)
        self._inherited = verdict == INHERITED
        return verdict != OUT

    def release(self) -> None:
        """Raises NotOwner unless a task of this thread holds it."""
        self._core.release()

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._core.__exit__(*exc)

    @contextlib.asynccontextmanager
    async def recover(self, timeout: float | None = None) -> AsyncIterator[bool]:
        """`async with lock.recover():` see `ipckit.sync.Lock.recover`."""
        verdict = await self._get(self._core._attempt(RECOVER), True, timeout, self._core._abandon)
        if verdict == OUT:
            raise errors.Timeout("somebody else holds it", url=self.url, operation="recover")
        try:
            yield verdict == INHERITED
        except BaseException:
            if verdict == INHERITED:
                self._core._abandon()
            else:
                self._core.release()
            raise
        self._core.release()

    @property
    def inherited(self) -> bool:
        """The last acquire took it from a dead owner."""
        return self._inherited

    @property
    def abandoned(self) -> bool:
        """Its owner died, and nobody has repaired what it guards."""
        return bool(self._core.abandoned)

    def locked(self) -> bool:
        """Somebody holds it, or it is abandoned."""
        return bool(self._core.locked())

    def owner(self) -> lock.Owner | None:
        """Who holds it, since when; None if nobody does."""
        owner: lock.Owner | None = self._core.owner()
        return owner

    async def _take_back(self, depth: int) -> None:
        """After a wait: hold it again, or raise; a cancellation is kept until then."""
        cancelled = None
        while True:
            try:
                await self.acquire()
                break
            except asyncio.CancelledError as error:
                cancelled = error
        self._back(depth)
        if cancelled is not None:
            raise cancelled

    def _let_go(self) -> int:
        self._core._release_save()
        return 0

    def _back(self, depth: int) -> None:
        pass

    def _is_owned(self) -> bool:
        return bool(self._core._is_owned())


class RLock(Lock):
    """`ipckit.sync.RLock` for tasks: the task that holds it may acquire it again."""

    __slots__ = ("_depth", "_holder")
    _kind = lock.RLock

    def _adopt(self, core: Any) -> None:
        super()._adopt(core)
        self._holder: asyncio.Task[Any] | None = None
        self._depth = 0

    async def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """As `Lock.acquire`; at once for the task that holds it."""
        if self._is_owned():
            self._depth += 1
            return True
        if not await super().acquire(block, timeout):
            return False
        self._back(0)
        return True

    def release(self) -> None:
        """Raises NotOwner unless this task holds it."""
        if not self._is_owned():
            raise errors.NotOwner("this task does not hold the RLock", url=self.url, operation="release")
        if self._depth:
            self._depth -= 1
            return
        self._holder = None
        self._core.release()

    async def __aexit__(self, *exc: object) -> None:
        if exc[0] is None or self._is_owned():
            self.release()

    def _let_go(self) -> int:
        depth, self._depth, self._holder = self._depth, 0, None
        self._core._release_save()
        return depth

    def _back(self, depth: int) -> None:
        self._holder, self._depth = asyncio.current_task(), depth

    def _is_owned(self) -> bool:
        # The lock first: a forked child has no running loop, and so no task to ask for.
        return bool(self._core._is_owned()) and self._holder is not None and self._holder is asyncio.current_task()


class Semaphore(_Waits):
    """`ipckit.sync.Semaphore` for tasks."""

    __slots__ = ()
    _kind: type[semaphore.Semaphore] | type[semaphore.BoundedSemaphore] = semaphore.Semaphore

    def __init__(self, value: int = 1, url: str | Url | None = None, *, leased: bool = False) -> None:
        self._adopt(self._kind(value, url, leased=leased))

    def _adopt(self, core: Any) -> None:
        super().__init__(core)

    async def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a unit; whether it got one within `timeout` seconds."""
        return await self._get(self._core._attempt(UNIT), block, timeout, self._core.release) != OUT

    def release(self, n: int = 1) -> None:
        """Give back `n` units; see `ipckit.sync.Semaphore.release`."""
        self._core.release(n)

    def get_value(self) -> int:
        """Units that are free."""
        return int(self._core.get_value())

    async def __aenter__(self) -> bool:
        return await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()


class BoundedSemaphore(Semaphore):
    """`ipckit.sync.BoundedSemaphore` for tasks."""

    __slots__ = ()
    _kind = semaphore.BoundedSemaphore


class _Side:
    __slots__ = ("_lock", "_role")

    def __init__(self, of: RWLock, role: int) -> None:
        self._lock = of
        self._role = role

    async def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Whether it got in within `timeout` seconds. Raises OwnerDied."""
        core = self._lock._core
        return await self._lock._get(core._attempt(self._role), block, timeout, self.release) != OUT

    def release(self) -> None:
        """Raises NotOwner."""
        self._lock._core._leave(self._role, "release")

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.release()


class RWLock(_Waits):
    """`ipckit.sync.RWLock` for tasks: `async with rw.read:`, `async with rw.write:`."""

    __slots__ = ()

    def __init__(self, url: str | Url | None = None) -> None:
        self._adopt(rwlock.RWLock(url))

    def _adopt(self, core: Any) -> None:
        super().__init__(core)

    @property
    def read(self) -> _Side:
        return _Side(self, READ)

    @property
    def write(self) -> _Side:
        return _Side(self, WRITE)

    @contextlib.asynccontextmanager
    async def recover(self, timeout: float | None = None) -> AsyncIterator[bool]:
        """`async with rw.recover():` see `ipckit.sync.RWLock.recover`."""

        def leave(abandon: bool) -> None:
            self._core._leave(REPAIR, "recover", 0, abandon)

        verdict = await self._get(self._core._attempt(REPAIR), True, timeout, lambda: leave(self.abandoned))
        if verdict == OUT:
            raise errors.Timeout("somebody else is inside", url=self.url, operation="recover")
        try:
            yield verdict == INHERITED
        except BaseException:
            leave(verdict == INHERITED)
            raise
        leave(False)

    @property
    def abandoned(self) -> bool:
        """A writer died, and nobody has repaired what it guards."""
        return bool(self._core.abandoned)

    def owners(self) -> list[lock.Owner]:
        """Who is inside."""
        owners: list[lock.Owner] = self._core.owners()
        return owners


class Condition(_Waits):
    """`ipckit.sync.Condition` for tasks: `async with condition: await condition.wait()`."""

    __slots__ = ("_lock",)

    def __init__(self, lock: Lock | RLock | None = None, url: str | Url | None = None) -> None:
        self._adopt(condition.Condition(None if lock is None else lock._core, url), lock)

    def _adopt(self, core: Any, lock: Lock | RLock | None = None) -> None:
        super().__init__(core)
        self._lock: Lock = _wrap(RLock, core._lock) if lock is None else lock

    async def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Of its lock."""
        return await self._lock.acquire(block, timeout)

    def release(self) -> None:
        """Of its lock."""
        self._lock.release()

    async def __aenter__(self) -> bool:
        return await self._lock.acquire()

    async def __aexit__(self, *exc: object) -> None:
        await self._lock.__aexit__(*exc)

    async def wait(self, timeout: float | None = None) -> bool:
        """As `ipckit.sync.Condition.wait`. Cancelled, it raises once it holds the lock again."""
        self._need_lock("wait")
        listening = self._core._attempt(LISTENER, self._lock._core)
        await self._run(_joined(listening), None)
        depth = self._lock._let_go()
        notified = False
        try:
            try:
                notified = await self._get(listening, True, timeout, lambda: self._pass_on(listening.slot)) != OUT
            except errors.OwnerDied:
                raise  # without the lock
            except BaseException:
                await self._lock._take_back(depth)
                raise
            await self._lock._take_back(depth)
        finally:
            if notified:
                self._core._leave(LISTENER, "wait", listening.slot)
        return notified

    def _pass_on(self, slot: int) -> None:
        """Notified and cancelled at once: somebody else shall have it."""
        self._core._leave(LISTENER, "wait", slot)
        self._core._notify(1)

    async def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until `predicate()` is true, at most `timeout` seconds; its last value."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (result := predicate()):
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                break
            await self.wait(remaining)
        return result

    def notify(self, n: int = 1) -> None:
        """Wake `n` of those who wait, in any process."""
        self._need_lock("notify")
        self._core._notify(n)

    def notify_all(self) -> None:
        """Wake all."""
        self._need_lock("notify_all")
        self._core._notify(2**32 - 1)

    def _need_lock(self, operation: str) -> None:
        if not self._lock._is_owned():
            raise errors.NotOwner("this task does not hold the lock", url=self.url, operation=operation)

    def recover(self, timeout: float | None = None) -> contextlib.AbstractAsyncContextManager[bool]:
        """Of its lock."""
        return self._lock.recover(timeout)

    @property
    def n_waiting(self) -> int:
        return int(self._core.n_waiting)


class Event(_Waits):
    """`ipckit.sync.Event` for tasks."""

    __slots__ = ()

    def __init__(self, url: str | Url | None = None) -> None:
        self._adopt(event.Event(url))

    def _adopt(self, core: Any) -> None:
        super().__init__(core)

    def is_set(self) -> bool:
        return bool(self._core.is_set())

    def set(self) -> None:
        self._core.set()

    def clear(self) -> None:
        self._core.clear()

    async def wait(self, timeout: float | None = None) -> bool:
        """Whether it was set within `timeout` seconds."""
        return await self._get(self._core._attempt(-1), True, timeout, lambda: None) != OUT


class Barrier(_Waits):
    """`ipckit.sync.Barrier` for tasks; `action` is a plain function. A wait that is cancelled breaks it."""

    __slots__ = ()

    def __init__(
        self,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        url: str | Url | None = None,
    ) -> None:
        self._adopt(barrier.Barrier(parties, action, timeout, url))

    def _adopt(self, core: Any) -> None:
        super().__init__(core)

    async def wait(self, timeout: float | None = None) -> int:
        """Wait for the others: a number from 0 to parties - 1. Raises BrokenBarrier; after `timeout` seconds as well."""
        attempt = self._core._attempt(PARTY)
        patience = self._core._timeout if timeout is None else timeout
        if await self._get(attempt, True, patience, lambda: None) == OUT:
            raise self._core._broken("not all came in time")
        if attempt.slot:
            self._core._run(attempt.slot)
        return int(attempt.before)

    def abort(self) -> None:
        """Break it."""
        self._core.abort()

    def reset(self) -> None:
        """Make it whole."""
        self._core.reset()

    @property
    def parties(self) -> int:
        return int(self._core.parties)

    @property
    def n_waiting(self) -> int:
        return int(self._core.n_waiting)

    @property
    def broken(self) -> bool:
        return bool(self._core.broken)
