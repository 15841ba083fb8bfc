"""Names that say which process made them, so that the next one knows what a dead one left.

A kernel queue or a FIFO outlives the process that made it. So its name carries the maker's pid and the time at which that
process started (a pid alone is reused): `PID.START.N`. Whoever opens an endpoint sweeps the names of the dead first.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"(\d{1,10})\.(\d{1,20})\.(\d{1,10})")
_count = itertools.count(1)


class Owner(NamedTuple):
    """A process: its pid, and its start in clock ticks since boot."""

    pid: int
    start: int

    def pidfd(self) -> int | None:
        """A descriptor that becomes readable when it dies; None if it is dead already."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # In this order: what /proc says now is about the process that the descriptor holds, or about none.
        if _start_of(self.pid) == self.start and not _readable(fd):
            return fd
        os.close(fd)
        return None

    def alive(self) -> bool:
        fd = self.pidfd()
        if fd is not None:
            os.close(fd)
        return fd is not None


def me() -> Owner:
    start = _start_of(os.getpid())
    if start is None:
        raise OSError("/proc is not mounted")
    return Owner(os.getpid(), start)


def fresh_name() -> str:
    owner = me()
    return f"{owner.pid}.{owner.start}.{next(_count)}"


def owner_of(name: str) -> Owner | None:
    """Who made the thing of this name (anything behind PID.START.N is its own); None for a name that is not ours."""
    match = NAME.match(name)
    return Owner(int(match[1]), int(match[2])) if match else None


def sweep(directory: Path, remove: Callable[[str], None]) -> None:
    """Call `remove` for each name in the directory whose maker is dead."""
    judged: dict[Owner, bool] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            owner = owner_of(entry.name)
            if owner is None:
                continue
            if owner not in judged:
                judged[owner] = owner.alive()
            if not judged[owner]:
                remove(entry.name)


def _start_of(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
