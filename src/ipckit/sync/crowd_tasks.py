"""`ipckit.aio`'s Semaphore, RWLock, Condition, Event and Barrier: those of `ipckit.sync`, awaited as `lock_tasks` does it."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from . import barrier, condition, event, lock, rwlock, semaphore
from ._verdict import INHERITED, LISTENER, OUT, PARTY, READ, REPAIR, UNIT, WRITE
from .lock_tasks import Lock, RLock, Waits, wrap

T = TypeVar("T")


class Semaphore(Waits):
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

    @property
    def leased(self) -> bool:
        """Units come back when the thread that has them ends."""
        return bool(self._core.leased)

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


class RWLock(Waits):
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


class Condition(Waits):
    """`ipckit.sync.Condition` for tasks: `async with condition: await condition.wait()`."""

    __slots__ = ("_lock",)

    def __init__(self, lock: Lock | RLock | None = None, url: str | Url | None = None) -> None:
        if lock is not None and not isinstance(lock, Lock):
            raise TypeError(f"lock= is a Lock or RLock of ipckit.aio in shared memory, not {type(lock).__name__}")
        self._adopt(condition.Condition(None if lock is None else lock._core, url), lock)

    def _adopt(self, core: Any, lock: Lock | RLock | None = None) -> None:
        super().__init__(core)
        self._lock: Lock = wrap(RLock, core._lock) if lock is None else lock

    def __reduce__(self) -> Any:
        return wrap, (type(self), self._core, None if self._core._own else self._lock)

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

    def owner(self) -> lock.Owner | None:
        """Who holds its lock."""
        return self._lock.owner()

    @property
    def abandoned(self) -> bool:
        """Whoever held its lock died, and nobody has repaired what it guards."""
        return self._lock.abandoned

    @property
    def n_waiting(self) -> int:
        return int(self._core.n_waiting)


class Event(Waits):
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


class Barrier(Waits):
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
