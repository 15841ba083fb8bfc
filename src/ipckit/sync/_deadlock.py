"""Deadlock detection, for locks made with `debug=True`: who waits says for whom, and looks whether that leads back to itself.

    <memory_dir>/waits/<tid>     what a waiting thread waits for, who holds it, since when it waits, how often it has looked

A cycle is reported only if it is one. Its members are read twice: each still waits since the same moment, so it has let go of
nothing, and each has looked again in between at who holds what it waits for. Of the members, the one that began last raises.
Locks without `debug` are seen as held, but who waits for one of those is not seen waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

from .. import errors
from .._url import Url
from ..transports._runtime import memory_dir

#: Seconds between two looks.
LOOK = 0.05


class Wait(NamedTuple):
    """A thread that waits."""

    pid: int
    tid: int
    began: int  # CLOCK_MONOTONIC, ns: the same for all processes
    looks: int
    what: str
    owners: tuple[int, ...]  # threads


Cycle = tuple[Wait, ...]


def _told(cycle: Cycle) -> str:
    around = [*(f"thread {one.tid} of process {one.pid}" for one in cycle[1:]), "this thread"]
    return "this thread" + ", which".join(
        f" waits for the {one.what}, held by {holder}" for one, holder in zip(cycle, around, strict=True)
    )


class Waiting:
    """While one waits: announced to others."""

    def __init__(self, what: str, url: Url | None, owners: Callable[[], Iterable[Any]]) -> None:
        self._what, self._url, self._owners = what, url, owners
        self._began, self._looks = time.monotonic_ns(), 0
        self._suspected: Cycle = ()
        self._dir = memory_dir() / "waits"

    def __enter__(self) -> Self:
        self._dir.mkdir(mode=0o700, exist_ok=True)
        self._tid = threading.get_native_id()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._dir / str(self._tid)).unlink()

    def look(self) -> None:
        """Raises Deadlock where this wait is for itself, around whatever corners."""
        self._looks += 1
        tids = tuple(owner.tid for owner in self._owners())
        mine = Wait(os.getpid(), self._tid, self._began, self._looks, self._what, tids)
        self._announce(mine)
        cycle = self._find((mine,))
        before = {member.tid: member for member in self._suspected}
        if [(member.tid, member.began) for member in cycle] != [(m.tid, m.began) for m in self._suspected]:
            self._suspected = cycle
        elif (
            cycle
            and all(member.looks > before[member.tid].looks for member in cycle)
            and (mine.began, mine.tid) == max((member.began, member.tid) for member in cycle)
        ):
            raise errors.Deadlock(
                _told(cycle),
                url=self._url,
                operation="acquire",
                hint="take locks in one order everywhere",
                cycle=tuple((member.pid, member.tid, member.what) for member in cycle),
            )

    def _announce(self, mine: Wait) -> None:
        """Whole or not at all: written aside and renamed."""
        aside = self._dir / f"{self._tid}.new"
        aside.write_text(json.dumps(mine), encoding="ascii")
        aside.replace(self._dir / str(self._tid))

    def _find(self, path: Cycle) -> Cycle:
        """The way from us back to us, or nothing."""
        for tid in path[-1].owners:
            if tid == self._tid:
                return path
            if any(tid == member.tid for member in path) or (found := _read(self._dir / str(tid))) is None:
                continue
            if cycle := self._find((*path, found)):
                return cycle
        return ()


def _read(path: Path) -> Wait | None:
    """None where nobody waits; what a killed process left is removed."""
    try:
        note = Wait(*json.loads(path.read_text(encoding="ascii")))
        os.kill(note.pid, 0)
    except (
        ProcessLookupError,
        PermissionError,
    ):  # its number is nobody's, or somebody else's, who writes no notes here
        path.unlink(missing_ok=True)
        return None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return note._replace(owners=tuple(note.owners))


def patiently(try_for: Callable[[bool, float | None], bool], waiting: Waiting, timeout: float | None) -> bool:
    """Acquire with `try_for(block, timeout)`, with a look around from time to time. Raises Deadlock."""
    if try_for(False, None):
        return True
    deadline = None if timeout is None else time.monotonic() + timeout
    with waiting:
        while True:
            waiting.look()
            left = LOOK if deadline is None else min(LOOK, deadline - time.monotonic())
            if try_for(True, left):
                return True
            if left < LOOK:
                return False


class Debugged:
    """What `debug=True` changes of a Lock or RLock."""

    __slots__ = ()

    def acquire(self: Any, block: bool = True, timeout: float | None = None) -> bool:
        take = super().acquire  # type: ignore[misc]
        if not block:
            return bool(take(False))
        what = f"{type(self)._of} {self.url or 'anonymous'}"
        return patiently(take, Waiting(what, self.url, lambda: _one(self.owner())), timeout)

    def __enter__(self: Any) -> Any:
        self.acquire()
        return self


def _one(owner: Any) -> tuple[Any, ...]:
    return () if owner is None else (owner,)
