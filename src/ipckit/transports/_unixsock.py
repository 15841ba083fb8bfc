"""Names on the file system for Unix sockets: taking one, reaching one, and knowing who is at the other end.

A socket's file says nothing about whether anybody listens: it stays behind after `kill -9`. So a listener holds a
`flock` on `NAME.lock` for as long as it lives, and the kernel drops that lock with the process, however it ends. Who
has the lock may replace the file; two who start at once cannot both have it. Somebody who listens there without
our lock (another program) is found by connecting to it.

    with the lock:  file absent        -> bind
                    file, refuses      -> stale: unlink, bind
                    file, answers      -> AddressInUse
    without it:                           AddressInUse
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import errors
from .._spi import Peer, Steps, Wait
from .._url import Url
from ._oserror import map_oserror

BACKLOG = 512
_SUN_PATH = 107  # bytes, without the closing zero
_NOT_YET = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # no file; a file that nobody serves; backlog full
_UCRED = struct.Struct("iII")


class Name:
    """A name that this process holds: the lock, and the file while it is ours."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._file: tuple[int, int] | None = None

    def bound(self) -> None:
        found = os.lstat(self.path)
        self._file = (found.st_dev, found.st_ino)

    def release(self) -> None:
        """Remove the file if it is still the one that we made, then the lock. Idempotent."""
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        try:
            if self._file is not None and _identity(self.path) == self._file:
                _unlink(self.path)
            # Only who holds the lock removes its file, and a starter looks again after it got one: see _take.
            _unlink(_lock_path(self.path))
        finally:
            os.close(lock)

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, and our copy of the descriptor would outlive it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


_held: weakref.WeakSet[Name] = weakref.WeakSet()
_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _let_go() -> None:
    for name in tuple(_held):
        name.forget()
    for sock in tuple(_listening):
        sock.close()


os.register_at_fork(after_in_child=_let_go)


# -- listening ----------------------------------------------------------------------------------------------------


def bind(url: Url, path: Path, kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, Name]:
    """Take the name and listen on it: a non-blocking socket of mode 0600, and what to release when it is closed.

    Close the socket first, then `release` the name. Raises: AddressInUse, AccessDenied, BadUrl.
    """
    try:
        name = _take(url, path)
        try:
            _clear(url, path, kind)
            sock = socket.socket(socket.AF_UNIX, kind)
            try:
                os.fchmod(sock.fileno(), 0o600)  # Linux makes the file with the mode of the socket, whatever the umask
                sock.setblocking(False)
                with _address(url, path) as address:
                    sock.bind(address)
                name.bound()
                sock.listen(BACKLOG)
            except BaseException:
                sock.close()
                raise
        except BaseException:
            name.release()
            raise
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url, "listen") from error
    _held.add(name)
    _listening.add(sock)
    return sock, name


def take(url: Url, path: Path) -> Name:
    """The lock that goes with a name, for a transport that puts something else than a socket there. Raises AddressInUse."""
    name = _take(url, path)
    _held.add(name)
    return name


def _take(url: Url, path: Path) -> Name:
    lock_path = _lock_path(path)
    while True:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            found = os.fstat(lock)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise errors.AccessDenied(f"{lock_path} is not ours", url=url, operation="listen")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise errors.AddressInUse(
                    "another process listens there", url=url, operation="listen", hint="stop it, or choose another name"
                ) from error
            if _identity(lock_path) == (found.st_dev, found.st_ino):
                return Name(path, lock)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder removed the file between our open and our lock: this lock guards nothing


def _clear(url: Url, path: Path, kind: int) -> None:
    """Make way for our file, unless what is there is alive or no socket."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise errors.AddressInUse(
            "a file that is no socket stands there", url=url, operation="listen", hint=f"look at {path} and remove it"
        )
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            with _address(url, path) as address:
                probe.connect(address)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise
    raise errors.AddressInUse("another program listens there", url=url, operation="listen")


# -- connecting ---------------------------------------------------------------------------------------------------


def connect_steps(url: Url, path: Path, kind: int = socket.SOCK_STREAM) -> Steps[socket.socket]:
    """A connected, non-blocking socket. Waits for a listener; at the timeout, raises NothingListening."""
    pause = 0.001
    while True:
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.setblocking(False)
            with _address(url, path) as address:
                sock.connect(address)
        except OSError as error:
            sock.close()
            if isinstance(error, errors.IpcError):
                raise
            if error.errno not in _NOT_YET:
                raise map_oserror(error, url, "connect") from error
            last = error
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        try:
            yield Wait((), pause)
        except errors.Timeout:
            busy = last.errno == errno.EAGAIN
            message = "the listener accepts nobody: its backlog is full" if busy else "nobody listens there"
            raise errors.NothingListening(message, url=url, operation="connect") from last
        pause = min(pause * 2, 0.05)


# -- who is there -------------------------------------------------------------------------------------------------


def peer_of(sock: socket.socket) -> Peer:
    """Who connected, or who called listen(), as the kernel noted it then."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid=pid or None, uid=uid, gid=gid)  # 0: in a pid namespace that we cannot see


def check_peer(url: Url, peer: Peer, operation: str, hint: str | None = "?allow=any lets everybody in") -> None:
    """Only ourselves and root may be at the other end. Raises AccessDenied."""
    if peer.uid not in (os.geteuid(), 0):
        raise errors.AccessDenied(f"the peer runs as uid {peer.uid}", url=url, operation=operation, hint=hint)


# -- files --------------------------------------------------------------------------------------------------------


@contextmanager
def _address(url: Url, path: Path) -> Iterator[str]:
    """What bind() and connect() take: the path, or for a long one its last part below an open directory."""
    if len(os.fsencode(path)) <= _SUN_PATH:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        short = f"/proc/self/fd/{directory}/{path.name}"
        if len(os.fsencode(short)) > _SUN_PATH:
            raise errors.BadUrl("the name is too long for a Unix socket", url=url, hint="80 bytes are safe")
        yield short
    finally:
        os.close(directory)


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _unlink(path: Path) -> None:
    with suppress(OSError):  # somebody else removed it, or its directory: nothing is left to do
        os.unlink(path)
