"""A doorbell inside one process: a descriptor that one thread or task sleeps on until another rings."""

from __future__ import annotations

import os
import select
from contextlib import suppress


class Bell:
    """Rung only while a sleeper is announced, for that costs a system call. One sleeper, any number who ring.

    Unless it is closed before, whoever forgets it last closes it: nobody can ring a number that has become somebody else's file.
    """

    __slots__ = ("_awaited", "_fd", "_rung")

    def __init__(self) -> None:
        self._awaited = False
        self._rung = False
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def announce(self) -> tuple[int, int]:
        """From now on `ring` rings. Try once more after this, and then sleep on the result."""
        if self._rung:
            self._rung = False
            with suppress(BlockingIOError):
                os.eventfd_read(self._fd)
        self._awaited = True  # SYNC POINT: bell-sleep. Announce, then look once more ...
        return self._fd, select.POLLIN

    def ring(self) -> None:
        if self._awaited:  # SYNC POINT: bell-sleep. ... the other side puts, then looks for the announcement.
            self._awaited = False
            os.eventfd_write(self._fd, 1)
            self._rung = True  # after it: a sleeper that misses this wakes for nothing, once, and then does not

    def close(self) -> None:
        """At once, where it is certain that nobody rings any more."""
        self._awaited = False
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    __del__ = close
