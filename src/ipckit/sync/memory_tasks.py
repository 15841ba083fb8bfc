"""`Segment` and `Latest` for tasks of an event loop: `ipckit.aio.Segment`, `ipckit.aio.Latest`. What waits is awaited.

    async with aio.Segment("shm://frames") as segment:     or:  segment = await aio.Segment("shm://frames")

A thread of the native core sleeps on the futex for a task that waits for a newer value, and writes to an eventfd (py_attempt.c).
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Generator
from typing import Any, Generic, Self, TypeVar

from .. import errors
from .._spi import Buffer, Steps, Wait
from .._url import Url
from .._wait import Gate, Lane, arun
from . import _tenancy, latest
from ._tenancy import Mode
from .segment import SegmentCore, checked

T = TypeVar("T")


async def _drive(steps: Steps[T], url: Url | None, operation: str, timeout: float | None) -> T:
    gate = Gate(url, lambda: None)
    try:
        return await arun(steps, Lane(gate, operation, passing=True), timeout)
    finally:
        gate.close()


class Segment(SegmentCore):
    """`ipckit.sync.Segment` for tasks: opened by `await` or `async with`; `resize` and `unlink` are awaited."""

    __slots__ = ("_asked",)

    def __init__(
        self,
        url: str | Url | None = None,
        size: int | str | None = None,
        mode: Mode | None = None,
        *,
        timeout: float | None = 0,
        readonly: bool = False,
    ) -> None:
        self._begin(readonly)
        self._asked = None if url is None else (checked(url), size, mode, timeout)
        if self._asked is None:
            self._anonymous(size)
        else:
            self.url = self._asked[0]

    async def _opened(self) -> Self:
        asked, self._asked = self._asked, None
        if asked is not None:
            url, size, mode, timeout = asked
            await _drive(self._opening(url, size, mode, timeout), url, "open", _tenancy.patience(timeout))
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._opened().__await__()

    async def resize(self, size: int | str, timeout: float | None = None) -> None:
        """See `ipckit.sync.Segment.resize`."""
        await _drive(self._resizing(size), self.url, "resize", timeout)

    async def unlink(self, timeout: float | None = None) -> None:
        """See `ipckit.sync.Segment.unlink`."""
        await _drive(self._unlinking(), self.url, "unlink", timeout)

    async def __aenter__(self) -> Self:
        return await self

    async def __aexit__(self, *_: object) -> None:
        self.close()


def _newer(core: latest.Latest[Any], seen: int) -> Steps[bool]:
    """Until a number above `seen` is there."""
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        while (watch := core._watch(seen, bell)) is not None:
            yield Wait(((bell, select.POLLIN),))
            del watch
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(bell)
        return True
    finally:
        os.close(bell)


class Latest(Generic[T]):
    """`ipckit.sync.Latest` for tasks: opened by `await` or `async with`; `wait` is awaited, `read` and `write` never wait."""

    __slots__ = ("_asked", "_core", "_gate")

    def __init__(self, url: str | Url, of: Any, *, size: int | str | None = None) -> None:
        self._asked = (checked(url), of, size)
        self._core: latest.Latest[T] | None = None
        self._gate = Gate(self._asked[0], lambda: None)

    async def _opened(self) -> Self:
        if self._core is None and not self._gate.closed:
            url, of, size = self._asked
            self._core = await _drive(latest.opening(url, of, size), url, "open", _tenancy.CONTENTION)
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self._opened().__await__()

    async def __aenter__(self) -> Self:
        return await self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _opened_core(self) -> latest.Latest[T]:
        if self._core is None:
            raise errors.Closed("this Latest is not open", url=self.url, hint="await it, or use it with `async with`")
        return self._core

    @property
    def url(self) -> Url:
        return self._asked[0]

    @property
    def size(self) -> int:
        """Bytes of the largest value."""
        return self._opened_core().size

    @property
    def number(self) -> int:
        """Of the newest value; 0: none yet."""
        return self._opened_core().number

    @property
    def seen(self) -> int:
        """The number of the value that this object read last; 0: none."""
        return self._opened_core().seen

    def read(self) -> T | None:
        """The newest value; None: there is none yet."""
        return self._opened_core().read()

    def read_into(self, buffer: Buffer) -> int | None:
        """See `ipckit.sync.Latest.read_into`."""
        return self._opened_core().read_into(buffer)

    def write(self, value: T) -> int:
        """Make this the newest value; its number."""
        return self._opened_core().write(value)

    def writer(self) -> int | None:
        """The process that may write now."""
        return self._opened_core().writer()

    async def wait(self, timeout: float | None = None, newer_than: int | None = None) -> T:
        """The newest value as soon as it is newer; see `ipckit.sync.Latest.wait`. Several tasks may wait at once."""
        core = self._opened_core()
        seen = latest.above(core.seen, newer_than)
        try:
            await arun(_newer(core, seen), Lane(self._gate, "wait", passing=True), timeout)
        except errors.Timeout as late:
            raise latest.no_news(self.url, timeout) from late
        value = core.read()
        assert value is not None
        return value

    def unlink(self) -> None:
        """Remove the name now."""
        self._opened_core().unlink()

    def close(self) -> None:
        """Be attached no more; tasks that wait raise Closed. Idempotent."""
        self._gate.close()
        if self._core is not None:
            self._core.close()

    def __repr__(self) -> str:
        return f"<aio of {self._core!r}>" if self._core is not None else f"<aio Latest {self.url}: not open>"
