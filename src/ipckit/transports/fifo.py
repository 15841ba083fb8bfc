"""`fifo://name`, `fifo:///path`: named pipes.

A channel is two FIFOs and a byte stream in each; from there on it is what `pipe://` is. Where to find each other is a third
FIFO, the name itself: clients write one line into it, which the kernel keeps whole up to PIPE_BUF bytes.

    client                                              listener
      makes PID.START.N.up and .down,
      opens both, writes HELLO(where)  -> NAME.fifo ->   opens both, removes their names
      reads from .down                  <-  WELCOME      writes into .down
      writes into .up                       READY  ->    and only now `accept` returns the link

Once both ends are open there are no names, so a `kill -9` leaves nothing; what it leaves before that carries its maker's pid
and is removed by the next who starts. Whether somebody listens the kernel says: a FIFO without a reader cannot be opened for
writing. All FIFOs are 0600; what is opened is looked at afterwards: a FIFO, ours, and not by way of a link.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from .. import errors
from .._capabilities import Capabilities
from .._spi import Intake, Link, Listener, Outlet, Peer, Queues, QueueTerms, Steps, Transport, Wait
from .._url import Url
from . import _fifo_queue, _owner, _rendezvous, _runtime
from ._kernelqueue import KernelOutlet, open_intake
from ._mail import Card
from ._native import Ended
from ._oserror import map_oserror
from ._rendezvous import HELLO, MAX_GREETING, READY, VERSION, WELCOME, Desk, Greeting, read_greeting
from ._stream import StreamOptions, make_link, pipe_size_option, set_pipe_size
from ._unixsock import Name, take

_UP, _DOWN = ".up", ".down"  # from the client, to the client
_FLAGS = os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_LOOK_AGAIN = 0.05  # seconds between two looks whether the listener lives: an event loop cannot wait for POLLERR alone


@dataclass(frozen=True, slots=True, kw_only=True)
class FifoOptions(StreamOptions):
    size: int = pipe_size_option()


class FifoTransport(Transport[FifoOptions], Queues[_fifo_queue.FifoQueueOptions]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        fileno=True,
        model="messages on two byte streams, through the kernel, with a name in the file system",
        data="byte stream, framed into messages",
        use_case="unrelated programs on one machine, and scripts: a name that ls shows",
    )
    options: ClassVar[type[Any]] = FifoOptions
    queue_options: ClassVar[type[Any]] = _fifo_queue.FifoQueueOptions

    def listen(self, url: Url, options: FifoOptions) -> Steps[Listener]:
        path = _runtime.path_for(url, ".fifo")
        with _mapped(url, "listen"):
            _try_size(url, options)
            _owner.sweep(_sessions(), lambda name: _unlink(_sessions() / name))
            inbox = _take(url, path)
        return Desk(url, inbox, lambda frame: _admit(url, options, frame))
        yield  # nothing to wait for

    def connect(self, url: Url, options: FifoOptions) -> Steps[Link]:
        path = _runtime.path_for(url, ".fifo")
        return (
            yield from _rendezvous.keep_trying(url, lambda: _find(url, path), lambda desk: _knock(url, options, desk))
        )

    def sender(self, url: Url, options: _fifo_queue.FifoQueueOptions) -> Steps[Outlet]:
        place, kernel = yield from _fifo_queue.enter(url, options)
        return KernelOutlet(url, place, kernel, options.limit)

    def receiver(self, url: Url, options: _fifo_queue.FifoQueueOptions, terms: QueueTerms) -> Steps[Intake]:
        return (
            yield from open_intake(lambda at: _fifo_queue.enter(at, options), url, options.limit, options.max_deliver)
        )


def _try_size(url: Url, options: FifoOptions) -> None:
    """Better told to the one who listens than to each who connects."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        set_pipe_size(url, "listen", options.size, write)
    finally:
        os.close(read)
        os.close(write)


# -- the listener's FIFO --------------------------------------------------------------------------------------------


class _Inbox:
    """The FIFO that has the name. Its lines are what a Desk reads."""

    def __init__(self, path: Path, fd: int, name: Name) -> None:
        self.native = path
        self.card: Card = {}
        self._fd = fd
        self._name = name
        self._lines: list[bytes] = []
        self._rest = b""

    def try_get(self) -> bytes | None:
        if not self._lines:
            with suppress(BlockingIOError):
                *lines, self._rest = (self._rest + os.read(self._fd, select.PIPE_BUF * 16)).split(b"\n")
                self._lines = [line for line in reversed(lines) if line]
            if len(self._rest) > select.PIPE_BUF:  # no line of ours: they come whole
                self._rest = b"?"
        return self._lines.pop() if self._lines else None

    def settled(self) -> bool:
        return True

    def arm(self) -> Wait:
        return Wait(((self._fd, select.POLLIN),))

    def close(self) -> None:
        os.close(self._fd)
        self._name.release()

    def abandon(self) -> None:
        os.close(self._fd)


def _take(url: Url, path: Path) -> _Inbox:
    name = take(url, path)
    try:
        _clear(url, path)
        os.mkfifo(path, 0o600)
        name.bound()
        # For writing too: with a writer of its own it is never at its end, which would keep it ready for ever.
        return _Inbox(path, _open(url, path, os.O_RDWR), name)
    except BaseException:
        name.release()
        raise


def _clear(url: Url, path: Path) -> None:
    """Make way for our FIFO. We hold the lock, so who reads it now is no ipckit."""
    try:
        if not stat.S_ISFIFO(os.lstat(path).st_mode):
            raise errors.AddressInUse(
                "a file that is no FIFO stands there", url=url, operation="listen", hint=f"look at {path} and remove it"
            )
        os.close(_open(url, path, os.O_WRONLY))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        os.unlink(path)
        return
    raise errors.AddressInUse("another program reads this FIFO", url=url, operation="listen")


def _admit(url: Url, options: FifoOptions, frame: bytes) -> Steps[Link]:
    """The listener's side of one handshake."""
    hello = read_greeting(url, HELLO, frame)
    directory, name = hello.card.get("directory"), hello.card.get("name")
    owner = _owner.owner_of(name) if isinstance(name, str) and _owner.NAME.fullmatch(name) else None
    if owner is None or not isinstance(directory, str) or not os.path.isabs(directory):
        raise errors.ProtocolError("the card names no FIFOs", url=url)
    with _mapped(url, "accept"), _Fds() as fds:
        up, down = Path(directory) / f"{name}{_UP}", Path(directory) / f"{name}{_DOWN}"
        try:
            rfd = fds.add(_open(url, up, os.O_RDONLY))
            wfd = fds.add(_open(url, down, os.O_WRONLY))
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                raise errors.NothingListening("the client is gone", url=url) from error
            raise
        _unlink(up)
        _unlink(down)
        set_pipe_size(url, "accept", options.size, rfd, wfd)
        ours: Card = {"name": _owner.fresh_name()}
        os.write(wfd, _line(WELCOME, ours, options))
        while True:
            try:
                ready = os.read(rfd, len(READY))
            except BlockingIOError:
                yield Wait(((rfd, select.POLLIN),))
                continue
            if ready != READY:
                raise errors.NothingListening("the client is gone", url=url)
            return _link(url, options, fds, rfd, wfd, owner)


# -- the client's side ------------------------------------------------------------------------------------------------


def _find(url: Url, path: Path) -> Steps[int | None]:
    """The listener's FIFO, opened for writing, if it has a reader."""
    with _mapped(url, "connect"):
        try:
            return _open(url, path, os.O_WRONLY)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return None
            raise
    yield  # nothing to wait for


def _knock(url: Url, options: FifoOptions, desk: int) -> Steps[Link]:
    """The client's side of one handshake. `desk` is ours to close."""
    with _mapped(url, "connect"), _Fds() as fds:
        fds.add(desk)
        directory = _sessions()
        _owner.sweep(directory, lambda name: _unlink(directory / name))
        name = _owner.fresh_name()
        up, down = directory / f"{name}{_UP}", directory / f"{name}{_DOWN}"
        try:
            for path in (up, down):
                os.mkfifo(path, 0o600)
            rfd = fds.add(_open(url, down, os.O_RDONLY))
            reader = fds.add(_open(url, up, os.O_RDONLY))  # until the listener has one: without, it cannot be written
            wfd = fds.add(_open(url, up, os.O_WRONLY))
            set_pipe_size(url, "connect", options.size, rfd, wfd)
            # It begins a line of its own: half a line that somebody else left there must not swallow it.
            hello = b"\n" + _line(HELLO, {"directory": str(directory), "name": name}, options)
            while not _written(url, desk, hello):
                yield Wait(((desk, select.POLLOUT),))
            poll = select.poll()
            poll.register(desk, 0)
            poll.register(rfd, 0)
            while not (line := _read(rfd)):
                if poll.poll(0) and not (line := _read(rfd)):  # no reader any more, or no writer any more
                    raise errors.NothingListening("the listener went during the handshake", url=url)
                if not line:
                    yield Wait(((rfd, select.POLLIN),), _LOOK_AGAIN)
            welcome = read_greeting(url, WELCOME, line.removesuffix(b"\n"))
            owner = _owner.owner_of(str(welcome.card.get("name")))
            if not _written(url, wfd, READY):
                raise errors.ProtocolError("somebody else wrote into our FIFO", url=url)
        finally:
            _unlink(up)
            _unlink(down)
        fds.close(reader, desk)
        return _link(url, options, fds, rfd, wfd, owner)


def _read(fd: int) -> bytes:
    """What is there, up to one greeting; nothing as long as nobody has opened the other end."""
    try:
        return os.read(fd, MAX_GREETING + 1)
    except BlockingIOError:
        return b""


def _written(url: Url, fd: int, data: bytes) -> bool:
    """False if there is no room. Up to PIPE_BUF bytes go whole or not at all."""
    try:
        return os.write(fd, data) == len(data)
    except BlockingIOError:
        return False
    except BrokenPipeError as error:
        raise errors.NothingListening("the listener is gone", url=url) from error


# -- both ---------------------------------------------------------------------------------------------------------------


class _Fds:
    """Descriptors that are closed at the end of the block, unless they were given away."""

    def __init__(self) -> None:
        self._fds: list[int] = []

    def __enter__(self) -> _Fds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self._fds)

    def add(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def close(self, *fds: int) -> None:
        for fd in fds:
            self._fds.remove(fd)
            os.close(fd)

    def give_away(self, *fds: int) -> None:
        for fd in fds:
            self._fds.remove(fd)


def _link(url: Url, options: FifoOptions, fds: _Fds, rfd: int, wfd: int, owner: _owner.Owner | None) -> Link:
    pid = owner.pid if owner is not None and owner.alive() else None
    found = os.fstat(rfd)
    link = make_link(
        url, options, rfd, wfd, peer=Peer(pid=pid, uid=found.st_uid, gid=found.st_gid), ended=_ended(url, options, pid)
    )
    fds.give_away(rfd, wfd)
    return link


def _ended(url: Url, options: FifoOptions, pid: int | None) -> Ended:
    """What an end of file without a goodbye means: the kernel tells no more than that nobody has the other end open."""

    def ended(operation: str, broken: str | None) -> errors.PeerError:
        if broken is None and not options.goodbye:
            return errors.PeerClosed("the peer closed", url=url, operation=operation)
        how = broken or "without a goodbye"
        return errors.PeerDied(f"the peer ended {how}", url=url, operation=operation, pid=pid)

    return ended


def _line(kind: bytes, card: Card, options: FifoOptions) -> bytes:
    line = kind + msgspec.json.encode(Greeting(VERSION, card, options.limit)) + b"\n"
    if len(line) > MAX_GREETING:
        raise errors.BadUrl("the runtime directory's path is too long", hint="set IPCKIT_RUNTIME_DIR to a shorter one")
    return line


def _sessions() -> Path:
    path = _runtime.runtime_dir() / "fifo"
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    return path


def _open(url: Url, path: Path, mode: int) -> int:
    fd = os.open(path, mode | _FLAGS)
    found = os.fstat(fd)
    if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise errors.AccessDenied(f"{path} is no FIFO of ours", url=url)
    return fd


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def _mapped(url: Url, operation: str) -> Iterator[None]:
    """The one place where an OSError becomes ours."""
    try:
        yield
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url, operation) from error


TRANSPORT = FifoTransport()
