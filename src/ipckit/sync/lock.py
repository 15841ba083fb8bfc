"""`Lock` and `RLock`: the robust mutex. Acquiring, releasing and `with` are C methods; see _native/lock.h."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from .. import _native, errors
from .._url import Url
from . import _home, _places
from ._deadlock import Debugged
from ._verdict import make_fail

OnOwnerDied = Literal["raise", "take"]


class Owner(NamedTuple):
    """Who holds a lock.

    Attributes:
        pid: its process.
        since: when it got it, in seconds since the epoch (some milliseconds coarse).
        tid: its thread, as the kernel counts them.
    """

    pid: int
    since: float
    tid: int


class Recovery:
    """`with lock.recover(timeout) as abandoned`: hold an abandoned lock, repair what it guards, leave normally.

    Leaving by an exception (or dying) keeps it abandoned. While one repairs, others who want to are kept waiting; when
    they come in nothing is left to do, and `abandoned` is False. Raises Timeout.
    """

    __slots__ = ("_abandoned", "_lock", "_timeout")

    def __init__(self, lock: Any, timeout: float | None) -> None:
        self._lock = lock
        self._timeout = timeout
        self._abandoned = False

    def __enter__(self) -> bool:
        nested = self._lock._is_owned()  # an RLock's: whoever holds it outside has it, or repairs, already
        if not self._lock._recover(self._timeout):
            raise errors.Timeout("somebody else holds it", url=self._lock.url, operation="recover")
        self._abandoned = self._lock._inherited and not nested
        return self._abandoned

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is not None and self._abandoned:
            self._lock._abandon()
        else:
            self._lock.release()


class _Mutex(_native.Mutex):
    """What Lock and RLock have in common."""

    __slots__ = ("__weakref__", "_on_owner_died", "url")
    _kind = _home.LOCK
    _of = "Lock"
    url: Url | None
    _on_owner_died: OnOwnerDied

    def __init_subclass__(cls) -> None:
        _native.own_methods(cls)

    def __new__(
        cls, url: str | Url | None = None, *, on_owner_died: OnOwnerDied = "raise", debug: bool = False
    ) -> Self:
        if debug:
            cls = cls._debugged()
        name = _home.name_of(url)
        _home.check_on_owner_died(on_owner_died, name)
        return cls._from_fd(_home.opened(name, cls._kind), name, on_owner_died)

    @classmethod
    def _debugged(cls) -> type[Self]:
        raise NotImplementedError

    @classmethod
    def _from_fd(cls, fd: int, url: Url | None, on_owner_died: OnOwnerDied) -> Self:
        fail = make_fail(url, cls._of)
        make = super().__new__
        self: Self = _home.build(lambda fd: make(cls, fd, cls._kind, fail, on_owner_died == "take"), fd, url)
        self.url = url
        self._on_owner_died = on_owner_died
        return self

    @property
    def inherited(self) -> bool:
        """This object's last acquire took the lock from a dead owner (`on_owner_died="take"`, or `recover`)."""
        return self._inherited

    @property
    def abandoned(self) -> bool:
        """Its owner died, and nobody has repaired what it guards."""
        return bool(self._word() & 0x4000_0000)

    def locked(self) -> bool:
        """Somebody holds it, or it is abandoned: a glance."""
        return bool(self._word() & 0x7FFF_FFFF)

    def owner(self) -> Owner | None:
        """Who holds it, since when; None if nobody does."""
        found = self._owner()
        return None if found is None else Owner(*found)

    def recover(self, timeout: float | None = None) -> Recovery:
        """`with lock.recover():` repair what it guards and leave normally; then the lock is whole again. See `Recovery`."""
        return Recovery(self, timeout)

    def unlink(self) -> None:
        """Remove the name. Whoever has the lock open keeps it; the next to open the name makes a new one."""
        _home.unlink(self.url)

    def __reduce__(self) -> Any:
        if self.url is not None:
            return _reopen, (type(self), self.url.reveal(), self._on_owner_died)
        return _home.rebuild, (type(self), _home.Passed(self, self._fd), None, self._on_owner_died)

    def __repr__(self) -> str:
        owner = self.owner()
        state = "abandoned" if self.abandoned else "free" if owner is None else f"held by process {owner.pid}"
        return f"<{self._of} {self.url or 'anonymous'}: {state}>"


def _reopen(cls: type[_Mutex], url: str, on_owner_died: OnOwnerDied) -> _Mutex:
    return cls(url, on_owner_died=on_owner_died)


class Lock(_Mutex):
    """A lock between threads and processes, by name or anonymous, that its owner's death does not lose.

    The thread that acquired it owns it and releases it. If it ends without, `acquire` and `with` raise `OwnerDied` within
    milliseconds, without the lock, until somebody leaves `recover()` normally; with `on_owner_died="take"` the next one simply
    gets it.

    Args:
        url: `shm://name`; None: inherited by forked children, and passed to others as an argument of Process; or that of a
            broker (`redis://host/name`, `nats://host/bucket/name`): then it is a `leased.LeasedLock`, which see.
        on_owner_died: "raise", or "take" for data that a half-done update cannot hurt.
        debug: raise Deadlock, with the cycle, where threads or processes wait for each other, among locks that all have it.
            Slower when it has to wait.

    `acquire(block=True, timeout=None)` (seconds) returns whether it got it; Ctrl-C ends the wait. Raises OwnerDied; Deadlock
    where the thread holds it already and would wait for ever; ResourceLimit. `release()` raises NotOwner.
    """

    __slots__ = ()

    def __new__(
        cls, url: str | Url | None = None, *, on_owner_died: OnOwnerDied = "raise", debug: bool = False
    ) -> Self:
        elsewhere = _places.lock(url, on_owner_died)
        if elsewhere is not None:
            if debug:
                raise errors.BadOption("debug= is for locks in shared memory", url=url)
            made: Self = elsewhere(url)
            return made
        return super().__new__(cls, url, on_owner_died=on_owner_died, debug=debug)

    @classmethod
    def _debugged(cls) -> type[Any]:
        return cls if issubclass(cls, Debugged) else DebuggedLock


class DebuggedLock(Debugged, Lock):
    """What `Lock(debug=True)` is."""

    __slots__ = ()


class RLock(_Mutex):
    """A `Lock` that its owner may acquire again, and must release as often. Everything else as `Lock`."""

    __slots__ = ()
    _kind = _home.RLOCK
    _of = "RLock"

    @classmethod
    def _debugged(cls) -> type[Any]:
        return cls if issubclass(cls, Debugged) else DebuggedRLock


class DebuggedRLock(Debugged, RLock):
    """What `RLock(debug=True)` is."""

    __slots__ = ()
