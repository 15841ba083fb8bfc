"""Where an asyncio-only client library meets the SPI: its coroutines need a loop, and somebody who turns it.

A `Home` is that loop. When the caller has a running loop (`ipckit.aio`), the client lives there: a `Resident`.
Otherwise it gets a loop of its own, a `Driven` home, and *whoever waits turns it*: the loop's selector never sleeps,
its epoll descriptor is part of every `Wait`, and each `try_` runs the loop until it has nothing left to do. So a
message goes from the socket to the caller on the caller's own thread. An I/O thread would cost two hand-overs of the
GIL a message, which is more than everything else here together. While no caller comes, the *caretaker* turns the loop
about once a second (one daemon thread for all homes, which lives as long as there are any): servers' pings are
answered, sockets read, timers fired.

    home = yield from find_home()          which of the two, without a flag through every layer
    home.do(function)                      call it on the loop, and let its consequences happen
    result = yield from home.steps(client.connect)   run a coroutine function of the client as steps
    bell.arm() / bell.ring()               sleep at an endpoint / wake it; call `ring` on the loop only
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import select
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Protocol, TypeAlias, TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._wait import sleepers_at

T = TypeVar("T")

log = logging.getLogger("ipckit.bridge")

_TURNS = 100  # of the loop in one go; a peer that never stops sending must not keep a caller inside for ever
_TICK = 1.0  # seconds after which the caretaker turns a loop that nobody has turned
_AT_MOST = 0.25  # seconds that a caller sleeps before it turns the loop for its timers' sake
_FAREWELL = 0.5  # seconds in which a client may close its connection in order


Farewell: TypeAlias = Callable[[], Coroutine[Any, Any, object]]


class Home(Protocol):
    loop: asyncio.AbstractEventLoop
    #: The client was interrupted in the midst of its work, and cannot go on.
    broken: bool
    #: A bell may be silenced by whoever finds what it rang for: sleepers are woken all together here.
    eager: bool

    def turn(self) -> None:
        """Let the loop do what it can do now, if that is ours to do. Never waits."""

    def do(self, function: Callable[[], object]) -> None:
        """Call `function` on the loop: before this returns, if that is possible here."""

    def poke(self, function: Callable[[], object]) -> None:
        """As `do`, for what only writes to a transport: a loop of our own need not be turned for it."""

    def steps(self, function: Callable[[], Coroutine[Any, Any, T]]) -> Steps[T]:
        """Run a coroutine; its result is the result. Closing or timing out the steps cancels it."""

    def wait(self, bell: int) -> Wait:
        """What to sleep on at an endpoint that has this bell."""

    def rouse(self, bell: int) -> bool:
        """On the loop: wake who sleeps at this bell without ringing it, soon. False: nobody does, here."""

    def roused(self) -> None:
        """On the loop, with no task active: "soon" is now."""

    def close(self, farewell: Farewell, cut: Callable[[], None]) -> None:
        """The last user goes: run `farewell`, for a moment at most, and end what was started here.

        `cut` lets go of the client's descriptors, if it cannot close them itself.
        """

    def abandon(self) -> None:
        """In the child of a fork: close the parent's descriptors here, and touch nothing else."""


class Bell:
    """An eventfd that is written only while somebody has announced to sleep.

    Armed by callers, rung on the loop. On a thread, one bell is one sleeper's: it is silenced when that one arms it again, and
    not when some other thread finds what it rang for.
    """

    __slots__ = ("_armed", "_fd", "_home", "_rung", "_wait")

    def __init__(self, home: Home) -> None:
        self._home = home
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wait = home.wait(self._fd)
        self._armed = False
        self._rung = False

    def arm(self) -> Wait:
        self.silence()
        self._armed = True
        return self._wait

    def disarm(self) -> None:
        self._armed = False

    def silence(self) -> None:
        if self._rung:
            self._rung = False
            os.eventfd_read(self._fd)

    def ring(self) -> None:
        if self._armed:
            self._armed = False
            if not self._home.rouse(self._fd):
                os.eventfd_write(self._fd, 1)
                self._rung = True  # after the write: whoever sees it can read

    def close(self) -> None:
        self._armed = self._rung = False
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def find_home() -> Steps[Home]:
    """The home for an endpoint that is being opened by these steps: on the running loop if that loop drives them.

    A running loop alone says little: in a notebook, a plain blocking call finds one, which stands still meanwhile. So: sleep
    for no time, and look whether the loop has moved.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return Driven()
    moved: list[bool] = []
    handle = loop.call_soon(moved.append, True)
    try:
        yield Wait((), 0)
    finally:
        handle.cancel()
    return Resident(loop) if moved else Driven()


# -- on the caller's loop -----------------------------------------------------------------------------------------


class Resident:
    """The caller's own running loop. Every other thread and loop may only leave a message there."""

    eager = True

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.broken = False
        self._tasks = set[asyncio.Task[Any]]()
        self._roused: list[Any] = []

    def turn(self) -> None:
        pass

    def do(self, function: Callable[[], object]) -> None:
        if _running() is self.loop:
            function()
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function)

    poke = do

    def steps(self, function: Callable[[], Coroutine[Any, Any, T]]) -> Steps[T]:
        return _task_steps(self, function)

    def wait(self, bell: int) -> Wait:
        return Wait(((bell, select.POLLIN),))

    def rouse(self, bell: int) -> bool:
        sleepers = sleepers_at(self.loop, bell)
        if sleepers:
            if not self._roused:
                self.loop.call_soon(self.roused)
            self._roused += sleepers
        return bool(sleepers)

    def roused(self) -> None:
        sleepers, self._roused = self._roused, []
        for sleeper in sleepers:
            sleeper.wake()

    def close(self, farewell: Farewell, cut: Callable[[], None]) -> None:
        if self.loop.is_closed():
            cut()
            return

        def say() -> None:
            # The loop may end right after this, and take unfinished tasks with it: so at once, as far as it goes.
            rest = _begin(farewell(), cut)
            if rest is not None:
                task = self.loop.create_task(rest)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        self.do(say)

    def abandon(self) -> None:
        pass  # the loop is the caller's; a copy of it in a child is of no use to anybody


def _begin(coroutine: Coroutine[Any, Any, object], cut: Callable[[], None]) -> Coroutine[Any, Any, None] | None:
    """Run it without a task until it really has to wait; the rest of it, if there is any."""
    try:
        while (waited := coroutine.send(None)) is None:
            pass  # it only gave way to others
    except StopIteration:
        return None
    except Exception as error:
        log.debug("closing: %s: %s", type(error).__name__, error)
        return None

    async def rest() -> None:
        try:
            await asyncio.wait_for(rest_of(coroutine, waited), _FAREWELL)
        except (Exception, asyncio.CancelledError):  # a broken connection has nothing to say, and nobody to hear it
            cut()

    return rest()


async def rest_of(coroutine: Coroutine[Any, Any, object], waited: object) -> None:
    """Go on, in a task, with a coroutine that was begun without one and has yielded `waited`."""
    await _Resumed(coroutine, waited)


class _Resumed:
    """A coroutine that was begun elsewhere, and what it waits for."""

    def __init__(self, coroutine: Coroutine[Any, Any, object], waited: object) -> None:
        self._coroutine = coroutine
        self._waited = waited

    def __await__(self) -> Generator[Any, Any, None]:
        waited = self._waited
        try:
            while True:
                try:
                    value = yield waited
                except BaseException as error:
                    waited = self._coroutine.throw(error)
                else:
                    waited = self._coroutine.send(value)
        except StopIteration:
            return


# -- on a loop of our own -----------------------------------------------------------------------------------------


class _Selector(selectors.DefaultSelector):
    """A selector that never sleeps. When the loop wants to, it has nothing left to do, and is stopped."""

    loop: asyncio.AbstractEventLoop
    turns = 0
    closed = False
    sleep: float | None = None  # how long the loop wanted to sleep when it stopped; None: for ever

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        self.turns += 1
        if not found and timeout != 0:
            self.sleep = timeout
            self.loop.stop()
        elif self.turns >= _TURNS:
            self.sleep = None
            self.loop.stop()
            self.loop.call_soon_threadsafe(_nothing)  # what is left to do makes our descriptor ready
        return found

    def close(self) -> None:
        self.closed = True
        super().close()


class Driven:
    """A loop that is turned by whoever waits. One thread at a time is inside; it never sleeps there."""

    eager = False

    def __init__(self) -> None:
        self._selector = _Selector()
        self._epoll: int = self._selector.fileno()
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop(self._selector)
        self._selector.loop = self.loop
        # Re-entered only by the garbage collector, which may close an endpoint of this home in the midst of anything.
        self._mutex = threading.RLock()
        self._late: tuple[Farewell, Callable[[], None]] | None = None
        self._peek = select.poll()
        self._peek.register(self._epoll, select.POLLIN)
        self._due = 0.0  # when the loop's next timer wants to fire
        self.turned = time.monotonic()
        self.broken = False
        _care.take(self)

    def turn(self) -> None:
        if _running() is self.loop:
            return
        with self._mutex:
            now = self.turned = time.monotonic()
            if (now >= self._due or self._peek.poll(0)) and not self.broken:
                self._turn()

    def do(self, function: Callable[[], object]) -> None:
        if _running() is self.loop:
            function()
            return
        with self._mutex:
            if not self.broken:
                self.turned = time.monotonic()
                self.loop.call_soon(function)
                self._turn()

    def poke(self, function: Callable[[], object]) -> None:
        if _running() is self.loop:
            function()
            return
        with self._mutex:
            if self.loop.is_running():
                self.loop.call_soon(function)  # re-entered: the turn that is going on does it
            elif not self.broken:
                try:
                    function()
                except BaseException:
                    self.broken = True
                    raise

    def _turn(self) -> None:
        if self.loop.is_running():
            return  # re-entered: the turn that is going on goes on with this
        if _running() is not None:
            # Our thread is inside a loop already: a blocking call in a notebook. Loops do not nest.
            _helper().submit(self._turn_here).result()
        else:
            self._turn_here()
        if self._late is not None:
            self.close(*self._late)

    def _turn_here(self) -> None:
        self._selector.turns = 0
        try:
            self.loop.run_forever()
        except BaseException:
            # KeyboardInterrupt in the midst of the client's own work: nobody can tell what that has left undone.
            self.broken = True
            raise
        sleep = self._selector.sleep
        self._due = float("inf") if sleep is None else time.monotonic() + sleep

    def steps(self, function: Callable[[], Coroutine[Any, Any, T]]) -> Steps[T]:
        return _task_steps(self, function)

    def wait(self, bell: int) -> Wait:
        return Wait(((self._epoll, select.POLLIN), (bell, select.POLLIN)), _AT_MOST)

    def rouse(self, bell: int) -> bool:
        return False  # who sleeps is a thread

    def roused(self) -> None:
        pass

    def close(self, farewell: Farewell, cut: Callable[[], None]) -> None:
        _care.leave(self)
        with self._mutex:
            if self.loop.is_closed():
                return
            if self.loop.is_running():
                self._late = farewell, cut
                return
            self._late = None
            if self.broken or not self._say(farewell):
                cut()
            self.broken = True
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.call_soon(_nothing)
            self._turn()
            self.loop.close()

    def _say(self, farewell: Farewell) -> bool:
        task = self.loop.create_task(_quietly(farewell))
        until = time.monotonic() + _FAREWELL
        self._turn()
        while not task.done() and time.monotonic() < until:
            self._peek.poll(max(min(self._due, until) - time.monotonic(), 0) * 1000)
            self._turn()
        return task.done()

    def abandon(self) -> None:
        # The epoll instance is shared with the parent, so nothing may be unregistered; and the numbers must stay taken,
        # because the objects that hold them will close them some day.
        self.broken = True
        if not self._selector.closed:  # else these numbers may be somebody else's by now
            forget([key.fd for key in self._selector.get_map().values()] + [self._epoll])


async def _quietly(farewell: Farewell) -> None:
    with contextlib.suppress(Exception):
        await farewell()


def _nothing() -> None:
    pass


async def _no_farewell() -> None:
    pass


def _task_steps(home: Home, function: Callable[[], Coroutine[Any, Any, T]]) -> Steps[T]:
    bell = Bell(home)
    tasks: list[asyncio.Task[T]] = []

    def done(task: asyncio.Task[T]) -> None:
        if not task.cancelled():
            task.exception()  # seen, even if these steps are over by now
        bell.ring()

    def begin() -> None:
        tasks.append(home.loop.create_task(function()))
        tasks[0].add_done_callback(done)

    home.do(begin)
    if not tasks:
        raise errors.ConfigError("the event loop of this endpoint does not run any more")
    try:
        while not tasks[0].done():
            wait = bell.arm()
            home.turn()
            if tasks[0].done():
                break
            yield wait
            home.turn()
        return tasks[0].result()
    finally:
        if not tasks[0].done():
            home.do(tasks[0].cancel)
        bell.close()


def forget(fds: list[int]) -> None:
    """Let go of descriptors whose owners cannot be told: each number then leads to nothing."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        for fd in fds:
            os.dup2(null, fd, inheritable=False)
    finally:
        os.close(null)


def _running() -> asyncio.AbstractEventLoop | None:
    return asyncio._get_running_loop()


# -- threads behind the scenes ------------------------------------------------------------------------------------


class _Caretaker:
    """Turns the homes that nobody turns. Its thread ends with the last of them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._homes = weakref.WeakSet[Driven]()
        self._thread: threading.Thread | None = None

    def take(self, home: Driven) -> None:
        with self._changed:
            self._homes.add(home)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ipckit-caretaker", daemon=True)
                self._thread.start()

    def leave(self, home: Driven) -> None:
        with self._changed:
            self._homes.discard(home)
            thread = None if self._homes else self._thread
            self._changed.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_TICK)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._homes:
                    self._changed.wait(_TICK)
                if not self._homes:
                    self._thread = None
                    return
                homes = list(self._homes)
            now = time.monotonic()
            for home in homes:
                if now - home.turned >= _TICK * 0.75:
                    home.turn()
            del homes

    def close(self) -> None:
        """At the end of the program: channels that were left open must not litter it with the client's complaints."""
        for home in list(self._homes):
            home.close(_no_farewell, _nothing)


_care = _Caretaker()
_executor: concurrent.futures.ThreadPoolExecutor | None = None


def _helper() -> concurrent.futures.ThreadPoolExecutor:
    global _executor
    if _executor is None:
        _executor = concurrent.futures.ThreadPoolExecutor(1, "ipckit-turn")
    return _executor


def _in_child_of_fork() -> None:
    global _care, _executor
    _care, _executor = _Caretaker(), None


os.register_at_fork(after_in_child=_in_child_of_fork)
atexit.register(lambda: _care.close())
