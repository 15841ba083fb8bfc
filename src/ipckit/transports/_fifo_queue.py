"""`fifo://name` as a queue: one FIFO, many senders, many receivers.

The FIFO is in packet mode (O_DIRECT, Linux): what one `write` of up to PIPE_BUF bytes put in, one `read` takes out, whole,
whoever else reads and writes. So nobody needs a lock, and nobody who is killed leaves half of anything.

A FIFO holds messages as long as somebody has it open. The last one to close puts what is left into a hand; the last one
that is killed takes it along, which is why this is not `decoupled`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import _options, errors
from .._options import integer, option
from .._spi import Steps
from .._url import Url
from . import _hands, _runtime
from ._hands import Hand, Place
from ._kernelqueue import max_deliver_option
from ._oserror import map_oserror

_SUFFIX = ".fifo.d"
_DEPTH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class FifoQueueOptions(_options.LinkOptions):
    depth: int | None = option(
        None, integer(1, 1 << 18), "messages that the queue holds, rounded up to a power of two; default: 256, or fewer"
    )
    max_deliver: int = max_deliver_option()


class FifoKernel:
    levels = 0
    frame = select.PIPE_BUF

    def __init__(self, path: Path, fd: int) -> None:
        self.native = path
        self.fd = fd

    def put(self, record: bytes, priority: int) -> bool:
        try:
            os.write(self.fd, record)
        except BlockingIOError:
            return False
        return True

    def get(self, buffer: memoryview) -> int:
        try:
            return os.readv(self.fd, (buffer,))
        except BlockingIOError:
            return -1

    def retire(self, place: Place) -> bool:
        hand: Hand | None = None
        while select.select((self.fd,), (), (), 0)[0]:
            hand = hand or Hand(place, self.frame)
            self.get(hand.take(0)[1])
        if hand is not None:
            hand.close()
        return True

    def close(self) -> None:
        os.close(self.fd)


def enter(url: Url, options: FifoQueueOptions) -> Steps[tuple[Place, FifoKernel]]:
    directory = _directory(url)
    try:
        while True:
            place = yield from _hands.enter(url, directory)
            try:
                place.sweep(emptied=place.alone)
                kernel = _open(url, options, directory / "queue")
                if _hands.share(place):
                    return place, kernel
                kernel.close()
            except BaseException:
                place.leave()
                raise
            place.leave()
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url, "open") from error


def _directory(url: Url) -> Path:
    if url.hosts or not url.path:
        return _runtime.path_for(url, _SUFFIX)
    path = _runtime.path_for(url, "")
    return path.with_name(path.name + _SUFFIX)


def _open(url: Url, options: FifoQueueOptions, path: Path) -> FifoKernel:
    with suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    # For reading and writing: without the other side it is neither at its end nor broken.
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.geteuid():
            raise errors.AccessDenied(f"{path} is no FIFO of ours", url=url)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK | os.O_DIRECT)
        except OSError as error:
            raise errors.Unsupported("this system's FIFOs have no packets", url=url, hint="use mq://") from error
        _set_depth(url, options, fd)
        return FifoKernel(path, fd)
    except BaseException:
        os.close(fd)
        raise


def _set_depth(url: Url, options: FifoQueueOptions, fd: int) -> None:
    """Each packet takes a page. Only ever larger: others have it open too."""
    size = (options.depth or _DEPTH) * os.sysconf("SC_PAGESIZE")
    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) >= size and options.depth is None:
        return
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
    except OSError as error:
        if error.errno == errno.EBUSY or options.depth is None:
            return  # it holds more than that; or the default is more than the system allows, and fewer will do
        if error.errno == errno.EPERM:
            raise errors.ResourceLimit(
                f"a FIFO of {options.depth} messages is not allowed", url=url, hint="see /proc/sys/fs/pipe-max-size"
            ) from error
        raise
