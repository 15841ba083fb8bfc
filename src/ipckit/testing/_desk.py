"""Where the other party of a lock contract works: its orders come over a pipe; see conformance/_seats.py.

It is a module of its own, that needs nothing but ipckit, because many processes start from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import threading
import time
from typing import Any

import ipckit.aio
import ipckit.sync
from ipckit import errors


class Planned(Exception):
    """What a contract throws in a `with` block."""


async def given(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class Desk:
    """What a seat works on: the orders, as coroutines that suspend in the asynchronous shell only."""

    def __init__(self, shell: str) -> None:
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
        """Add to a number in a file, in the open: what two do at once is lost. Says how often one wait was overtaken at most."""
        thing, most = self._find(path), 0
        for _ in range(rounds):
            came = _read(counter)
            await given(thing.acquire())
            before = _read(counter)
            time.sleep(linger)  # noqa: ASYNC251 - its loop has nothing else to do
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
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - as above
        return "NotOwner" if os.waitstatus_to_exitcode(status) == 7 else "something else"

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
        while condition.n_waiting == 0:  # noqa: ASYNC110 - other processes see it too, and none tells
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


def _finished(steps: Any) -> Any:
    """Of a coroutine that never suspends."""
    try:
        steps.send(None)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a blocking order suspended")


def _until_orphaned(parent: int) -> None:
    """A forked process has its siblings' ends of their pipes, so it may never see the end of its own."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _hear(pipe: Any, loop: asyncio.AbstractEventLoop, orders: asyncio.Queue[Any]) -> None:
    order: Any = ()
    while order is not None:
        try:
            order = pipe.recv()
        except EOFError:
            order = None
        loop.call_soon_threadsafe(orders.put_nowait, order)


def serve(pipe: Any, shell: str, things: dict[str, Any] | None = None) -> None:
    """Until the other end is closed, or it is told to die."""
    if threading.current_thread() is threading.main_thread():
        threading.Thread(target=_until_orphaned, args=(os.getppid(),), daemon=True).start()
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
                pipe.send(_finished(desk.obey(*order)))
    pipe.close()
