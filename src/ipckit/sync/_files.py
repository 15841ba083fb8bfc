"""The files that Segment and Latest live in: a page that says what it is, then the bytes; ours, private, and never half made.

    offset 0       magic, version, 4096, size, generation, series, when it was made and by whom (native byte order)
    offset 4096    the bytes: pages of their own, as a mapping needs it

A file is written without a name (O_TMPFILE) and then linked, so whoever is killed over it leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .. import errors
from .._url import Url
from ..transports._oserror import map_oserror

HEADER = 4096
_PAGE = struct.Struct("=8sIIQQ16sQQ")
_MAGIC = b"ipcsegm\0"
_VERSION = 1
_LEFT = re.compile(rb"^(?:MemAvailable|SwapFree): +(\d+) kB", re.MULTILINE)
_TMPFILE_UNKNOWN = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL)


class Identity(NamedTuple):
    """The page before a thing's bytes.

    Attributes:
        size: of its bytes.
        generation: 1, and one more with each that replaces it.
        series: what all generations have in common, and nothing else has.
        made: seconds since the epoch; `maker`: a process id.
    """

    size: int
    generation: int
    series: bytes
    made: float
    maker: int

    def page(self) -> bytes:
        return _PAGE.pack(
            _MAGIC, _VERSION, HEADER, self.size, self.generation, self.series, int(self.made * 1e9), self.maker
        )


def read_identity(fd: int, bytes: int) -> Identity | None:
    """Of a file of so many bytes. None: it is no thing of ours."""
    page = os.pread(fd, _PAGE.size, 0)
    if len(page) < _PAGE.size:
        return None
    magic, version, header, size, generation, series, made, maker = _PAGE.unpack(page)
    if magic != _MAGIC or version != _VERSION or header != HEADER or bytes < HEADER + size:
        return None
    return Identity(size, generation, series, made / 1e9, maker)


@contextlib.contextmanager
def mapped_errors(url: Url | None, operation: str) -> Iterator[None]:
    """The one place where an OSError becomes ours."""
    try:
        yield
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url or "anonymous", operation) from error


def check_memory(size: int) -> None:
    """Before memory is taken that no file system limits: the kernel would kill some process for it. Raises OSError."""
    with open("/proc/meminfo", "rb") as file:
        left = sum(int(kib) << 10 for kib in _LEFT.findall(file.read()))
    if size > left:
        raise OSError(errno.ENOMEM, f"{size} bytes are more than the memory that is free")


def open_file(url: object, path: Path | str, flags: int = 0) -> tuple[int, os.stat_result] | None:
    """A regular file of ours that nobody else may look into; None: there is none. Raises AccessDenied."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | flags, 0o600)
    except FileNotFoundError:
        if flags:
            raise
        return None
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        wrong = "is no file of ours"
    elif found.st_uid != os.geteuid():
        wrong = f"belongs to uid {found.st_uid}"
    elif found.st_mode & 0o077:
        wrong = f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})"
    else:
        return fd, found
    os.close(fd)
    raise errors.AccessDenied(f"{path} {wrong}", url=url, operation="open")


def open_thing(url: object, path: Path) -> tuple[int, Identity] | None:
    """What has the name. Raises AccessDenied, ProtocolError."""
    opened = open_file(url, path)
    if opened is None:
        return None
    fd, found = opened
    identity = read_identity(fd, found.st_size)
    if identity is None:
        os.close(fd)
        raise errors.ProtocolError(f"{path} is nothing that ipckit made", url=url, operation="open")
    return fd, identity


def make_thing(path: Path, identity: Identity, fill: Callable[[int], None], aside: str, replace: bool = False) -> int:
    """A file with this first page, allocated, filled, and only then given its name. Raises FileExistsError.

    `aside`: a name for it until then, where it needs one: nobody has it, and whoever comes next removes what is there.
    """
    fd, named = _new_file(aside)
    try:
        os.fchmod(fd, 0o600)
        os.posix_fallocate(fd, 0, HEADER + identity.size)  # a page that is missing later would be a SIGBUS
        os.pwrite(fd, identity.page(), 0)
        fill(fd)
        if not replace:
            _link(fd, path)
            return fd
        if not named:
            _link(fd, aside)  # only a name can replace a name
            named = True
        os.rename(aside, path)
        named = False
        return fd
    except BaseException:
        os.close(fd)
        raise
    finally:
        if named:
            remove(aside)


def _new_file(aside: str) -> tuple[int, bool]:
    """A new file, without a name where the file system allows that; whether it has one."""
    try:
        return os.open(os.path.dirname(aside), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), False
    except OSError as error:
        if error.errno not in _TMPFILE_UNKNOWN:
            raise
    return os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True


def _link(fd: int, path: Path | str) -> None:
    # With a src_dir_fd, though the path is absolute, because only then does os.link follow the link in /proc.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd)


def remove(path: Path | str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def leads_to(path: Path | str, file: os.stat_result) -> bool:
    """The name is this file's."""
    try:
        return os.path.samestat(os.lstat(path), file)
    except FileNotFoundError:
        return False
