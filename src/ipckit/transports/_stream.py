"""What the byte-stream transports share: unix, tcp, pipe, fifo are descriptors below a native StreamLink.

Frames are a 4-byte big-endian length and the payload. An end that closes in order writes ff ff ff ff, a length that no frame
can have, as its last four bytes: the kernel shows the death of a peer as the same end of file as its close(), and to take the
one for the other would be to truncate silently. docs/adr/0003-goodbye.md weighs it.

    make_link(url, options, rfd, wfd)     the fds are non-blocking, and the link's from now on
"""

from __future__ import annotations

import fcntl
import os
import socket
from dataclasses import dataclass
from typing import Any

from .. import _native as native_core
from .. import _options, errors
from .._options import option
from .._spi import Peer, Wait
from .._url import Url
from . import _frames
from ._native import Ended, make_fail


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions(_options.LinkOptions):
    limit: int = _frames.limit_option()
    spin: float | None = option(None, _options.spin, "how long to spin before sleeping, or auto")
    goodbye: bool = option(
        True, _options.flag, "off: the peer writes none (a foreign client); its death may look like its end"
    )


class Descriptors:
    """`.native` of a stream: the numbers, for looking. The link owns them."""

    def __init__(self, read: int, write: int) -> None:
        self.read = read
        self.write = write

    def socket(self) -> socket.socket:
        """A socket object of its own descriptor on the same connection: for options, not for reading or writing."""
        return socket.socket(fileno=os.dup(self.read))


class FdLink(native_core.StreamLink):
    """A StreamLink that a forked child lets go of."""

    native: Descriptors
    closed = False

    def close(self, goodbye: bool = True) -> None:
        self.closed = True
        super().close(goodbye)

    def abandon(self) -> None:
        if not self.closed:
            let_go(self.native)


def let_go(descriptors: Descriptors) -> None:
    """Drop our copies of a stream that lives on in another process.

    The numbers stay taken, by /dev/null: the link still knows them, and will close them.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in {descriptors.read, descriptors.write}:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def make_link(
    url: Url,
    options: StreamOptions,
    rfd: int,
    wfd: int,
    *,
    peer: Peer | None = None,
    ended: Ended | None = None,
    kind: type[FdLink] = FdLink,
) -> FdLink:
    """A link over these descriptors (one socket: twice the same). `ended`: what an end of file without a goodbye means."""

    def on_fork() -> None:
        raise forked(url)

    return kind(
        rfd,
        wfd,
        make_fail(url, ended or ended_unknown(url, options)),
        on_fork,
        options.limit,
        spin_ns(options),
        options.goodbye,
        Wait,
        Descriptors(rfd, wfd),
        peer or Peer(),
    )


def _pipe_size(text: str) -> int:
    value = _options.size(text)
    if value > 1 << 30:
        raise ValueError("at most 1GiB")
    return value


def pipe_size_option() -> Any:
    help = "the kernel's buffer for each direction; 0: as the system has it (64 KiB)"
    return option(0, _pipe_size, help)


def set_pipe_size(url: Url, operation: str, size: int, *fds: int) -> None:
    """`size=` of pipes, 0 for as they are. Raises ResourceLimit above what the system allows; other OSErrors as they come."""
    try:
        for fd in fds if size else ():
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, size)
    except PermissionError as error:
        raise errors.ResourceLimit(
            f"a pipe of {size} bytes is not allowed",
            url=url,
            operation=operation,
            hint="see /proc/sys/fs/pipe-max-size",
        ) from error


def spin_ns(options: StreamOptions) -> int:
    return -1 if options.spin is None else int(options.spin * 1e9)


def forked(url: Url) -> errors.ForkedError:
    return errors.ForkedError(
        "opened before a fork, used in the child", url=url, hint="open the endpoint in the process that uses it"
    )


def ended_unknown(url: Url, options: StreamOptions) -> Ended:
    """Where nobody can be asked: without a goodbye, the worse is assumed."""

    def ended(operation: str, broken: str | None) -> errors.PeerError:
        if broken is not None:
            return errors.PeerDied(f"the peer ended {broken}", url=url, operation=operation)
        if not options.goodbye:
            return errors.PeerClosed("the peer closed", url=url, operation=operation)
        return errors.PeerDied(
            "the peer ended without a goodbye: it was killed, or it is a foreign client that writes none",
            url=url,
            operation=operation,
            hint="?goodbye=off takes its end of file for a close",
        )

    return ended
