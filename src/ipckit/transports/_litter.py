"""What dead processes left of transports, found by the rules by which it was made. `ipckit gc` removes it.

    NAME.sock  .shm  .zmq  .grpc  .fifo  .mq     with NAME.*.lock beside it: whoever listens holds a flock on that (_unixsock)
    fifo/PID.START.N.up  .down                   a handshake's FIFOs: their maker's name is theirs (_owner)
    mq/PID.START.N                               the record of a kernel queue, likewise; the queue goes first
    PID.START.N.tmp                              a file that was about to get its name, likewise
    NAME.fifo.d/  NAME.mq.d/                     a queue: whoever is there holds a shared flock on `lock` in it

Nothing else is looked at, and nothing of it is removed that is not ours, of the kind that we make, and dead when it is removed. A
name whose socket somebody serves without our lock is another program's. A queue goes only if it is empty: its messages belong to
whoever comes for them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import _owner

_SOCKETS = (".sock", ".shm", ".zmq", ".grpc")
_KINDS = (*_SOCKETS, ".fifo", ".mq")


@dataclass(frozen=True, slots=True)
class Litter:
    """Something that nobody uses any more.

    Attributes:
        path: where; what: in words.
        remove: removes it if that is still so; whether it did.
    """

    path: str
    what: str
    remove: Callable[[], bool]


def find(runtime: Path, default: Path) -> Iterator[Litter]:
    """What the dead left of transports in the runtime directory; of kernel queues in the user's default one."""
    for lock in sorted(runtime.glob("*.lock")):
        path = lock.with_suffix("")
        if path.suffix in _KINDS and bury_name(path, look=True):
            yield Litter(str(path), f"the name of a dead {path.suffix[1:]} listener", partial(bury_name, path))
    for directory, what, suffixes in (
        (runtime, "a file that never got its name", (".tmp",)),
        (runtime / "fifo", "a FIFO of a handshake", (".up", ".down")),
    ):
        for path in owned(directory):
            if path.suffix in suffixes:
                yield Litter(str(path), what, partial(bury_owned, path))
    for suffix in (".fifo.d", ".mq.d"):
        for path in sorted(runtime.glob("*" + suffix)):
            if bury_queue(path, look=True):
                yield Litter(str(path), "an empty queue that nobody has open", partial(bury_queue, path))
    for path in owned(default / "mq", stat.S_ISFIFO):
        if _owner.NAME.fullmatch(path.name):
            yield Litter(str(path), "a kernel message queue and its record", partial(_bury_queue, path))


# -- by owner -------------------------------------------------------------------------------------------------------------


def _file_or_fifo(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode)


def owned(directory: Path, kinds: Callable[[int], bool] = _file_or_fifo) -> list[Path]:
    """Things of ours in a directory, of some kinds, whose makers are dead."""
    found: list[Path] = []
    _owner.sweep(directory, lambda name: found.append(directory / name))
    return sorted(path for path in found if _is_ours(path, kinds))


def _is_ours(path: Path, kinds: Callable[[int], bool]) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return found.st_uid == os.geteuid() and kinds(found.st_mode)


def bury_owned(path: Path, kinds: Callable[[int], bool] = _file_or_fifo) -> bool:
    """Remove it if it is ours, of this kind, and its maker dead; whether it did."""
    owner = _owner.owner_of(path.name)
    if owner is None or owner.alive() or not _is_ours(path, kinds):
        return False
    with contextlib.suppress(OSError):
        os.unlink(path)
        return True
    return False


def _bury_queue(record: Path) -> bool:
    """The queue first: as long as it exists, its record does."""
    owner = _owner.owner_of(record.name)
    if owner is None or owner.alive() or not _is_ours(record, stat.S_ISFIFO):
        return False
    try:
        import posix_ipc
    except ImportError:
        return False  # who removes the record without the queue loses the queue
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_message_queue(f"/ipckit.{os.geteuid()}.{record.name}")
    return bury_owned(record, stat.S_ISFIFO)


# -- by lock --------------------------------------------------------------------------------------------------------------


def bury_name(path: Path, look: bool = False) -> bool:
    """Remove a listener's name and lock if nobody holds the lock and nobody serves the name; whether it did. `look`: would it?"""
    lock = path.with_name(path.name + ".lock")
    try:
        fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_size:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(lock), found) and not _served(path):
                if not look:
                    # With the lock: whoever wants the name waits for it, or looks again and finds another lock file.
                    for each in (path, path.with_name(path.name + ".new"), lock):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(each)
                return True
        return False
    finally:
        os.close(fd)


def _served(path: Path) -> bool:
    """Somebody uses what has this name without our lock, or it is none of ours."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    if found.st_uid != os.geteuid():
        return True
    if path.suffix == ".fifo":
        return not stat.S_ISFIFO(found.st_mode) or _has_reader(path)
    if path.suffix == ".mq":
        return not stat.S_ISREG(found.st_mode)
    return not stat.S_ISSOCK(found.st_mode) or _listens(path)


def _has_reader(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.ENXIO
    return True


def _listens(path: Path) -> bool:
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_UNIX, kind) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(f"/proc/self/fd/{directory}/{path.name}")  # whatever the length of its path
                except ConnectionRefusedError:
                    return False
                except OSError as error:
                    if error.errno == errno.EPROTOTYPE:
                        continue
                return True
        return True
    finally:
        os.close(directory)


# -- queues ---------------------------------------------------------------------------------------------------------------


def bury_queue(directory: Path, look: bool = False) -> bool:
    """Remove a queue, in the directory and in the kernel, if nobody and no message is there; whether it did. `look`: would it?"""
    try:
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False
        fd = os.open(directory / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        names = set(os.listdir(directory)) - {"lock"}
        # A FIFO lost what it held with the last who had it open; a draft whose maker is gone was never sent.
        if not os.path.samestat(os.lstat(directory / "lock"), os.fstat(fd)) or not all(map(_is_empty, names)):
            return False
        if directory.suffixes[-2:] == [".mq", ".d"] and not _bury_kernel_queue(directory, look):
            return False
        if not look:
            for name in (*names, "lock"):
                os.unlink(directory / name)
            os.rmdir(directory)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_empty(name: str) -> bool:
    return name == "queue" or name.endswith(".draft")


def _bury_kernel_queue(directory: Path, look: bool) -> bool:
    """False: it holds messages, or nobody can tell."""
    try:
        import posix_ipc
    except ImportError:
        return False
    name = f"/ipckit.{os.geteuid()}.q{hashlib.sha256(bytes(directory)).hexdigest()[:32]}"
    with contextlib.suppress(posix_ipc.ExistentialError):
        queue = posix_ipc.MessageQueue(name)
        try:
            if queue.current_messages:
                return False
        finally:
            queue.close()
        if not look:
            posix_ipc.unlink_message_queue(name)
    return True
