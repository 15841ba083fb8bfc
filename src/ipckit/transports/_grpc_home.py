"""Where grpc.aio runs: one thread with one event loop for all gRPC endpoints of the process, sync and async alike.

grpc.aio has one queue of events for a whole process and wakes every loop that uses it for every event, whoever it is for;
with a loop for each caller, wake-ups get lost between them. (Tried: the caller's own loop, and a loop that waiting callers turn,
as NATS has it. Both lost events under load.) So there is one loop, and it always runs: what a killed peer had sent is read
at once. Callers on any thread meet it at deques and eventfds.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import socket
import stat
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from ._bell import Bell


class Closeable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closeable)

# gRPC's fork handlers make the child of a process that has gRPC servers crash, one time in five; without them it is only left
# without gRPC. They are read about when grpc is imported. Who sets the variable, knows why.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_AT_EXIT = 60.0  # seconds at most, whatever `linger` says

_lock = threading.Lock()
_home: IoThread | None = None
_used = False  # gRPC's own threads run in this process
_lost = False  # it was there before a fork: its thread, and gRPC's own, are not here

#: Links that are closed and still have something to say. Touched on the loop only, but for the fork.
leaving: set[object] = set()
_tasks: set[asyncio.Task[None]] = set()


def background(coroutine: Coroutine[Any, Any, None]) -> None:
    """On the loop: a task that nobody awaits."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


class IoThread:
    """The thread and its loop. They stay for as long as the process, as gRPC's own threads do."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_complain)
        self._thread = threading.Thread(target=self._run, name="ipckit-grpc", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        import grpc.aio

        asyncio.set_event_loop(self.loop)
        # Once: to end it with the last endpoint, and begin again with the next, is more than gRPC stands.
        self.loop.call_soon(grpc.aio.init_grpc_aio)
        self.loop.run_forever()

    def stop(self) -> None:
        """At exit: a thread that is inside gRPC while the interpreter is taken down would hang it."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)

    def do(self, function: Callable[[], object]) -> None:
        """Soon, on the loop."""
        if threading.current_thread() is self._thread:
            function()
        else:
            self.loop.call_soon_threadsafe(function)

    def steps(self, function: Callable[[], Coroutine[Any, Any, T]]) -> Steps[T]:
        """Run a coroutine there. Ending the steps early cancels it; a result that nobody takes any more is closed.

        A cancellation may find the coroutine done, its result on the way to us: so what became of it is told by the loop.
        """
        bell = Bell()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        outcome.add_done_callback(lambda _: bell.ring())
        tasks: list[asyncio.Task[None]] = []

        async def work() -> None:
            try:
                outcome.set_result(await function())
            except asyncio.CancelledError:
                outcome.set_exception(concurrent.futures.CancelledError())
            except BaseException as error:
                outcome.set_exception(error)

        self.do(lambda: tasks.append(self.loop.create_task(work())))
        try:
            while True:
                wait = Wait((bell.announce(),))
                if outcome.done():
                    break
                yield wait
        except BaseException:
            self.do(lambda: tasks[0].cancel())
            outcome.add_done_callback(_close_result)
            raise
        finally:
            self.do(bell.close)  # there, where it is rung
        return outcome.result()


def _close_result(outcome: concurrent.futures.Future[Any]) -> None:
    if outcome.exception() is None:
        outcome.result().close()


def grpc_home(url: object, operation: str) -> IoThread:
    global _home
    use(url, operation)
    with _lock:
        if _home is None:
            _home = IoThread()
        return _home


def use(url: object, operation: str) -> None:
    """GRPC is about to be used here. Raises ForkedError."""
    global _used
    if _lost:
        raise errors.ForkedError(
            "gRPC was used before this process was forked, and its threads are not here",
            url=url,
            operation=operation,
            hint="fork first, or start the process by multiprocessing's 'spawn' or 'forkserver'",
        )
    _used = True


def park(url: Url, path: Path | None) -> None:
    """In the child of a fork: let go of gRPC's connections at this address, or their peers would not hear of the parent's death.

    gRPC does not tell their descriptors, so they are known by their port or path. They become /dev/null, which keeps the
    numbers from being given to somebody whose file gRPC would close one day.
    """
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode) and _is_at(fd, url, path):
                os.dup2(null, fd, inheritable=False)
        except OSError:
            continue
    os.close(null)


def _is_at(fd: int, url: Url, path: Path | None) -> bool:
    sock = socket.socket(fileno=fd)
    try:
        ends = [sock.getsockname()]
        with suppress(OSError):
            ends.append(sock.getpeername())
    finally:
        sock.detach()
    if path is not None:
        return any(isinstance(end, str) and os.path.basename(end).startswith(path.name) for end in ends)
    return any(isinstance(end, tuple) and end[1] == url.host.port for end in ends)


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # A program that uses grpc.aio on its own loop shares grpc.aio's wake-up socket with ours: the first to look empties it.
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def _forked() -> None:
    global _lock, _home, _lost
    _home, _lock = None, threading.Lock()
    leaving.clear()
    _tasks.clear()
    _lost = _lost or _used


def _exit() -> None:
    """What is still being said is given its time; see `linger`."""
    home = _home
    if home is not None:
        silent = threading.Event()

        def look() -> None:
            if leaving:
                home.loop.call_later(0.005, look)
            else:
                silent.set()

        home.loop.call_soon_threadsafe(look)
        silent.wait(_AT_EXIT)
        home.stop()


os.register_at_fork(after_in_child=_forked)
atexit.register(_exit)
