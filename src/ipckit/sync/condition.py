"""`Condition`: wait until somebody says that something has changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

from .. import _native, errors
from .._url import Url
from . import _home
from ._verdict import LISTENER, make_fail
from .lock import Lock, Owner, Recovery, RLock

T = TypeVar("T")


class _Own(RLock):
    """The lock of a Condition that brings its own: it lies in the same memory."""

    __slots__ = ()
    _kind = _home.CONDITION
    _of = "Condition"


class Condition(_native.Crowd):
    """A condition variable between threads and processes, with its lock.

    A waiter that dies costs nothing: a notification that it can no longer act on goes to the next. If one dies that holds the
    lock, `wait` raises OwnerDied, without it, in everyone who waits; `with condition:` knows that nothing is left to release.

    Args:
        lock: a Lock or RLock of ipckit; None: an RLock of its own. Under a name, all must give the same.
        url: `shm://name`, or None: passed to children.
    """

    __slots__ = ("__weakref__", "_lock", "_own", "acquire", "release", "url")
    url: Url | None
    _lock: Lock | RLock
    _own: bool
    acquire: Callable[..., bool]  # of the lock: (block=True, timeout=None)
    release: Callable[[], None]

    def __new__(cls, lock: Lock | RLock | None = None, url: str | Url | None = None) -> Self:
        if lock is not None and not isinstance(lock, (Lock, RLock)):
            raise TypeError(f"lock= is a Lock or RLock of ipckit.sync in shared memory, not {type(lock).__name__}")
        name = _home.name_of(url)
        return cls._from_fd(_home.opened(name, _home.CONDITION), name, lock)

    @classmethod
    def _from_fd(cls, fd: int, url: Url | None, lock: Lock | RLock | None) -> Self:
        make, fail = super().__new__, make_fail(url, "Condition")
        self: Self = _home.build(lambda fd: make(cls, fd, _home.CONDITION, fail), fd, url)
        self.url = url
        self._own = lock is None
        self._lock = _Own._from_fd(_home.duplicate(self._fd), url, "raise") if lock is None else lock
        self._lock._watch()
        self.acquire = self._lock.acquire
        self.release = self._lock.release
        return self

    def __enter__(self) -> bool:
        self._lock.__enter__()
        return True

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(*exc)

    def wait(self, timeout: float | None = None) -> bool:
        """Let go of the lock, wait to be notified, take the lock back. Whether it was notified within `timeout` seconds."""
        self._need_lock("wait")
        return self._wait(timeout, self._lock)

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until `predicate()` is true, at most `timeout` seconds; its last value."""
        deadline = None if timeout is None else time.monotonic() + timeout
        result = predicate()
        while not result:
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                break
            self.wait(remaining)
            result = predicate()
        return result

    def notify(self, n: int = 1) -> None:
        """Wake `n` of those who wait, the eldest first. Raises NotOwner without the lock."""
        self._need_lock("notify")
        self._notify(n)

    def notify_all(self) -> None:
        """Wake all."""
        self._need_lock("notify_all")
        self._notify(2**32 - 1)

    def _need_lock(self, operation: str) -> None:
        if not self._lock._is_owned():
            raise errors.NotOwner("this thread does not hold the lock", url=self.url, operation=operation)

    def recover(self, timeout: float | None = None) -> Recovery:
        """Of its lock; see `Lock.recover`."""
        return self._lock.recover(timeout)

    def owner(self) -> Owner | None:
        """Who holds its lock."""
        return self._lock.owner()

    @property
    def abandoned(self) -> bool:
        return self._lock.abandoned

    @property
    def n_waiting(self) -> int:
        return self._count(LISTENER, True)

    def unlink(self) -> None:
        """Remove the name; see `Lock.unlink`."""
        _home.unlink(self.url)

    def __reduce__(self) -> Any:
        lock = None if self._own else self._lock
        if self.url is not None:
            return type(self), (lock, self.url.reveal())
        return _home.rebuild, (type(self), _home.Passed(self, self._fd), None, lock)

    def __repr__(self) -> str:
        return f"<Condition {self.url or 'anonymous'}: {self.n_waiting} wait, {self._lock!r}>"
