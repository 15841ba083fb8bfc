"""Where grpc.aio runs when the caller has no event loop: one loop for the whole process, turned by whoever waits.

grpc.aio has one queue of events for all loops of a process, so a loop for each channel would only wake them all for every event;
synchronous gRPC endpoints share this one. And its core forgets what it received when the connection breaks and nobody
has asked for it yet. So while no caller is inside, a *watcher* thread turns the loop, two milliseconds after something
happened: what a killed peer had sent is safe by then, and a caller who comes back sooner finds the loop to himself.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import select
import socket
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from .. import errors
from .._spi import Steps
from .._url import Url
from ._bridge import Driven, Home, _care, find_home, forget
from ._runtime import path_for

# gRPC's fork handlers make the child of a process that has gRPC servers crash, one time in five; without them it is only left
# without gRPC. They are read about when grpc is imported. Who sets the variable, knows why.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_PATIENCE = 2  # milliseconds
_TICK = 500  # milliseconds
_AT_EXIT = 60  # seconds at most, whatever `linger` says

_lock = threading.Lock()
_shared: Shared | None = None
_used = False  # gRPC has started its threads in this process
_lost = False  # ... before a fork: they are not here


#: Links that are closed and still have something to say.
leaving: set[object] = set()
_tasks: set[asyncio.Task[None]] = set()


def background(coroutine: Coroutine[Any, Any, None]) -> None:
    """On the loop: a task that nobody awaits."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)


def grpc_home(url: object, operation: str) -> Steps[Home]:
    """The home for an endpoint; `leave` it in the end."""
    global _used
    if _lost:
        raise errors.ForkedError(
            "gRPC was used before this process was forked, and its threads are not here",
            url=url,
            operation=operation,
            hint="fork first, or start the process by multiprocessing's 'spawn' or 'forkserver'",
        )
    home = yield from find_home(_enter)
    if not _used:
        _used = True
        home.do(_begin)
    return home


def _begin() -> None:
    """On the loop. Once: to end it with the last endpoint, and begin again with the next, is more than gRPC stands."""
    import grpc.aio

    grpc.aio.init_grpc_aio()


def _enter() -> Home:
    global _shared
    with _lock:
        if _shared is None:
            _shared = Shared()
        _shared.users += 1
        _shared.stir()
        return _shared


def leave(home: Home) -> None:
    """On the loop, when everything that the endpoint had there is over."""
    if isinstance(home, Shared):
        with _lock:
            home.users -= 1


class Shared(Driven):
    """The loop of all synchronous endpoints. It stays for as long as the process, as gRPC's own threads do."""

    def __init__(self) -> None:
        super().__init__()
        _care.leave(self)
        self.users = 0
        self._nudge = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.loop.set_exception_handler(_complain)
        threading.Thread(target=self._watch, name="ipckit-grpc", daemon=True).start()

    def _turn_here(self) -> None:
        try:
            super()._turn_here()
        except BaseException:  # Ctrl-C costs the task that it hits, and so its link; others live here as well
            self.broken = False
            raise

    def _watch(self) -> None:
        happened, nudged = select.poll(), select.poll()
        happened.register(self._epoll, select.POLLIN)
        happened.register(self._nudge, select.POLLIN)
        nudged.register(self._nudge, select.POLLIN)
        while not self.loop.is_closed():
            happened.poll(_TICK if self.users else None)  # the loop has timers, too
            seen = self.turned
            nudged.poll(_PATIENCE)
            with suppress(BlockingIOError):
                os.eventfd_read(self._nudge)
            if self.turned == seen:
                self.turn()

    def stir(self) -> None:
        os.eventfd_write(self._nudge, 1)

    def doze(self) -> None:
        """Until something happens, or a little."""
        self._peek.poll(20)

    def abandon(self) -> None:
        pass  # `_forked` does it once for all


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # Loops of one process share grpc.aio's wake-up socket: the first to look empties it, the others are surprised.
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


def forget_sockets(url: Url) -> None:
    """In a forked child: let go of the connections of an endpoint. gRPC does not tell which they are; their addresses do."""
    port = url.host.port if url.hosts else None
    name = None if port else path_for(url, ".grpc").name
    ours = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as sock:
            ends = [sock.getsockname()]
            with suppress(OSError):
                ends.append(sock.getpeername())
            for end in ends:
                if isinstance(end, tuple) and len(end) > 1 and port is not None:
                    found = end[1] == port
                else:
                    found = isinstance(end, str) and name is not None and os.path.basename(end).startswith(name)
                if found:
                    ours.append(int(number))
    forget(ours)


def _forked() -> None:
    global _lock, _shared, _lost
    home, _shared, _lock = _shared, None, threading.Lock()
    leaving.clear()
    _lost = _lost or _used
    if home is not None:
        Driven.abandon(home)


def _exit() -> None:
    """What is still being said is given its time; see `linger`."""
    deadline = time.monotonic() + _AT_EXIT
    while (home := _shared) is not None and leaving and time.monotonic() < deadline:
        home.turn()
        home.doze()


os.register_at_fork(after_in_child=_forked)
atexit.register(_exit)
