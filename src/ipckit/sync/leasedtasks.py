"""`ipckit.aio.Lock(url)` at a broker: the shell of `leased` for tasks.

Tasks that share one object wait for its seat in turn; a hold is renewed by a task of its loop, which a timer starts when it is
due. A loop that stands still renews nothing: then the lease runs out, and `lock.lost` says so.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from types import TracebackType
from typing import Self

from .. import errors
from .._leasing import Holder
from .._wait import arun
from ._lease import clock
from .leased import Leased, also, left_for_broker, log, patience_of


class AsyncLeasedLock(Leased):
    """`LeasedLock`, awaited: `await lock.acquire()`, `await lock.release()`, `async with lock:`. Of one loop at a time."""

    def _fresh(self) -> None:
        super()._fresh()
        self._seat = asyncio.Lock()
        self._seated = False  # by a hold
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def _here(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop:
            if self._lease.id is not None and not self._lease.lost:
                raise errors.ConfigError(
                    "it is held by a task of another event loop", url=self.url, operation="acquire"
                )
            self._close()
            self._fresh()
        self._loop = loop

    async def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """As `LeasedLock.acquire`."""
        wait, timeout = patience_of(block, timeout)
        self._here()
        if not wait and self._seat.locked():
            return False
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            async with asyncio.timeout(timeout if wait else None):
                await self._seat.acquire()
        except TimeoutError:
            return False
        got = False
        try:
            left = left_for_broker(deadline, wait, self._holding is None)
            got = await arun(self._acquiring(wait), self._desk.lane, left)
        finally:
            if not got:
                self._seat.release()
        self._seated = got
        if got and self._options.renew:
            self._renew_later()
        return got

    async def release(self) -> None:
        """As `LeasedLock.release`. Any task of the loop may call it; one that is cancelled here gives it back all the same."""
        self._here()
        holding = self._must_hold("release")
        self._stop_renewing()
        try:
            await arun(holding.release(), self._desk.lane, self._lease.remaining)
        finally:
            self._stand_up()

    def _stand_up(self) -> None:
        seated, self._seated = self._seated, False
        if seated:
            self._seat.release()

    async def renew(self, timeout: float | None = None) -> bool:
        """As `LeasedLock.renew`."""
        self._here()
        self._must_hold("renew")
        return await arun(self._renewing(), self._desk.lane, timeout)

    async def owner(self, timeout: float | None = None) -> Holder | None:
        """As `LeasedLock.owner`."""
        self._here()
        return await arun(self._window.holder(), self._window.lane, timeout)

    async def locked(self, timeout: float | None = None) -> bool:
        """As `LeasedLock.locked`."""
        return await self.owner(timeout) is not None

    async def close(self) -> None:
        """As `LeasedLock.close`."""
        self._stop_renewing()
        self._close()
        self._stand_up()

    async def __aenter__(self) -> Self:
        await self.acquire()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.release()
        except errors.IpcError as failure:
            also(failure, error)

    def _renew_later(self) -> None:
        assert self._loop is not None
        pause = max(self._lease.due - clock(), 0)
        self._timer = self._loop.call_later(pause, _renewal_is_due, weakref.ref(self), self._lease.id)

    def _stop_renewing(self) -> None:
        timer, self._timer = self._timer, None
        task, self._task = self._task, None
        if timer is not None:
            timer.cancel()
        if task is not None:
            task.cancel()

    async def _renew_once(self) -> None:
        lease = self._lease
        try:
            await arun(self._renewing(), self._desk.lane, max(min(lease.seconds / 3, lease.remaining), 0.001))
        except errors.IpcError as error:
            log.debug("%s: not renewed yet: %s", self.url, error)
        self._task = None
        if lease.id is not None and not lease.lost:
            self._renew_later()
        elif lease.lost:
            log.warning("%s: the lease (token %s) is lost", self.url, lease.token)


def _renewal_is_due(ref: weakref.ref[AsyncLeasedLock], id: str | None) -> None:
    lock = ref()
    if lock is not None and lock._lease.id == id and lock._loop is not None:
        lock._task = lock._loop.create_task(lock._renew_once())
