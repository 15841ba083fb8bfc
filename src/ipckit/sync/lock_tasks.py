"""How tasks of an event loop wait for what processes share; and `ipckit.aio.Lock` and `RLock`. What never waits is not awaited.

A task tries on the loop's thread; where it must wait, a thread of the native core sleeps on the futexes for it and writes to an
eventfd, which the loop awaits as it awaits any endpoint (py_attempt.c; docs/adr/0021). Cancelling gives the attempt up: what it
was let into at that very moment is given back.

To other processes the owner is the loop's thread, so tasks of one loop may give back what another of them took, as with asyncio's
own locks. Only an RLock looks at the task: it counts for the one that holds it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import select
from collections.abc import AsyncIterator, Callable
from typing import Any, Self, TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from .._wait import Gate, Lane, arun, no_timeout
from . import _places, lock
from ._verdict import DONE, INHERITED, OUT, PLAIN, RECOVER

T = TypeVar("T")


def attempt_steps(attempt: Any, undo: Callable[[], object]) -> Steps[int]:
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


class Waits:
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
        """DONE, INHERITED or OUT. A negative timeout is 0, as multiprocessing has it."""
        if timeout is not None and math.isnan(timeout):
            raise no_timeout()
        if block and (timeout is None or timeout > 0):
            return await self._run(attempt_steps(attempt, undo), timeout)
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
        return wrap, (type(self), self._core)

    def __repr__(self) -> str:
        return f"<aio of {self._core!r}>"


def wrap(cls: Any, *parts: Any) -> Any:
    self = cls.__new__(cls)
    self._adopt(*parts)
    return self


class Lock(Waits):
    """`ipckit.sync.Lock` for tasks: `async with lock:`, `await lock.acquire(block=True, timeout=None)`, `lock.release()`."""

    __slots__ = ("_inherited",)
    _kind: type[lock.Lock] | type[lock.RLock] = lock.Lock

    def __new__(cls, url: str | Url | None = None, *, on_owner_died: lock.OnOwnerDied = "raise") -> Self:
        elsewhere = _places.lock(url, on_owner_died, tasks=True) if cls._kind is lock.Lock else None
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
        self._core._release_all()
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
        self._core._release_all()
        return depth

    def _back(self, depth: int) -> None:
        self._holder, self._depth = asyncio.current_task(), depth

    def _is_owned(self) -> bool:
        # The lock first: a forked child has no running loop, and so no task to ask for.
        return bool(self._core._is_owned()) and self._holder is not None and self._holder is asyncio.current_task()
