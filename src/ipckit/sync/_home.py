"""Where the objects live, and how they reach other processes.

    Lock("shm://orders")       a file `orders.sync` in the memory directory (`_runtime.memory_dir`), mapped by everyone
    Lock("shm:///run/app/x")   that file
    Lock()                     a memfd: inherited by fork, passed to children as a descriptor; gone with the last process

A file appears whole: it is written without a name (O_TMPFILE) and then linked, so whoever is killed over it leaves nothing,
and of two makers one wins. Everybody who has it open holds a shared flock on it (`_namespace`), which the kernel gives back: so
`ipckit gc` knows what nobody uses.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from multiprocessing import context, reduction
from pathlib import Path
from typing import Any

from .. import _native, errors
from .._url import Url, parse
from ..transports._oserror import map_oserror
from ..transports._owner import fresh_name
from ..transports._runtime import memory_dir
from . import _namespace

LOCK, RLOCK, SEMAPHORE, BOUNDED, LEASED, RWLOCK, CONDITION, EVENT, BARRIER = range(1, 10)  # sync_layout.h
KINDS = (
    "Lock",
    "RLock",
    "Semaphore",
    "BoundedSemaphore",
    "leased Semaphore",
    "RWLock",
    "Condition",
    "Event",
    "Barrier",
)
HEADER = struct.Struct("=8sII32xQ8x")  # magic, version, kind, when it was made (ns since the epoch): sync_layout.h
SCHEME = "shm"
SUFFIX = ".sync"


def name_of(url: str | Url | None) -> Url | None:
    """The URL of a named object, checked. Raises BadUrl, UnknownScheme, BadOption."""
    if url is None:
        return None
    parsed = parse(url)
    if parsed.scheme != SCHEME:
        raise errors.UnknownScheme(
            f"no such object lives at {parsed.scheme}://", url=parsed, hint=f"for example {SCHEME}://orders-lock"
        )
    if parsed.options:
        raise errors.BadOption(f"there is no option {parsed.options[0][0]!r} here", url=parsed)
    return parsed


def check_on_owner_died(what: str, url: Url | None) -> None:
    if what not in ("raise", "take"):
        raise errors.BadOption(f"on_owner_died is 'raise' or 'take', not {what!r}", url=url)


def path_of(url: Url) -> Path:
    if url.hosts or not url.path:
        return memory_dir() / (url.name + SUFFIX)
    if "\0" in url.path or url.path.endswith("/"):
        raise errors.BadUrl("the path must name a file", url=url, hint="for example shm:///run/app/name")
    return Path(url.path)


def opened(url: Url | None, kind: int, value: int = 0, limit: int = 0) -> int:
    """A descriptor of the object: the one of that name, or a new one."""
    try:
        if url is None:
            fd = os.memfd_create(f"ipckit-sync-{kind}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with _closed_on_error(fd):
                _native.sync_format(fd, kind, value, limit)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return fd
        return _named(url, path_of(url), kind, value, limit)
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url or "anonymous", "open") from error


def _named(url: Url, path: Path, kind: int, value: int, limit: int) -> int:
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            made = _make(path, kind, value, limit)
            if made is not None:
                return made
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise errors.AccessDenied(f"{path} is a symbolic link", url=url, operation="open") from error
            raise
        with _closed_on_error(fd):
            _check(url, path, fd)
            _namespace.join(url, fd)
            if os.fstat(fd).st_nlink:
                return fd
        os.close(fd)  # removed between the two steps: there is, or will be, a new one


def _check(url: Url, path: Path, fd: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise errors.ProtocolError(f"{path} is no file of ours", url=url, operation="open")
    if found.st_uid != os.geteuid():
        raise errors.AccessDenied(f"{path} belongs to uid {found.st_uid}", url=url, operation="open")
    if found.st_mode & 0o077:
        raise errors.AccessDenied(
            f"{path} is open to others (mode {stat.S_IMODE(found.st_mode):04o})", url=url, operation="open"
        )


def _make(path: Path, kind: int, value: int, limit: int) -> int | None:
    """None: somebody else was faster."""
    try:
        fd = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        temporary = None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        temporary = path.with_name(f"{fresh_name()}.tmp")  # whose maker is dead, `ipckit gc` removes
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with _closed_on_error(fd):
        try:
            os.fchmod(fd, 0o600)
            _native.sync_format(fd, kind, value, limit)
            _namespace.sign(fd)
            fcntl.flock(fd, fcntl.LOCK_SH)
            # With a src_dir_fd, though the path is absolute, because only then does os.link follow the link in /proc.
            os.link(temporary or f"/proc/self/fd/{fd}", path, src_dir_fd=fd)
            return fd
        except FileExistsError:
            os.close(fd)
            return None
        finally:
            if temporary is not None:
                os.unlink(temporary)


def unlink(url: Url | None) -> None:
    """Remove the name. Whoever has the object open keeps it; whoever opens the name gets a new one."""
    if url is not None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path_of(url))


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Any:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise


def build(make: Any, fd: int, url: Url | None) -> Any:
    """Call `make(fd)`, which takes the descriptor over; else close it, and say what is wrong with what was found there."""
    try:
        return make(fd)
    except BaseException as error:
        with contextlib.closing(os.fdopen(fd, "rb", buffering=0)):
            if isinstance(error, ValueError) and not isinstance(error, errors.IpcError):
                kind, _ = read_header(fd)
                there = f"it is a {KINDS[kind - 1]}" if kind and str(error) == "of another kind" else str(error)
                raise errors.ProtocolError(
                    f"what is there cannot be used: {there}", url=url, operation="open"
                ) from None
        raise


def read_header(fd: int) -> tuple[int, float]:
    """Of which kind, and when it was made (seconds since the epoch). Kind 0: it is none of ours."""
    head = os.pread(fd, HEADER.size, 0)
    if len(head) == HEADER.size:
        magic, _, kind, made = HEADER.unpack(head)
        if magic == b"ipcsync\0" and 0 < kind <= len(KINDS):
            return kind, made / 1e9
    return 0, 0.0


# -- to children ------------------------------------------------------------------------------------------------------


class Passed:
    """The descriptor of an anonymous object on its way to a child that is being started."""

    def __init__(self, thing: Any, fd: int) -> None:
        context.assert_spawning(thing)
        self._dup = reduction.DupFd(fd)

    def detach(self) -> int:
        fd: int = self._dup.detach()
        os.set_inheritable(fd, False)
        return fd


def rebuild(cls: Any, passed: Passed, *arguments: Any) -> Any:
    return cls._from_fd(passed.detach(), *arguments)


def duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
