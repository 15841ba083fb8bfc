"""Whose thread ids a named object's words hold.

A word says who owns it by a thread id, and such a number means something in one PID namespace only: of two containers that
share a memory directory, each would take the other's threads for its own. So an object belongs to the namespace of those who have
it open; its inode stands in the object (sync_layout.h). Another one may have it when nobody has it open (what was held then is
marked by the kernel), and is refused until then.

    flock, shared      is held by whoever has it open, once it has seen that the object belongs to its namespace
    record lock (OFD)  those of a namespace who find that it does not belong to theirs settle it one by one
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

from .. import errors
from .._url import Url

_AT = 40  # offsetof(struct sync_header, pid_namespace)
_WORD = struct.Struct("=Q")
_RECORD = struct.Struct("@hhqqi4x")  # struct flock, 64 bits


def _ours() -> int:
    """0: the system does not say."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def sign(fd: int) -> None:
    """A new object, which nobody else knows yet, is ours."""
    os.pwrite(fd, _WORD.pack(_ours()), _AT)


def _is_foreign(fd: int, ours: int) -> bool:
    word = os.pread(fd, _WORD.size, _AT)
    # What is too short is no object, which is for others to tell.
    return ours != 0 and len(word) == _WORD.size and _WORD.unpack(word)[0] not in (0, ours)


def join(url: Url, fd: int) -> None:
    """Hold the shared flock of an object that belongs to our namespace. Raises Unsupported."""
    ours = _ours()
    while True:
        if _is_foreign(fd, ours):
            _adopt(url, fd, ours)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if not _is_foreign(fd, ours):
            return
        fcntl.flock(fd, fcntl.LOCK_UN)  # another one was faster


def _adopt(url: Url, fd: int, ours: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, _RECORD.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
    try:
        if _is_foreign(fd, ours):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(fd, _WORD.pack(ours), _AT)
    except BlockingIOError:
        raise errors.Unsupported(
            "processes of another PID namespace have it open, and their thread ids mean nothing here",
            url=url,
            operation="open",
            hint="use one namespace, or another name",
        ) from None
    finally:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _RECORD.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 1, 0))
