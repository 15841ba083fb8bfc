"""`RWLock`: many readers, or one writer."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from .. import _native, errors
from .._url import Url
from . import _home
from ._deadlock import Waiting, patiently
from ._verdict import INHERITED, READ, REPAIR, WAIT, WRITE, make_fail
from .lock import Owner


class _Side:
    """`with rw.read:`, `with rw.write:`; or acquire and release as of a Lock."""

    __slots__ = ("_lock", "_role")

    def __init__(self, lock: RWLock, role: int) -> None:
        self._lock = lock
        self._role = role

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Whether it got in within `timeout` seconds. Raises OwnerDied, Deadlock, ResourceLimit."""
        lock = self._lock

        def take(block: bool, timeout: float | None = None) -> bool:
            return lock._enter(self._role, "acquire", block, timeout)[0] != WAIT

        if not (block and lock._debug):
            return take(block, timeout)
        return patiently(take, Waiting(f"RWLock {lock.url or 'anonymous'}", lock.url, lock.owners), timeout)

    def release(self) -> None:
        """Raises NotOwner."""
        self._lock._leave(self._role, "release")

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class _Recovery:
    """As `lock.Recovery`: alone inside, until what it guards is repaired."""

    __slots__ = ("_abandoned", "_lock", "_timeout")

    def __init__(self, lock: RWLock, timeout: float | None) -> None:
        self._lock = lock
        self._timeout = timeout
        self._abandoned = False

    def __enter__(self) -> bool:
        verdict, _, _ = self._lock._enter(REPAIR, "recover", True, self._timeout)
        if verdict == WAIT:
            raise errors.Timeout("somebody else is inside", url=self._lock.url, operation="recover")
        self._abandoned = verdict == INHERITED
        return self._abandoned

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._lock._leave(REPAIR, "recover", 0, kind is not None and self._abandoned)


class RWLock(_native.Crowd):
    """Many readers or one writer, in the order in which they came: neither side starves the other.

    A reader that dies is out, as if it had left. A writer that dies leaves it abandoned: `OwnerDied` to everyone, until somebody
    leaves `recover()` normally. A thread that reads may read again; to write while it reads would be a Deadlock, and raises it.

    Args:
        url: `shm://name`, or None: passed to children.
        debug: as of a `Lock`; who waits with it is not kept in order.
    """

    __slots__ = ("__weakref__", "_debug", "url")
    url: Url | None
    _debug: bool

    def __new__(cls, url: str | Url | None = None, *, debug: bool = False) -> Self:
        name = _home.name_of(url)
        return cls._from_fd(_home.opened(name, _home.RWLOCK), name, debug)

    @classmethod
    def _from_fd(cls, fd: int, url: Url | None, debug: bool) -> Self:
        make, fail = super().__new__, make_fail(url, "RWLock")
        self: Self = _home.build(lambda fd: make(cls, fd, _home.RWLOCK, fail), fd, url)
        self.url, self._debug = url, debug
        return self

    @property
    def read(self) -> _Side:
        return _Side(self, READ)

    @property
    def write(self) -> _Side:
        return _Side(self, WRITE)

    def recover(self, timeout: float | None = None) -> _Recovery:
        """`with rw.recover():` alone inside, repair what it guards and leave normally. See `Lock.recover`."""
        return _Recovery(self, timeout)

    @property
    def abandoned(self) -> bool:
        """A writer died, and nobody has repaired what it guards."""
        return bool(self._flags()[0] & 1)

    def owners(self) -> list[Owner]:
        """Who is inside: the readers, or the writer."""
        return [Owner(*owner) for _, _, waits, owner in self._people() if not waits]

    def unlink(self) -> None:
        """Remove the name; see `Lock.unlink`."""
        _home.unlink(self.url)

    def __reduce__(self) -> Any:
        if self.url is not None:
            return _reopen, (type(self), self.url.reveal(), self._debug)
        return _home.rebuild, (type(self), _home.Passed(self, self._fd), None, self._debug)

    def __repr__(self) -> str:
        readers, writers = self._count(READ, False), self._count(WRITE, False)
        state = "abandoned" if self.abandoned else "written" if writers else f"{readers} readers"
        return f"<RWLock {self.url or 'anonymous'}: {state}>"


def _reopen(cls: type[RWLock], url: str, debug: bool) -> RWLock:
    return cls(url, debug=debug)
