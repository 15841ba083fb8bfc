"""`Semaphore(value, "posix+sem://name")`: a named POSIX semaphore, which every language can open.

    sem_t *pool = sem_open("/name", O_CREAT, 0600, 4);     /* the same one, in C */

The kernel counts and knows nobody: a unit that a killed process had is gone, nobody hears of it, and nothing has a bound. What
has owners is `Semaphore(leased=True)` in our own shared memory. Whoever creates it sets the value, with mode 0600; it stays until
`unlink` or the machine's restart. One that belongs to another user (root's excepted) is refused.

The kernel has no descriptor for it either, and posix_ipc drops the exception of a signal handler that runs while it waits. So one
thread for each object does the waiting, in short sleeps, for the threads and tasks that wait in Python. Whoever is cancelled or
interrupted loses no unit: what the thread gets when nobody wants it any more, it gives back. So within 50 ms after a wait that
was given up, a unit may be missing for an instant.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

import posix_ipc

from .. import errors
from .._url import Url, parse
from .._wait import Gate, Lane, no_timeout, run
from ..transports._oserror import map_oserror
from ._verdict import DONE, UNIT

_SLICE = 0.05  # seconds that the thread sleeps, at most, before it looks whether anybody still waits
_FILES = Path("/dev/shm")


def semaphore(value: int, url: str | Url, *, bounded: bool, leased: bool) -> PosixSemaphore:
    """Open it, or create it with `value`. Raises Unsupported for what POSIX semaphores cannot be."""
    where = parse(url)
    if bounded or leased:
        raise errors.Unsupported(
            f"a POSIX semaphore has no {'owners' if leased else 'bound'}",
            url=where,
            operation="open",
            hint="Semaphore(value, url) here, or the same class with shm://",
        )
    return PosixSemaphore(value, where)


class _Open(posix_ipc.Semaphore):  # type: ignore[misc]
    """Closed when the last who uses it is gone, be it the thread that waits: to close it under a waiter is a fault of memory."""

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class PosixSemaphore:
    """What `ipckit.sync.Semaphore` returns for posix+sem://. Its methods are those of that class."""

    __slots__ = ("__weakref__", "_native", "_pid", "_queue", "_value_given", "url")
    leased = False

    def __init__(self, value: int = 1, url: str | Url = "") -> None:
        self.url = parse(url)
        self._value_given = value
        if self.url.options:
            raise errors.BadOption(f"there is no option {self.url.options[0][0]!r} here", url=self.url)
        name = "/" + self.url.name
        if not 0 <= value <= posix_ipc.SEMAPHORE_VALUE_MAX:
            raise ValueError(f"semaphore initial value must be from 0 to {posix_ipc.SEMAPHORE_VALUE_MAX}")
        try:
            self._native = _Open(name, posix_ipc.O_CREAT, mode=0o600, initial_value=value)
            owner = self._owner()
        except posix_ipc.PermissionsError as error:
            raise errors.AccessDenied("it belongs to another user", url=self.url, operation="open") from error
        except OSError as error:
            raise map_oserror(error, self.url, "open") from error
        if owner not in (None, os.geteuid(), 0):
            raise errors.AccessDenied(f"it belongs to uid {owner}", url=self.url, operation="open")
        self._fresh()

    def _owner(self) -> int | None:
        """The uid, where the system shows it as a file."""
        with contextlib.suppress(FileNotFoundError):
            return os.lstat(_FILES / f"sem.{self.url.name}").st_uid
        return None

    def _fresh(self) -> None:
        self._pid = os.getpid()
        self._queue = _Queue(self._native)

    @property
    def native(self) -> Any:
        """The posix_ipc.Semaphore."""
        return self._native

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Take a unit; whether it got one within `timeout` seconds. Ctrl-C ends the wait."""
        if timeout is not None and math.isnan(timeout):
            raise no_timeout()
        if self._try():
            return True
        if not block or (timeout is not None and timeout <= 0):
            return False
        from .lock_tasks import attempt_steps  # with it comes asyncio, which whoever never waits does not need

        lane = Lane(Gate(self.url, lambda: None), "acquire", passing=True)
        with contextlib.closing(lane.gate):
            return run(attempt_steps(self._attempt(UNIT), self.release), lane, timeout) == DONE

    def _try(self) -> bool:
        try:
            self._native.acquire(0)
        except posix_ipc.BusyError:
            return False
        return True

    def release(self, n: int = 1) -> None:
        """Give back `n` units. Whoever calls it: a POSIX semaphore does not know who took them."""
        if n < 1:
            raise ValueError("n must be one or more")
        for _ in range(n):
            try:
                self._native.release()
            except OSError as error:
                raise map_oserror(error, self.url, "release") from error

    def get_value(self) -> int:
        """Units that are free: a glance."""
        return int(self._native.value)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def unlink(self) -> None:
        """Remove the name. Whoever has it open keeps it; the next to open the name makes a new one."""
        with contextlib.suppress(posix_ipc.ExistentialError):
            posix_ipc.unlink_semaphore("/" + self.url.name)

    def _attempt(self, _role: int) -> _Attempt:
        """For whoever waits: see `lock_tasks.attempt_steps`."""
        if self._pid != os.getpid():
            self._fresh()  # the thread was the parent's
        return _Attempt(self, self._queue)

    def __reduce__(self) -> Any:
        return type(self), (self._value_given, self.url.reveal())

    def __repr__(self) -> str:
        return f"<Semaphore {self.url}: {self.get_value()} free>"


class _Attempt:
    """One wait for a unit, as `lock_tasks.attempt_steps` drives it. `granted` changes under the queue's mutex only."""

    __slots__ = ("_queue", "_semaphore", "bell", "granted")

    def __init__(self, semaphore: PosixSemaphore, queue: _Queue) -> None:
        self._semaphore, self._queue = semaphore, queue
        self.granted = False
        self.bell = -1

    def poll(self) -> int | None:
        if self.bell < 0 and not self._queue.attempts and self._semaphore._try():  # not past those who came before
            self.granted = True
        return DONE if self.granted else None

    def now(self) -> int | None:
        """At once, or not at all."""
        return DONE if self._semaphore._try() else None

    def arm(self, bell: int) -> None:
        self._queue.put(self, bell)

    def give_up(self) -> bool:
        """Whether it has got a unit after all."""
        return self._queue.drop(self)


class _Queue:
    """Who waits at one object, first come first, and the thread that waits for them while there are any."""

    def __init__(self, native: Any) -> None:
        self.attempts = deque[_Attempt]()
        self._native = native
        self._mutex = threading.Lock()
        self._running = False

    def put(self, attempt: _Attempt, bell: int) -> None:
        with self._mutex:
            if attempt.granted:
                os.eventfd_write(bell, 1)
                return
            if attempt.bell < 0:
                self.attempts.append(attempt)
            attempt.bell = bell
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="ipckit-semaphore", daemon=True).start()

    def drop(self, attempt: _Attempt) -> bool:
        with self._mutex:
            if not attempt.granted and attempt.bell >= 0:
                self.attempts.remove(attempt)
            return attempt.granted

    def _run(self) -> None:
        while True:
            try:
                self._native.acquire(_SLICE)
                got = True
            except (posix_ipc.BusyError, posix_ipc.SignalError):
                got = False
            with self._mutex:
                if got and self.attempts:
                    first = self.attempts.popleft()
                    first.granted = True
                    os.eventfd_write(first.bell, 1)
                elif got:
                    self._native.release()
                if not self.attempts:
                    self._running = False
                    return
