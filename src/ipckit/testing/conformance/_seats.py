"""Who uses locks in a contract: a `Seat` is one thread (or one task of a loop of its own) that does as it is told, in order.

Locks belong to threads, so a seat keeps its thread. It sits in this process, or in one that was forked, spawned or comes from a
fork server; the orders go over a pipe in every case. `start` gives a future, so that a seat can wait while another acts; `die`
ends it as `kill -9` would, or (in this process) ends its thread, which to a lock is the same. `Seated`: where contracts start.
"""

from __future__ import annotations

import atexit
import builtins
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Literal

import pytest

from ipckit import errors

from .._desk import serve
from ._base import Ground
from ._parties import HANG, Pending, ShellName

Where = Literal["thread", "fork", "spawn", "forkserver"]
WHERE: tuple[Where, ...] = ("thread", "fork", "spawn", "forkserver")
multiprocessing.get_context("forkserver").set_forkserver_preload(["ipckit.testing._desk"])


class Seat:
    """One that obeys."""

    def __init__(self, shell: ShellName, where: Where, things: dict[str, Any] | None = None) -> None:
        self.shell, self.where = shell, where
        context = multiprocessing.get_context(None if where == "thread" else where)
        self._pipe, theirs = context.Pipe()
        self._worker: Any
        if where == "thread":
            self._worker = threading.Thread(target=serve, args=(theirs, shell, things), daemon=True)
        else:
            self._worker = context.Process(target=serve, args=(theirs, shell, things), daemon=True)
        self._worker.start()
        if where != "thread":
            theirs.close()
        self.alive = True

    @property
    def pid(self) -> int:
        return os.getpid() if self.where == "thread" else self._worker.pid

    def start(self, order: str, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Pending()
        self._pipe.send((order, args, named))

        def hear() -> None:
            try:
                result, error = self._pipe.recv()
            except BaseException as lost:
                future.set_exception(lost)
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(_raised(*error))

        threading.Thread(target=hear, daemon=True).start()
        return future

    def do(self, order: str, *args: Any, **named: Any) -> Any:
        return self.start(order, *args, **named).result(HANG)

    def call(self, path: str, *args: Any, **named: Any) -> Any:
        return self.do("call", path, *args, **named)

    def die(self) -> None:
        """Returns when the kernel has done it."""
        self.alive = False
        if self.where == "thread":
            self._pipe.send(None)
            native = self._worker.native_id
            self._worker.join(HANG)
            while os.path.exists(f"/proc/self/task/{native}"):
                time.sleep(0.001)
        else:
            self._worker.kill()
            self._worker.join(HANG)
            self._worker.close()
        self._pipe.close()

    def close(self) -> None:
        if self.alive:
            self.alive = False
            self._pipe.send(None)
            self._worker.join(HANG)
            self._pipe.close()
            if self.where != "thread":
                self._worker.close()


def _raised(name: str, message: str, pid: int | None) -> BaseException:
    kind: Callable[..., BaseException] | None = getattr(errors, name, None) or getattr(builtins, name, None)
    if name == "OwnerDied":
        return errors.OwnerDied(message, pid=pid)
    return AssertionError(f"{name}: {message}") if kind is None else kind(message)


class Seats:
    """Seats kept warm between contracts; whoever died is replaced."""

    def __init__(self) -> None:
        self._idle: dict[tuple[ShellName, Where], list[Seat]] = {}

    def take(self, shell: ShellName, where: Where) -> Seat:
        idle = self._idle.setdefault((shell, where), [])
        return idle.pop() if idle else Seat(shell, where)

    def give_back(self, seat: Seat) -> None:
        if seat.alive:
            self._idle[seat.shell, seat.where].append(seat)

    def close(self) -> None:
        for seats in self._idle.values():
            while seats:
                seats.pop().close()


def until(true: Callable[[], bool]) -> None:
    """Give others the processor until something is so."""
    deadline = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.001)


_seats = Seats()
atexit.register(_seats.close)


class Seated(Ground):
    """A contract for those who sit: one here, one there, and a name that nobody uses."""

    @pytest.fixture
    def seat(self, shell: ShellName, runtime_dir: str) -> Iterator[Callable[[Where], Seat]]:
        """Seats as they are asked for, with the same shell and runtime directory as this test."""
        taken: list[Seat] = []

        def sit(where: Where) -> Seat:
            taken.append(_seats.take(shell, where))
            taken[-1].do("clear")
            taken[-1].do("environ", IPCKIT_RUNTIME_DIR=runtime_dir)
            return taken[-1]

        yield sit
        for one in taken:
            _seats.give_back(one)

    @pytest.fixture
    def here(self, seat: Callable[[Where], Seat]) -> Seat:
        return seat("thread")

    @pytest.fixture(params=WHERE)
    def there(self, seat: Callable[[Where], Seat], request: pytest.FixtureRequest) -> Seat:
        return seat(request.param)

    @pytest.fixture(params=WHERE[1:])
    def far(self, seat: Callable[[Where], Seat], request: pytest.FixtureRequest) -> Seat:
        """In another process, which can be killed while it waits."""
        return seat(request.param)

    @pytest.fixture
    def counter(self, runtime_dir: str) -> str:
        path = os.path.join(runtime_dir, "counter")
        with open(path, "wb") as file:
            file.write(b"0")
        return path

    @staticmethod
    def share(kind: str, *args: Any, seats: tuple[Seat, ...], **named: Any) -> None:
        """All open the object `x`."""
        for one in seats:
            one.do("make", "x", kind, *args, **named)
