"""Names in memory that go with the last who uses them, however that one ends.

    NAME.segment         the thing: a page that says what it is, and its bytes. Whole from the first moment, replaced in one step
    NAME.segment.lock    empty, and the same for as long as anybody is attached, whatever replaces the thing
    NAME.segment.lock.next    the next generation, for the moment before it takes the place of the thing

Two locks on the second file, both of which the kernel takes back from the killed:

    flock, shared        is held by whoever is attached, so one who gets it for himself knows that nobody is
    record lock (OFD)    is held while somebody changes what the two names lead to: coming, going, resizing, removing. It is
                         tried, never waited for, and whoever has it looks whether its file still has the name

So whatever a killed process leaves is whole, or is seen to be nobody's; the next to come removes it. Nothing is counted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Literal, TypeVar
from weakref import WeakSet

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from .._wait import Gate, Lane, run
from ..transports._litter import bury_owned
from ._files import HEADER, Identity, leads_to, make_thing, open_file, open_thing, remove

T = TypeVar("T")
Mode = Literal["create", "attach", "create-or-attach"]

SUFFIXES = (".segment", ".latest")
_ENDS = (*SUFFIXES, ".lock")
PATIENCE = 1.0  # seconds that close() goes on looking whether it is the last, while others come and go
CONTENTION = 5.0  # seconds that opening takes at least before it gives up on one who is in the middle of a change
_FLOCK = struct.Struct("@hhqqi4x")  # struct flock, 64 bits
_CHANGE, WRITER = 0, 1  # the bytes of the lock file that record locks are about


def lock_path(path: Path) -> str:
    return f"{path}.lock"


def _aside(path: Path) -> str:
    return f"{path}.lock.next"


# -- locks --------------------------------------------------------------------------------------------------------------


def try_record(fd: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def record_is_held(fd: int, byte: int) -> bool:
    """By somebody else."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK


def _drop_record(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, _CHANGE, 1, 0))


class _Changing:
    """The right to change what the names lead to: `with _Changing(fd) as fd`. Closes it, unless it was kept."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._kept = False

    def __enter__(self) -> _Changing:
        return self

    def alone(self) -> bool:
        """Nobody is attached; as long as we hold the record lock, nobody will be."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def keep(self) -> int:
        """Be attached. Raises BlockingIOError if a stranger has it for himself: of ours nobody does without the record lock."""
        fcntl.flock(self.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._kept = True
        return self.fd

    def __exit__(self, *_: object) -> None:
        # By name and not by closing: a child that was forked in between has the descriptor too.
        if not self._kept:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        _drop_record(self.fd)
        if not self._kept:
            os.close(self.fd)


def _change(
    url: Url | None, path: Path, operation: str, *, make: bool = False, look: bool = False
) -> Steps[_Changing | None]:
    """Wait for the right to. None: there is no lock file, and so no thing. Raises Timeout."""
    lock, pause = lock_path(path), 0.0005
    while True:
        opened = open_file(url, lock, os.O_CREAT if make else 0)
        if opened is None:
            return None
        fd, file = opened
        held = False
        try:
            if file.st_size:
                raise errors.ProtocolError(f"{lock} is no lock of ours", url=url, operation=operation)
            held = try_record(fd, _CHANGE)
            if held and leads_to(lock, file):
                if not look:
                    remove(_aside(path))  # somebody was killed over it
                return _Changing(fd)
            if held:
                _drop_record(fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        if held:
            continue  # the last one out removed this file: there is, or will be, another
        try:
            yield Wait((), pause)
        except errors.Timeout as late:
            raise errors.Timeout(
                "another process is changing it, and does not come to an end",
                url=url,
                operation=operation,
                hint="is it stopped? lsof tells who has the file open",
            ) from late
        pause = min(pause * 2, 0.02)


def drive(steps: Steps[T], url: Url | None, operation: str, timeout: float | None) -> T:
    """`steps` to their end, on this thread."""
    try:
        next(steps)
    except StopIteration as stop:  # nearly always: nobody else is in the middle of anything
        result: T = stop.value
        return result
    gate = Gate(url, lambda: None)
    try:
        return run(steps, Lane(gate, operation), timeout)
    finally:
        gate.close()


# -- those who are attached -----------------------------------------------------------------------------------------------


def _after_fork(_: object) -> None:
    _at_exit()


class Tenant:
    """One who is attached: closed by `leave`, or with the process."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self.lock = lock
        _here.add(self)
        _at_exit()

    def leave(self) -> None:
        """Idempotent. If nobody else is attached, the names go."""
        if self.lock < 0:
            return
        lock, self.lock = self.lock, -1
        _here.discard(self)
        # First our own: a forked child that has it too is then attached, and we are not the last.
        os.close(lock)
        with contextlib.suppress(OSError, errors.IpcError):  # the next to come removes it
            drive(bury(self.path), None, "close", PATIENCE)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.leave()


_here: WeakSet[Tenant] = WeakSet()
_exit_of = 0  # the process whose end we look after


def _at_exit() -> None:
    """Multiprocessing's children end without Python's atexit, but not without its finalizers."""
    global _exit_of
    if _exit_of != os.getpid():
        _exit_of = os.getpid()
        util.Finalize(None, _all_leave, exitpriority=0)


def _all_leave() -> None:
    for tenant in tuple(_here):
        tenant.leave()


util.register_after_fork(Tenant, _after_fork)


def enter(
    url: Url, path: Path, mode: Mode, timeout: float | None, size: int, fill: Callable[[int], None]
) -> Steps[tuple[Tenant, int, Identity]]:
    """Attach: the tenant, the thing's descriptor (the caller's), its first page. A new one has `size` bytes and is filled.

    Waits `timeout` seconds for one to be created, if it may not create. Raises AddressInUse, NotFound, AccessDenied.
    """
    deadline, pause = None if timeout is None else time.monotonic() + timeout, 0.001
    while True:
        changing = yield from _change(url, path, "open", make=mode != "attach")
        if changing is not None:
            with changing:
                found = _enter(url, path, mode, changing, size, fill)
            if found is not None:
                return found
        if deadline is not None and time.monotonic() >= deadline:
            raise errors.NotFound(
                "nothing has this name",
                url=url,
                operation="attach",
                hint="create it first, or wait for it with timeout=",
            )
        yield Wait((), pause if deadline is None else min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(pause * 2, 0.02)


def _enter(
    url: Url, path: Path, mode: Mode, changing: _Changing, size: int, fill: Callable[[int], None]
) -> tuple[Tenant, int, Identity] | None:
    alone = changing.alone()
    fd = -1
    try:
        found = open_thing(url, path)
        if found is not None:
            fd, identity = found
            if alone:  # what the dead left
                os.close(fd)
                fd = -1
                os.unlink(path)
            elif mode == "create":
                raise errors.AddressInUse("somebody has created it", url=url, operation="create", hint="mode='attach'")
        if fd < 0 and mode != "attach":
            sweep(path.parent, path)
            identity = Identity(size, 1, os.urandom(16), time.time(), os.getpid())
            fd = make_thing(path, identity, fill, _aside(path))
        if fd >= 0:
            return Tenant(path, changing.keep()), fd, identity
    except BaseException:
        if fd >= 0:
            if alone:
                remove(path)
            os.close(fd)
        if alone:
            remove(lock_path(path))
        raise
    if alone:
        remove(lock_path(path))
    return None


def resize(url: Url, tenant: Tenant, ours: Identity, size: int) -> Steps[None]:
    """Replace the newest generation by one of `size` bytes that begins alike. Raises NotFound if the name is gone."""
    changing = yield from _change(url, tenant.path, "resize")
    if changing is None:
        raise _gone(url)
    with changing:
        found = open_thing(url, tenant.path)
        if found is None:
            raise _gone(url)
        fd, newest = found
        try:
            if newest.series != ours.series:
                raise _gone(url)
            if newest.size == size:
                return
            following = Identity(size, newest.generation + 1, newest.series, newest.made, newest.maker)
            common = min(size, newest.size)
            made = make_thing(
                tenant.path, following, lambda to: _copy(fd, to, common), _aside(tenant.path), replace=True
            )
            os.close(made)
        finally:
            os.close(fd)


def _gone(url: Url) -> errors.NotFound:
    return errors.NotFound("the name was removed", url=url, operation="resize")


def _copy(source: int, target: int, size: int) -> None:
    at = HEADER
    os.lseek(target, HEADER, os.SEEK_SET)
    while at < HEADER + size:
        copied = os.sendfile(target, source, at, HEADER + size - at)
        if copied == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        at += copied


def unlink(url: Url, tenant: Tenant, ours: Identity) -> Steps[None]:
    """Remove the names, if they are still those of our series: whoever is attached stays so, whoever comes makes a new one."""
    changing = yield from _change(url, tenant.path, "unlink")
    if changing is None:
        return
    with changing:
        found = open_thing(url, tenant.path)
        if found is None:
            return
        os.close(found[0])
        if found[1].series == ours.series:
            os.unlink(tenant.path)
            remove(lock_path(tenant.path))


def bury(path: Path, *, lockless: bool = False) -> Steps[bool]:
    """Remove what has this name if nobody is attached to it, and it is ours; whether it did. `lockless`: even without lock."""
    changing = yield from _change(None, path, "close", make=lockless)
    if changing is None:
        return False
    with changing:
        if not changing.alone():
            return False
        found = open_thing(None, path)
        if found is not None:
            os.close(found[0])
            os.unlink(path)
        remove(lock_path(path))
        return True


def bury_at_once(path: Path) -> bool:
    """`bury`, unless somebody is in the middle of a change; and also what has lost its lock. Whether it did."""
    try:
        found = open_thing(None, path)
        if found is not None:
            os.close(found[0])
        return bool(_at_once(bury(path, lockless=found is not None)))
    except (OSError, errors.IpcError):  # a stranger's
        return False


def is_dead(path: Path) -> bool:
    """Nobody is attached, and nobody comes or goes: `bury` would remove it. A glance."""
    with contextlib.suppress(OSError, errors.IpcError):  # a stranger's
        changing = _at_once(_change(None, path, "look", look=True))
        if changing is not None:
            with changing:
                return changing.alone()
    return False


def half_made(path: Path) -> Path | None:
    """A next generation whose maker was killed before it took its place. Removed by whoever comes by next."""
    aside = Path(_aside(path))
    with contextlib.suppress(OSError, errors.IpcError):
        opened = open_file(None, lock_path(path)) if aside.exists() else None
        if opened is not None:
            fd, file = opened
            try:
                return None if file.st_size or record_is_held(fd, _CHANGE) else aside
            finally:
                os.close(fd)
    return None


def pass_by(path: Path) -> bool:
    """Remove what is half made; whether there was something."""
    found = half_made(path) is not None
    with contextlib.suppress(OSError, errors.IpcError):
        changing = _at_once(_change(None, path, "look"))
        if changing is not None:
            with changing:
                return found
    return False


def names(directory: Path) -> list[Path]:
    """What looks like ours in a directory, or like the lock of it."""
    return _names(directory, os.listdir(directory))


def _names(directory: Path, entries: list[str]) -> list[Path]:
    found = {name.removesuffix(".lock") for name in entries if name.endswith(_ENDS)}
    return [directory / name for name in sorted(found) if name.endswith(SUFFIXES)]


def sweep(directory: Path, besides: Path | None = None) -> None:
    """Remove what the dead left in a directory: before memory is taken, so a crash holds it no longer than that.

    `besides`: the name that the caller is about to change.
    """
    entries = os.listdir(directory)
    for path in _names(directory, entries):
        if path != besides:
            bury_at_once(path)
    for name in entries:
        if name.endswith(".tmp"):
            bury_owned(directory / name)


def patience(timeout: float | None) -> float | None:
    """How long to drive `enter`: its timeout is about the name; one who is in the middle of a change is given some seconds."""
    return None if timeout is None else max(timeout, CONTENTION)


def _at_once(steps: Steps[T]) -> T | None:
    """What comes of it without waiting; None if it had to wait."""
    try:
        next(steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    steps.close()
    return None
