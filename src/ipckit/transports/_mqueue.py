"""POSIX message queues as the kernel has them: how large one may be, made, opened, removed; and what its errors are in our words.

All queues of a user share RLIMIT_MSGQUEUE bytes (800 KiB as a rule), so a queue is made smaller before giving up.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _options, errors
from .._options import option
from .._url import Url
from . import _rendezvous
from ._oserror import map_oserror

if TYPE_CHECKING:
    import posix_ipc

LEVELS = 32  # _POSIX_MQ_PRIO_MAX, which every system has; Linux has 32768
_LIMITS = Path("/proc/sys/fs/mqueue")
_QUEUES = 18  # of the first size, that the user's budget has room for: two for each channel
_SMALLEST = (4, _rendezvous.MAX_GREETING)  # messages, bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class MqOptions(_options.LinkOptions):
    depth: int | None = option(
        None, _options.integer(2, 65536), "messages that a queue holds; default: fs.mqueue.msg_max"
    )
    frame: int | None = option(
        None, _options.size, "bytes of a frame; larger messages are fragmented; default: fs.mqueue.msgsize_max"
    )


def _limit(name: str, otherwise: int) -> int:
    try:
        return int((_LIMITS / name).read_text())
    except (OSError, ValueError):
        return otherwise


def choose_sizes(url: Url, options: MqOptions) -> list[tuple[int, int]]:
    """(messages, bytes each), the best first."""
    msg_max, msgsize_max = _limit("msg_max", 10), _limit("msgsize_max", 8192)
    depth = options.depth or min(msg_max, 64)
    budget = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
    share = msgsize_max if budget == resource.RLIM_INFINITY else budget // (_QUEUES * depth)
    frame = options.frame or max(min(msgsize_max, share), _SMALLEST[1])
    if frame < _SMALLEST[1]:
        raise errors.BadOption(f"frame= must be at least {_SMALLEST[1]}", url=url)
    for wanted, allowed, name in ((depth, msg_max, "msg_max"), (frame, msgsize_max, "msgsize_max")):
        if wanted > allowed and os.geteuid() != 0:
            raise errors.ResourceLimit(
                f"{wanted} is above fs.mqueue.{name}, which is {allowed}",
                url=url,
                hint=f"as root: sysctl fs.mqueue.{name}={wanted}",
            )
    sizes = [(depth, frame)]
    if options.depth is None and options.frame is None:
        while frame > _SMALLEST[1]:
            frame = max(frame // 2, _SMALLEST[1])
            sizes.append((depth, frame))
        sizes.append(_SMALLEST)
    return sizes


def path_of(name: str) -> str:
    return f"/ipckit.{os.geteuid()}.{name}"


def make(url: Url, path: str, *sizes: tuple[int, int]) -> posix_ipc.MessageQueue:
    """A new queue of the first of these sizes that there is room for. Raises ResourceLimit, posix_ipc.ExistentialError."""
    import posix_ipc

    refusal: OSError | None = None
    for messages, size in sizes:
        try:
            return posix_ipc.MessageQueue(
                path, posix_ipc.O_CREX, mode=0o600, max_messages=messages, max_message_size=size
            )
        except posix_ipc.Error:
            raise
        except ValueError as error:
            raise errors.ResourceLimit(
                f"a queue of {messages} messages of {size} bytes is refused",
                url=url,
                hint="see fs.mqueue.msg_max and fs.mqueue.msgsize_max",
            ) from error
        except OSError as error:
            refusal = error  # posix_ipc has the same words for RLIMIT_MSGQUEUE and for no descriptors, and no errno
    raise _no_room(url, refusal) from refusal


def _no_room(url: Url, error: OSError | None) -> errors.ResourceLimit:
    try:
        os.close(os.dup(2))
    except OSError as full:
        return errors.ResourceLimit("no descriptors are left", url=url, hint=f"ulimit -n: {full.strerror}")
    budget = resource.getrlimit(resource.RLIMIT_MSGQUEUE)[0]
    return errors.ResourceLimit(
        f"the kernel makes no more queues: {error}",
        url=url,
        hint=f"all queues of a user share RLIMIT_MSGQUEUE, {budget} bytes: close some, or raise it with `ulimit -q` "
        f"or LimitMSGQUEUE=; or raise fs.mqueue.queues_max, {_limit('queues_max', 256)}",
    )


def open_queue(url: Url, path: str) -> posix_ipc.MessageQueue:
    """One that is there. Raises NothingListening, AccessDenied."""
    import posix_ipc

    try:
        queue = posix_ipc.MessageQueue(path)
    except posix_ipc.ExistentialError as error:
        raise errors.NothingListening("the queue is gone", url=url) from error
    if os.fstat(queue.mqd).st_uid != os.geteuid():
        queue.close()
        raise errors.AccessDenied("the queue belongs to somebody else", url=url)
    return queue


def unlink(path: str) -> None:
    import posix_ipc

    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_message_queue(path)


@contextlib.contextmanager
def mapped(url: Url, operation: str) -> Iterator[None]:
    """The one place where a foreign error becomes ours."""
    import posix_ipc

    try:
        yield
    except posix_ipc.PermissionsError as error:
        raise errors.AccessDenied("the queue belongs to somebody else", url=url, operation=operation) from error
    except posix_ipc.Error as error:
        raise errors.IpcError(str(error), url=url, operation=operation) from error
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url, operation) from error
