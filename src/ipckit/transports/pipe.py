"""pipe:// — two anonymous pipes between a process and its child.

    ours, theirs = ipckit.pair("pipe://")
    Process(target=work, args=(theirs,)).start()     # multiprocessing: fork, spawn, forkserver
    theirs.close()                                   # it is the child's now
    ours.send(b"hello")

    url, fds = theirs.native.hand_over()             # subprocess: the child says ipckit.connect(url)
    Popen([sys.executable, "child.py", url], pass_fds=fds); theirs.close()

Promises: whole frames in order; no name, so nothing to clean up and nobody else gets in; a process that dies is reported at
once, once nobody else holds its end. That is what the bookkeeping here is for. A fork copies both ends into the child, and
a copy that nobody uses would keep the stream open for ever:

    used, or passed to us    it is ours; a child lets go of its copy at the fork
    of a fresh pair          whoever uses it first has it: a child *adopts* it, and lets go of the other end
    closed fresh, after a fork    it is the child's, so no goodbye; but not if the other end went to the child already
"""

from __future__ import annotations

import fcntl
import os
import stat
import weakref
from dataclasses import dataclass, replace
from multiprocessing import reduction
from typing import Any, ClassVar

from .. import errors
from .._capabilities import Capabilities
from .._options import integer, option
from .._spi import Link, Listener, Peer, Steps, Transport, Wait
from .._url import Url
from ._native import make_fail
from ._oserror import map_oserror
from ._stream import Descriptors, FdLink, StreamOptions, ended_unknown, forked, pipe_size_option, set_pipe_size, spin_ns

_NO_FD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(StreamOptions):
    size: int = pipe_size_option()
    rfd: int = option(_NO_FD, integer(0, 1 << 30), "connect: the inherited descriptor to read from; see hand_over()")
    wfd: int = option(_NO_FD, integer(0, 1 << 30), "connect: the inherited descriptor to write to")


class PipeTransport(Transport[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        listen=False,
        pair=True,
        fileno=True,
        model="messages on two byte streams, through the kernel, without a name",
        use_case="a process and the child that it starts",
    )
    options: ClassVar[type[Any]] = Options

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        raise errors.Unsupported(
            "anonymous pipes have no name to listen at", url=url, operation="listen", hint="use pair(), or fifo://name"
        )

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        """Take over an end that the parent handed over."""
        if options.rfd == _NO_FD or options.wfd == _NO_FD:
            raise errors.Unsupported(
                "anonymous pipes have no name to connect to", url=url, operation="connect", hint="use pair()"
            )
        for fd, mode in ((options.rfd, os.O_RDONLY), (options.wfd, os.O_WRONLY)):
            try:
                fits = stat.S_ISFIFO(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == mode
            except OSError as error:
                raise map_oserror(error, url, "connect") from error
            if not fits:
                raise errors.BadOption(
                    f"descriptor {fd} is not that end of a pipe", url=url, hint="pass the fds to the child: pass_fds="
                )
        for fd in (options.rfd, options.wfd):  # subprocess made them inheritable
            os.set_blocking(fd, False)
            os.set_inheritable(fd, False)
        return _make(url, options, options.rfd, options.wfd, owned=True)
        yield  # nothing to wait for

    def pair(self, url: Url, options: Options) -> tuple[Link, Link]:
        if url.hosts or url.path:
            raise errors.BadUrl("anonymous pipes have no name", url=url, hint="write pipe://, or fifo://name")
        if options.rfd != _NO_FD or options.wfd != _NO_FD:
            raise errors.BadOption("rfd and wfd are for connect()", url=url)
        fds: list[int] = []
        try:
            fds += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            fds += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            set_pipe_size(url, "pair", options.size, fds[1], fds[3])
            left, right = _make(url, options, fds[0], fds[3]), _make(url, options, fds[2], fds[1])
        except (OSError, errors.ResourceLimit) as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, OSError):
                raise map_oserror(error, url, "pair") from error
            raise
        left.pair = right.pair = _Pair((weakref.ref(left), weakref.ref(right)))
        return left, right


@dataclass(slots=True)
class _Pair:
    ends: tuple[weakref.ref[PipeLink], ...] = ()
    given: bool = False  # one of them was passed on, so the other is ours


class PipeEnd(Descriptors):
    """`.native` of a pipe's end."""

    link: weakref.ref[PipeLink]

    def hand_over(self) -> tuple[str, tuple[int, int]]:
        """For a child started by `subprocess`: (the URL that it connects to, what to put into `pass_fds`).

        The end is the child's from then on: close it here once the child has started. Raises ConfigError if it was used.
        """
        link = self.link()
        if link is None or link.closed:
            raise errors.Closed("this endpoint is closed", operation="hand_over")
        link.give("hand_over")
        options = [pair for pair in link.url.options if pair[0] not in ("rfd", "wfd", "size")]
        options += [("rfd", str(self.read)), ("wfd", str(self.write))]
        return replace(link.url, options=tuple(options)).reveal(), (self.read, self.write)


class PipeLink(FdLink):
    """One end, and whose it is. (Made by `_make`.)"""

    native: PipeEnd
    url: Url
    options: Options
    pair: _Pair
    owned = False  # passed to us, or adopted: no child of ours may have it
    given = False  # pickled or handed over: it is another process's
    forked = False  # unused at a fork: it may be the child's
    orphan = False  # in a child: inherited, and nobody's yet
    lost = False  # in a child: not ours

    def give(self, operation: str) -> None:
        if any(self.counters()):
            raise errors.ConfigError(
                "an end that was used stays where it is", url=self.url, operation=operation, hint="pass it on unused"
            )
        self.given = self.pair.given = True

    def close(self, goodbye: bool = True) -> None:
        if not self.closed:
            if self.forked and not self.owned and not self.pair.given and not any(self.counters()):
                self.given = self.pair.given = True
            super().close(goodbye and not self.given)

    def abandon(self) -> None:
        """At the fork itself, `_in_child` has decided what becomes of it here."""

    def let_go(self) -> None:
        if not self.closed and not self.lost:
            self.lost = True
            super().abandon()

    def adopt(self) -> None:
        """The first use in a child. Raises ForkedError if it is not ours to use."""
        if self.lost or not self.orphan:
            raise forked(self.url)
        self.orphan, self.owned = False, True
        for other in (ref() for ref in self.pair.ends):
            if other is not None and other.orphan:
                other.orphan = False
                other.let_go()

    def __reduce__(self) -> tuple[Any, ...]:
        """For multiprocessing: the descriptors travel as it sends descriptors."""
        if self.closed:
            raise errors.Closed("this endpoint is closed", url=self.url, operation="pickle")
        self.give("pickle")
        fds = self.native
        return _take, (self.url, self.options, reduction.DupFd(fds.read), reduction.DupFd(fds.write))


_live: weakref.WeakSet[PipeLink] = weakref.WeakSet()


def _make(url: Url, options: Options, rfd: int, wfd: int, *, owned: bool = False) -> PipeLink:
    end = PipeEnd(rfd, wfd)

    def on_fork() -> None:
        link = end.link()
        if link is not None:
            link.adopt()

    fail = make_fail(url, ended_unknown(url, options))
    link = PipeLink(rfd, wfd, fail, on_fork, options.limit, spin_ns(options), options.goodbye, Wait, end, Peer())
    end.link = weakref.ref(link)
    link.url, link.options, link.pair, link.owned = url, options, _Pair(), owned
    _live.add(link)
    return link


def _take(url: Url, options: Options, read: Any, write: Any) -> PipeLink:
    return _make(url, options, read.detach(), write.detach(), owned=True)


def _in_parent() -> None:
    for link in tuple(_live):
        link.forked = True


def _in_child() -> None:
    for link in tuple(_live):
        if link.pair.given or link.owned or any(link.counters()):
            link.orphan = False
            link.let_go()
        elif not link.lost:
            link.orphan = True


os.register_at_fork(after_in_parent=_in_parent, after_in_child=_in_child)

TRANSPORT = PipeTransport()
