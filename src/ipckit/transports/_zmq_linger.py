"""The end of a zmq+tcp connection whose peer is still sending.

libzmq writes out what it was given, and closes the connection; if its socket ends, that is (`unbind` throws away what was not
written yet, so nobody unbinds a port here). If the peer has sent something that nobody read, the kernel then answers with a
reset, and what it had not sent yet is gone: messages that were accepted. libzmq has no orderly close. So before it is told
to end, a second descriptor is made of each connection whose peer has not said goodbye: what libzmq closes is a number, the
connection lives. One thread throws away what comes in until libzmq is done; then `_linger` ends it, as for tcp://.

That libzmq is done with a descriptor, nothing announces and its monitor does not tell: the number is no longer that file. So this
is looked at, every millisecond at first, less and less often later, and for no longer than `linger=` says.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress

from . import _linger

_FIRST_LOOK, _LAST_LOOK = 0.001, 0.05  # seconds
_WASTE = 64 << 10


class Number:
    """A descriptor that is libzmq's, until it has closed it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._inode = os.fstat(fd).st_ino

    def released(self) -> bool:
        try:
            return os.fstat(self._fd).st_ino != self._inode
        except OSError:
            return True

    def wait(self, seconds: float) -> None:
        """Return when libzmq has closed it. Who listens at a port next must not find it taken."""
        deadline = time.monotonic() + seconds
        while not self.released() and time.monotonic() < deadline:
            select.select((), (), (), 0.0002)


class Kept:
    """A connection that libzmq still writes to, under a number of our own."""

    def __init__(self, fd: int, seconds: float) -> None:
        self.theirs = Number(fd)
        self.sock = socket.socket(fileno=os.dup(fd))
        self.deadline = time.monotonic() + seconds

    def discard(self) -> bool:
        """Throw away what is there, a megabyte at most. True when the connection has ended."""
        try:
            for _ in range(16):
                if not self.sock.recv(_WASTE, socket.MSG_DONTWAIT):
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False


def keep(fds: Iterable[int], seconds: float) -> list[Kept]:
    """Before libzmq is told to end these connections."""
    kept = []
    for fd in fds:
        with suppress(OSError):  # it has closed it just now
            kept.append(Kept(fd, seconds))
    return kept


class _Lingering:
    """The thread and its connections. It ends when there are none."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._kept: list[Kept] = []
        self._running = False

    def add(self, kept: list[Kept]) -> None:
        if not kept:
            return
        with self._mutex:
            self._kept += kept
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="ipckit-zmq-linger", daemon=True).start()

    def _run(self) -> None:
        pause, before = _FIRST_LOOK, 0
        while True:
            with self._mutex:
                self._kept = [kept for kept in self._kept if not self._ended(kept)]
                if not self._kept:
                    self._running = False
                    return
                pause = _FIRST_LOOK if len(self._kept) > before else min(pause * 2, _LAST_LOOK)
                before = len(self._kept)
                poll = select.poll()
                for kept in self._kept:
                    poll.register(kept.sock.fileno(), select.POLLIN)
            poll.poll(pause * 1000)

    def _ended(self, kept: Kept) -> bool:
        # In this order: what came before libzmq let go must not meet a closed socket.
        done = kept.theirs.released()
        if kept.discard() or time.monotonic() >= kept.deadline:
            kept.sock.close()
        elif done:
            _linger.finish(kept.sock)
        else:
            return False
        return True

    def abandon(self) -> None:
        """In a forked child: the thread and the connections are the parent's."""
        for kept in self._kept:
            kept.sock.close()
        self.__init__()  # type: ignore[misc]


lingering = _Lingering()
os.register_at_fork(after_in_child=lingering.abandon)
