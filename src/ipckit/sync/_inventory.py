"""What exists in the memory directory, who uses it, who holds it and who waits: for `ipckit locks` and `ipckit gc`.

Looked at from outside, and what it says was true a moment ago. Who is attached is read from the descriptors of the processes that
we may look into (/proc), who holds and waits from the memory itself. Only the waiters of a Lock leave no name there; they are
found by the system call in which they sleep, where the system shows it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .. import _native, errors
from ..transports._litter import Litter, bury_owned, owned
from . import _home, _tenancy
from ._files import HEADER, Identity, open_thing
from ._verdict import LISTENER, PARTY, READ, UNIT, WRITE
from .latest import _map

Key = tuple[int, int]  # device and inode
_ROLES = {UNIT: "unit", READ: "reads", WRITE: "writes", PARTY: "waits", LISTENER: "listens"}
_ABANDONED = 0x4000_0000
_MUTEX_AT = 64
_WAIT = re.compile(r"([1-9]\d{0,9})(?:\.new)?")  # what _deadlock names its notes: thread ids
_FUTEX = {"x86_64": 202}.get(platform.machine(), 98)  # the number of the system call


@dataclass(frozen=True, slots=True)
class Holder:
    """Attributes: pid; since: seconds since the epoch; role: what it holds."""

    pid: int
    since: float | None
    role: str


@dataclass(frozen=True, slots=True)
class Thing:
    """One named object.

    Attributes:
        url, path, kind: which. bytes: how much memory it takes.
        state: in words.
        holders: who holds it. waiters: how many wait (None: the system does not show it).
        attached: processes that have it open, as far as we may see. age: seconds.
        used: somebody has it open, whoever that is.
        abandoned: its owner died, and nobody has repaired what it guards.
    """

    url: str
    path: str
    kind: str
    bytes: int
    state: str
    holders: list[Holder]
    waiters: int | None
    attached: list[int]
    age: float
    used: bool
    abandoned: bool = field(default=False)


def look(directory: Path) -> list[Thing]:
    """All that lies in the directory, by name; what is not ours is passed over."""
    found = []
    who = attached(directory)
    for path in sorted(directory.glob("*" + _home.SUFFIX)):
        with contextlib.suppress(OSError, errors.IpcError, ValueError):
            found.append(_look_at_object(path, who))
    for path in _tenancy.names(directory):
        with contextlib.suppress(OSError, errors.IpcError, ValueError):
            thing = _look_at_thing(path, who)
            if thing is not None:
                found.append(thing)
    return sorted(found, key=lambda thing: thing.url)


def litter(directory: Path, *, with_abandoned: bool = False) -> Iterator[Litter]:
    """What nobody has open. An abandoned lock is evidence of damage, so it stays unless it is asked for."""
    for thing in look(directory):
        path = Path(thing.path)
        if thing.used or (thing.abandoned and not with_abandoned):
            continue
        words = f"{thing.kind}, {thing.bytes} bytes"
        if path.suffix == _home.SUFFIX:
            yield Litter(thing.path, words, partial(_bury_object, path, with_abandoned))
        else:
            yield Litter(thing.path, words, partial(_tenancy.bury_at_once, path))
    for path in _tenancy.names(directory):
        if not path.exists() and _tenancy.is_dead(path):
            yield Litter(_tenancy.lock_path(path), "a lock without its segment", partial(_tenancy.bury_at_once, path))
    for path in _tenancy.names(directory):
        aside = _tenancy.half_made(path)
        if aside is not None and not _tenancy.is_dead(path):
            yield Litter(str(aside), "a generation that never took its place", partial(_tenancy.pass_by, path))
    for path in owned(directory):
        if path.suffix == ".tmp":
            yield Litter(str(path), "a file that never got its name", partial(bury_owned, path))
    for path in sorted((directory / "waits").glob("*")):
        if _bury_wait(path, look=True):
            yield Litter(str(path), "the note of a thread that waited", partial(_bury_wait, path))


# -- synchronisation objects ------------------------------------------------------------------------------------------------


def _read_header(fd: int) -> tuple[int, float]:
    """Its kind, and when it was made. Raises ValueError: it is none of ours."""
    kind, made = _home.read_header(fd)
    if not kind:
        raise ValueError("this is no synchronisation object")
    return kind, made


def _open_object(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise ValueError("this is none of ours")
    return fd


def _fail(verdict: int, operation: str, pid: int) -> BaseException:
    return ValueError(f"verdict {verdict}")


def _view(make: Callable[..., Any], fd: int, kind: int) -> Any:
    """A native object over a copy of the descriptor."""
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    try:
        return make(copy, kind, _fail)
    except BaseException:
        os.close(copy)
        raise


def _look_at_object(path: Path, who: dict[Key, set[int]]) -> Thing:
    fd = _open_object(path)
    try:
        found, (kind, made) = os.fstat(fd), _read_header(fd)
        pids = sorted(who.get((found.st_dev, found.st_ino), set()))
        used = not _is_free(fd)
        state, holders, waiters, abandoned = _state(fd, kind, pids, found)
    finally:
        os.close(fd)
    return Thing(
        f"shm://{path.name.removesuffix(_home.SUFFIX)}",
        str(path),
        _home.KINDS[kind - 1],
        found.st_size,
        state,
        holders,
        waiters,
        pids,
        max(time.time() - made, 0.0),
        used,
        abandoned,
    )


def _is_free(fd: int) -> bool:
    """Nobody has it open: those who do hold a shared flock. Given back at once: who comes meanwhile waits for that long."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return True


def _state(fd: int, kind: int, pids: list[int], found: os.stat_result) -> tuple[str, list[Holder], int | None, bool]:
    """State in words, holders, waiters, abandoned."""
    word, owner = 0, None
    if kind in (_home.LOCK, _home.RLOCK, _home.CONDITION):
        mutex = _view(_native.Mutex, fd, kind)
        word, owner = mutex._word(), mutex._owner()
    abandoned = bool(word & _ABANDONED)
    holders = [] if owner is None else [Holder(owner[0], owner[1], "holds")]
    if kind in (_home.LOCK, _home.RLOCK):
        state = "abandoned" if abandoned else "held" if owner else "free"
        return state, holders, _asleep(pids, found) if word & 0x8000_0000 else 0, abandoned
    crowd = _view(_native.Crowd, fd, kind)
    people = crowd._people()
    waiters = sum(waits for _, _, waits, _ in people)
    flags, limit = crowd._flags()
    holders += [
        Holder(pid, since, _ROLES.get(role, "repairs")) for _, role, waits, (pid, since, _) in people if not waits
    ]
    if kind == _home.RWLOCK:
        abandoned = bool(flags & 1)
        inside = [holder.role for holder in holders]
        state = "abandoned" if abandoned else "written" if "writes" in inside else "read" if inside else "free"
    elif kind == _home.EVENT:
        return "set" if crowd._event_is_set() else "clear", [], None, False
    elif kind == _home.BARRIER:
        state = "broken" if flags & 2 else f"{waiters} of {limit} are there"
    elif kind == _home.CONDITION:
        state = "abandoned" if abandoned else "held" if owner else "free"
    else:
        state = f"{crowd._value()} free"
    return state, holders, waiters, abandoned


def _bury_object(path: Path, with_abandoned: bool) -> bool:
    try:
        fd = _open_object(path)
    except (OSError, ValueError):
        return False
    try:
        kind, _ = _read_header(fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(fd)
        # With the lock for ourselves nobody has it open; whoever opens it now waits for us, and finds that it has no name.
        if not os.path.samestat(os.lstat(path), found):
            return False
        if _state(fd, kind, [], found)[3] and not with_abandoned:
            return False
        os.unlink(path)
        return True
    except (OSError, ValueError):
        return False
    finally:
        os.close(fd)


def _bury_wait(path: Path, look: bool = False) -> bool:
    """Remove a note of `_deadlock` whose thread is gone; whether it did. `look`: would it?"""
    name = _WAIT.fullmatch(path.name)
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    if (
        name is None
        or not stat.S_ISREG(found.st_mode)
        or found.st_uid != os.geteuid()
        or os.path.exists(f"/proc/{name[1]}")
    ):
        return False
    if not look:
        path.unlink(missing_ok=True)
    return True


# -- segments ---------------------------------------------------------------------------------------------------------------


def _look_at_thing(path: Path, who: dict[Key, set[int]]) -> Thing | None:
    found = open_thing(None, path)
    if found is None:
        return None
    fd, identity = found
    state, holders = f"generation {identity.generation}", list[Holder]()
    try:
        if path.suffix == ".latest":
            state, holders = _look_at_latest(path, fd, identity)
    finally:
        os.close(fd)
    pids: set[int] = set()
    with contextlib.suppress(FileNotFoundError):
        lock = os.lstat(_tenancy.lock_path(path))
        pids = who.get((lock.st_dev, lock.st_ino), set())
    kind = path.suffix[1:].capitalize()
    age = max(time.time() - identity.made, 0.0)
    used = os.path.exists(_tenancy.lock_path(path)) and not _tenancy.is_dead(path)
    return Thing(
        f"shm://{path.stem}", str(path), kind, identity.size + HEADER, state, holders, None, sorted(pids), age, used
    )


def _look_at_latest(path: Path, fd: int, identity: Identity) -> tuple[str, list[Holder]]:
    newest = _native.Latest(_map(fd, identity.size))
    holders: list[Holder] = []
    with contextlib.suppress(FileNotFoundError):
        lock = os.open(_tenancy.lock_path(path), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if _tenancy.record_is_held(lock, _tenancy.WRITER) and newest._writer():
                holders.append(Holder(newest._writer(), None, "writes"))
        finally:
            os.close(lock)
    return f"value {newest._number()}", holders


# -- processes --------------------------------------------------------------------------------------------------------------


def attached(directory: Path) -> dict[Key, set[int]]:
    """Who has which file of the directory open: of the processes that we may look into."""
    found: dict[Key, set[int]] = {}
    inside = os.path.realpath(directory) + "/"
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        with contextlib.suppress(OSError):
            for number in os.listdir(f"/proc/{process}/fd"):
                link = f"/proc/{process}/fd/{number}"
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith(inside):
                        there = os.stat(link)
                        found.setdefault((there.st_dev, there.st_ino), set()).add(int(process))
    return found


def _asleep(pids: list[int], found: os.stat_result) -> int | None:
    """Threads of these processes that sleep on the mutex of this file."""
    count, seen = 0, False
    for pid in pids:
        with contextlib.suppress(OSError):
            places = _places(pid, found)
            for tid in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{tid}/syscall") as file:
                    call = file.read().split()
                seen = True
                if len(call) > 1 and call[0] == str(_FUTEX) and int(call[1], 16) in places:
                    count += 1
    return count if seen else None


def _places(pid: int, found: os.stat_result) -> set[int]:
    """The addresses at which a process has the mutex of this file."""
    places = set()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            if fields[3] == device and fields[4] == str(found.st_ino) and int(fields[2], 16) == 0:
                places.add(int(fields[0].partition("-")[0], 16) + _MUTEX_AT)
    return places
