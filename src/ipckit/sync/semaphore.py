"""`Semaphore` and `BoundedSemaphore`: so many at once."""

from __future__ import annotations

from typing import Any, Self

from .. import _native
from .._url import Url
from . import _home, _places
from ._verdict import UNIT, WAIT, make_fail

_MOST = 2**31 - 1


class _Semaphore(_native.Crowd):
    __slots__ = ("__weakref__", "_value_given", "leased", "url")
    _bounded = False
    url: Url | None
    leased: bool
    _value_given: int

    def __new__(cls, value: int = 1, url: str | Url | None = None, *, leased: bool = False) -> Self:
        if not 0 <= value <= _MOST:
            raise ValueError(f"semaphore initial value must be from 0 to {_MOST}")
        elsewhere = _places.semaphore(url)
        if elsewhere is not None:
            made: Self = elsewhere.semaphore(value, url, bounded=cls._bounded, leased=leased)
            return made
        name = _home.name_of(url)
        return cls._from_fd(_home.opened(name, cls._kind_of(leased), value, value), name, value, leased)

    @classmethod
    def _kind_of(cls, leased: bool) -> int:
        return _home.LEASED if leased else _home.BOUNDED if cls._bounded else _home.SEMAPHORE

    @classmethod
    def _from_fd(cls, fd: int, url: Url | None, value: int, leased: bool) -> Self:
        make, fail = super().__new__, make_fail(url, cls.__name__)
        self: Self = _home.build(lambda fd: make(cls, fd, cls._kind_of(leased), fail), fd, url)
        self.url, self.leased, self._value_given = url, leased, value
        return self

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a unit; whether it got one within `timeout` seconds. First come, first served; Ctrl-C ends the wait."""
        return self._enter(UNIT, "acquire", block, timeout)[0] != WAIT

    def release(self, n: int = 1) -> None:
        """Give back `n` units.

        Raises: ValueError above the initial value (bounded); NotOwner where this thread has none (leased).
        """
        if n < 1:
            raise ValueError("n must be one or more")
        if not self.leased:
            self._post(n)
            return
        for _ in range(n):
            self._leave(UNIT, "release")

    def get_value(self) -> int:
        """Units that are free: a glance."""
        return self._value()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def unlink(self) -> None:
        """Remove the name; see `Lock.unlink`."""
        _home.unlink(self.url)

    def __reduce__(self) -> Any:
        if self.url is not None:
            return _reopen, (type(self), self._value_given, self.url.reveal(), self.leased)
        return _home.rebuild, (type(self), _home.Passed(self, self._fd), None, self._value_given, self.leased)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url or 'anonymous'}: {self.get_value()} free>"


def _reopen(cls: type[_Semaphore], value: int, url: str, leased: bool) -> _Semaphore:
    return cls(value, url, leased=leased)


class Semaphore(_Semaphore):
    """A count of units between threads and processes.

    Args:
        value: how many there are at first; the maker's counts.
        url: `shm://name`; None: passed to children; `posix+sem://name`: a semaphore of the operating system, shared with
            programs in any language (see `ipckit.sync.posix`).
        leased: a unit belongs to the thread that took it, which alone can give it back, and comes back when that ends, however.

    A semaphore that is not leased has no owners, as everywhere: a unit that a killed process had is gone.
    """

    __slots__ = ()


class BoundedSemaphore(_Semaphore):
    """A `Semaphore` that never has more units than at first: `release` raises ValueError."""

    __slots__ = ()
    _bounded = True
