"""`mq://name` as a queue: one message queue of the kernel, many senders, many receivers, priorities by the kernel.

The kernel keeps it until somebody removes it, so messages outlive both ends. Who closes last removes an empty one; one with
messages stays, and so does what the killed leave: the next to come finds it, and there is no state that keeps them out. When the
user's budget is used up, empty queues that nobody has open are removed first.
"""

from __future__ import annotations

import hashlib
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _native, errors
from .._spi import Steps
from .._url import Url
from . import _hands, _runtime
from ._hands import Place
from ._kernelqueue import max_deliver_option
from ._mqueue import LEVELS, MqOptions, choose_sizes, make, mapped, open_queue, path_of, unlink

if TYPE_CHECKING:
    import posix_ipc

_SUFFIX = ".mq.d"


@dataclass(frozen=True, slots=True, kw_only=True)
class MqQueueOptions(MqOptions):
    max_deliver: int = max_deliver_option()


class MqKernel:
    levels = LEVELS

    def __init__(self, queue: posix_ipc.MessageQueue, path: str) -> None:
        self.native = queue
        self.fd: int = queue.mqd
        self.frame: int = queue.max_message_size
        self._path = path
        queue.block = False

    def put(self, record: bytes, priority: int) -> bool:
        return _native.mq_send(self.fd, record, priority)

    def get(self, buffer: memoryview) -> int:
        return _native.mq_receive(self.fd, buffer)

    def retire(self, place: Place) -> bool:
        empty: bool = self.native.current_messages == 0
        if empty:
            unlink(self._path)
        return empty

    def close(self) -> None:
        self.native.close()


def enter(url: Url, options: MqOptions) -> Steps[tuple[Place, MqKernel]]:
    directory = _directory(url)
    while True:
        with mapped(url, "open"):
            place = yield from _hands.enter(url, directory)
            try:
                kernel, new = _open(url, options, directory)
                place.sweep(emptied=new)
                if _hands.share(place):
                    return place, kernel
                kernel.close()
            except BaseException:
                place.leave()
                raise
            place.leave()


def _directory(url: Url) -> Path:
    if url.hosts or not url.path:
        return _runtime.path_for(url, _SUFFIX)
    path = _runtime.path_for(url, "")
    return path.with_name(path.name + _SUFFIX)


def _path(directory: Path) -> str:
    """The kernel has one name space for all directories."""
    return path_of("q" + hashlib.sha256(bytes(directory)).hexdigest()[:32])


def _open(url: Url, options: MqOptions, directory: Path) -> tuple[MqKernel, bool]:
    """The queue, and whether it is a new one."""
    import posix_ipc

    path = _path(directory)
    tidied = False
    while True:
        with suppress(errors.NothingListening):
            queue = open_queue(url, path)
            for name, asked, there in (
                ("depth", options.depth, queue.max_messages),
                ("frame", options.frame, queue.max_message_size),
            ):
                if asked is not None and asked != there:
                    queue.close()
                    raise errors.BadOption(
                        f"the queue is there, with {name}={there}",
                        url=url,
                        hint=f"leave {name}= out, or empty it first",
                    )
            return MqKernel(queue, path), False
        try:
            return MqKernel(make(url, path, *choose_sizes(url, options)), path), True
        except posix_ipc.ExistentialError:
            continue  # somebody was quicker
        except errors.ResourceLimit:
            if tidied or not _tidy(directory):
                raise
            tidied = True


def _tidy(ours: Path) -> bool:
    """Remove queues that are empty and that nobody has open. Whether there were any."""
    found = False
    for directory in ours.parent.glob("*" + _SUFFIX):
        if directory == ours:
            continue
        with suppress(OSError, errors.IpcError), closing(_hands.enter(Url("mq"), directory)) as entering:
            try:
                next(entering)
            except StopIteration as stop:
                place: Place = stop.value
            else:
                continue
            try:
                if place.alone:
                    found = _remove_empty(place, _path(directory)) or found
            finally:
                place.leave()
    return found


def _remove_empty(place: Place, path: str) -> bool:
    try:
        kernel = MqKernel(open_queue(Url("mq"), path), path)
    except errors.NothingListening:
        gone = False
    else:
        gone = kernel.retire(place)
        kernel.close()
        if not gone:
            return False
    if not place.holds_messages:
        place.clear()
    return gone
