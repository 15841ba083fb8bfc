"""`Barrier`: all go on when all have come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from .. import _native, errors
from .._url import Url
from . import _home
from ._verdict import PARTY, WAIT, make_fail


class Barrier(_native.Crowd):
    """A meeting point of `parties` threads or processes.

    The last to come runs `action` and lets the others go. A party that dies while it waits, gives up or calls `abort` breaks the
    barrier: everyone gets `BrokenBarrier` until somebody calls `reset()`. (Nobody can know of a party that died before it came.)

    Args:
        parties: how many; the maker's counts.
        action: called by one of them, each time, before they go on.
        timeout: seconds, for `wait` without its own.
        url: `shm://name`, or None: passed to children.
    """

    __slots__ = ("__weakref__", "_action", "_timeout", "url")
    url: Url | None
    _action: Callable[[], object] | None
    _timeout: float | None

    def __new__(
        cls,
        parties: int,
        action: Callable[[], object] | None = None,
        timeout: float | None = None,
        url: str | Url | None = None,
    ) -> Self:
        if not 1 <= parties <= 1000:
            raise ValueError("parties must be from 1 to 1000")
        name = _home.name_of(url)
        return cls._from_fd(_home.opened(name, _home.BARRIER, 0, parties), name, action, timeout)

    @classmethod
    def _from_fd(cls, fd: int, url: Url | None, action: Callable[[], object] | None, timeout: float | None) -> Self:
        make, fail = super().__new__, make_fail(url, "Barrier")
        self: Self = _home.build(lambda fd: make(cls, fd, _home.BARRIER, fail), fd, url)
        self.url, self._action, self._timeout = url, action, timeout
        return self

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the others: a number from 0 to parties - 1, another for each.

        Raises: BrokenBarrier, also when `timeout` seconds have passed.
        """
        verdict, slot, before = self._enter(PARTY, "wait", True, self._timeout if timeout is None else timeout)
        if verdict == WAIT:
            raise self._broken("not all came in time")
        if slot:
            self._run(slot)
        return before

    def _run(self, slot: int) -> None:
        """The last to come: run the action, then let the others go."""
        try:
            if self._action is not None:
                self._action()
        except BaseException:
            self._break(slot)
            raise
        self._open(slot)

    def _broken(self, why: str) -> errors.BrokenBarrier:
        return errors.BrokenBarrier(why, url=self.url, operation="wait", hint="reset() makes it whole")

    def abort(self) -> None:
        """Break it: everyone who waits, or comes, gets BrokenBarrier."""
        self._break(0)

    def reset(self) -> None:
        """Make it whole; who waits now gets BrokenBarrier."""
        self._reset()

    @property
    def parties(self) -> int:
        return self._flags()[1]

    @property
    def n_waiting(self) -> int:
        return self._count(PARTY, True)

    @property
    def broken(self) -> bool:
        return bool(self._flags()[0] & 2)

    def unlink(self) -> None:
        """Remove the name; see `Lock.unlink`."""
        _home.unlink(self.url)

    def __reduce__(self) -> Any:
        if self.url is not None:
            return type(self), (self.parties, self._action, self._timeout, self.url.reveal())
        return _home.rebuild, (type(self), _home.Passed(self, self._fd), None, self._action, self._timeout)

    def __repr__(self) -> str:
        state = "broken" if self.broken else f"{self.n_waiting} of {self.parties} wait"
        return f"<Barrier {self.url or 'anonymous'}: {state}>"
