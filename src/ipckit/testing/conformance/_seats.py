"""Who uses locks in a contract: a `Seat` is one thread (or one task of a loop of its own) that does as it is told, in order.

Locks belong to threads, so a seat keeps its thread. It sits in this process, or in one that was forked, spawned or come from a fork
server; the orders go over a pipe in every case. `start` gives a future, so that a seat can wait while another acts; `die` ends it as
`kill -9` would, or (in this process) ends its thread, which to a lock is the same.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import inspect
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal

import ipckit.aio
import ipckit.sync
from ipckit import errors

from ._parties import HANG, Pending, ShellName, finish

Where = Literal["thread", "fork", "spawn", "forkserver"]
WHERE: tuple[Where, ...] = ("thread", "fork", "spawn", "forkserver")


class Planned(Exception):
    """What a contract throws in a `with` block."""


# -- there --------------------------------------------------------------------------------------------------------------


async def given(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class Desk:
    """What a seat works on: the orders, as coroutines that suspend in the asynchronous shell only."""

    def __init__(self, shell: ShellName) -> None:
        self.api: Any = ipckit.sync if shell == "sync" else ipckit.aio
        self.things: dict[str, Any] = {}
        self.inside: list[Any] = []

    def _find(self, path: str) -> Any:
        name, *steps = path.split(".")
        found = self.things[name]
        for step in steps:
            found = getattr(found, step)
        return found

    async def make(self, key: str, kind: str, *args: Any, **named: Any) -> None:
        args = tuple(self.things[arg[1]] if isinstance(arg, tuple) else arg for arg in args)
        self.things[key] = getattr(self.api, kind)(*args, **named)

    async def call(self, path: str, *args: Any, **named: Any) -> Any:
        found = self._find(path)
        return await given(found(*args, **named)) if callable(found) else found

    async def timed(self, path: str, *args: Any, **named: Any) -> tuple[Any, float]:
        begin = time.monotonic()
        try:
            result = await self.call(path, *args, **named)
        except errors.IpcError as error:
            result = type(error).__name__
        return result, time.monotonic() - begin

    async def enter(self, path: str, *args: Any) -> Any:
        context = self._find(path)
        context = context(*args) if callable(context) else context
        value = await given(context.__aenter__() if hasattr(context, "__aenter__") else context.__enter__())
        self.inside.append(context)
        return value

    async def leave(self, fail: bool = False) -> None:
        context = self.inside.pop()
        exc = (Planned, Planned(), None) if fail else (None, None, None)
        await given(context.__aexit__(*exc) if hasattr(context, "__aexit__") else context.__exit__(*exc))

    async def hammer(self, path: str, counter: str, rounds: int, linger: float = 0) -> int:
        """Add to a number in a file, one by one, in the open: what two do at once is lost. The longest run of others meanwhile."""
        thing, most = self._find(path), 0
        for _ in range(rounds):
            came = _read(counter)
            await given(thing.acquire())
            before = _read(counter)
            time.sleep(linger)
            _write(counter, before + 1)
            await given(thing.release())
            most = max(most, before - came)
        return most

    async def forked(self, path: str) -> str:
        """In a forked child: what comes of releasing what the parent holds."""
        found = self._find(path)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                found()
                code = 2
            except errors.NotOwner:
                code = 7
            finally:
                os._exit(code)
        return "NotOwner" if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7 else "something else"

    async def cancelled(self, path: str, *args: Any) -> str:
        """Of a task that waits, and is cancelled once it does."""
        task = asyncio.ensure_future(self._find(path)(*args))
        for _ in range(20):
            await asyncio.sleep(0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return f"returned {await task}"
        return "cancelled"

    async def cancelled_in_wait(self, path: str) -> str:
        """A task that waits for a condition is cancelled."""
        condition = self._find(path)

        async def wait() -> str:
            async with condition:
                try:
                    await condition.wait()
                except asyncio.CancelledError:
                    condition.notify()  # raises without the lock
                    return "cancelled, and held the lock"
            return "notified"

        task = asyncio.ensure_future(wait())
        while condition.n_waiting == 0:
            await asyncio.sleep(0.001)
        task.cancel()
        return await task

    async def environ(self, **variables: str) -> None:
        os.environ.update(variables)

    async def clear(self) -> None:
        self.things.clear()
        self.inside.clear()

    async def obey(self, order: str, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        try:
            result = await getattr(self, order)(*args, **named)
        except Exception as error:
            return None, (type(error).__name__, str(error), getattr(error, "pid", None))
        return (result if isinstance(result, bool | int | float | str | tuple | list) else None), None


def _read(counter: str) -> int:
    with open(counter, "rb") as file:
        return int(file.read() or 0)


def _write(counter: str, value: int) -> None:
    with open(counter, "r+b") as file:
        file.write(b"%d" % value)


def _hear(pipe: Any, loop: asyncio.AbstractEventLoop, orders: asyncio.Queue[Any]) -> None:
    order: Any = ()
    while order is not None:
        try:
            order = pipe.recv()
        except EOFError:
            order = None
        loop.call_soon_threadsafe(orders.put_nowait, order)


def serve(pipe: Any, shell: ShellName, things: dict[str, Any] | None = None) -> None:
    """Until the other end is closed, or it is told to die."""
    desk = Desk(shell)
    desk.things.update(things or {})

    async def main() -> None:
        loop, orders = asyncio.get_running_loop(), asyncio.Queue[Any]()
        threading.Thread(target=_hear, args=(pipe, loop, orders), daemon=True).start()
        while (order := await orders.get()) is not None:
            pipe.send(await desk.obey(*order))

    if shell == "async":
        asyncio.run(main())
    else:
        with contextlib.suppress(EOFError):
            while (order := pipe.recv()) is not None:
                pipe.send(finish(desk.obey(*order)))
    pipe.close()


# -- here ---------------------------------------------------------------------------------------------------------------


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
            self._worker = context.Process(target=serve, args=(theirs, shell, things), daemon=True)  # type: ignore[attr-defined]
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
