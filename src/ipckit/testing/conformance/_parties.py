"""Who talks in a contract: a `Party` opens endpoints and works on them, here or in a spawned process, in one of two shells.

A contract is written once, as plain code over `End`s. What an end does goes through `start`, which returns a future, so that
a contract can have one side blocked while it does something to the other; `call` is `start` and a wait with a watchdog.
What needs speed or a loop of its own is a *program*: an `async def` over endpoints, written once as well. On an event loop it is
a task; in a thread it is driven by hand, over a wrapper whose verbs never suspend.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any, Literal, Protocol, TypeVar

import ipckit
import ipckit.aio
from ipckit._endpoint import Endpoint

T = TypeVar("T")
ShellName = Literal["sync", "async"]

#: Seconds after which a call counts as hung. No contract waits that long on purpose.
HANG = 30.0


class Pending(Future[T]):
    """A future that tells, when it is not done in time, what everybody is doing instead."""

    def result(self, timeout: float | None = None) -> T:
        try:
            return super().result(timeout)
        except TimeoutError:
            if self.done():  # with a timeout of its own
                raise
        raise AssertionError(
            f"it hangs: nothing within {timeout} s\n\n" + "\n\n".join(tell() for tell in set(WITNESSES))
        )


def stacks() -> str:
    """Where each thread of this process stands, and each task of its loops."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    told = []
    for number, frame in sys._current_frames().items():
        told.append(f"-- thread {names.get(number, number)}\n" + "".join(traceback.format_stack(frame)[-8:]))
    for task in (task for loop in tuple(_loops) for task in asyncio.all_tasks(loop)):
        told.append(f"-- {task!r}\n" + "".join(f"  {frame}\n" for frame in task.get_stack()))
    return "\n".join(told)


_loops: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
#: Who can say what is going on in a process.
WITNESSES: set[Callable[[], str]] = {stacks}


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run `work` on a thread of its own, which dies with the process should it hang."""
    future: Future[T] = Pending()

    def body() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


class Blocking:
    """A synchronous endpoint with the verbs of an asynchronous one: they block, and never suspend."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._raw, name)
        if not callable(found) or name in ("stats", "fileno"):
            return found

        async def verb(*args: Any, **named: Any) -> Any:
            result = found(*args, **named)
            return Blocking(result) if isinstance(result, ipckit.Channel) else result

        return verb

    @asynccontextmanager
    async def loan(self, size: int, timeout: float | None = None) -> AsyncIterator[memoryview]:
        with self._raw.loan(size, timeout) as view:
            yield view

    @asynccontextmanager
    async def borrow(self, timeout: float | None = None) -> AsyncIterator[memoryview]:
        with self._raw.borrow(timeout) as view:
            yield view

    async def __aenter__(self) -> Blocking:
        self._raw.__enter__()
        return self

    async def __aexit__(self, *about: Any) -> None:
        self._raw.__exit__(*about)

    async def __aiter__(self) -> Any:
        for value in self._raw:
            yield value


def finish(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("a blocking program suspended")


class Shell(Protocol):
    """Where endpoints are used from."""

    api: Any  # ipckit or ipckit.aio

    def verb(self, target: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]: ...
    def program(self, program: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...]) -> Future[T]: ...
    def close(self) -> None: ...


class Threads:
    """`ipckit`: every call on a thread of its own."""

    api: Any = ipckit

    def verb(self, target: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
        return in_thread(lambda: getattr(target, name)(*args, **named))

    def program(self, program: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...]) -> Future[T]:
        return in_thread(lambda: finish(program(*(Blocking(arg) if _is_endpoint(arg) else arg for arg in args))))

    def close(self) -> None:
        pass


class Loop:
    """`ipckit.aio`: every call as a task on one loop, which has a thread to itself."""

    api: Any = ipckit.aio

    def __init__(self) -> None:
        self.failures: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        _loops.add(self._loop)
        self._loop.set_exception_handler(lambda _loop, context: self.failures.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def verb(self, target: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
        async def call() -> Any:
            result = getattr(target, name)(*args, **named)
            return await result if inspect.isawaitable(result) else result

        return _then(asyncio.run_coroutine_threadsafe(call(), self._loop))

    def program(self, program: Callable[..., Coroutine[Any, Any, T]], args: tuple[Any, ...]) -> Future[T]:
        return _then(asyncio.run_coroutine_threadsafe(program(*args), self._loop))

    def close(self) -> None:
        async def wind_up() -> None:
            await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(wind_up(), self._loop).result(HANG)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(HANG)
        self._loop.close()
        assert not self.failures, f"the event loop met exceptions that nobody caught: {self.failures}"


def shell_of(name: ShellName) -> Shell:
    return Threads() if name == "sync" else Loop()


def _is_endpoint(value: object) -> bool:
    return isinstance(value, Endpoint)


class Party(Protocol):
    """Somebody who opens endpoints and uses them."""

    def open(self, verb: str, url: str | End, **named: Any) -> Future[End]:
        """`url`: or a channel of this party, whose link the new endpoint takes over."""

    def accept(self, listener: End, timeout: float) -> Future[End]: ...
    def verb(self, end: End, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]: ...
    def run(self, program: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Run a program; Ends among `args` become their endpoints."""

    def adopt(self, channel: Any) -> Future[End]:
        """Take over a channel that was made elsewhere."""

    def close(self) -> None: ...


class End:
    """An endpoint of a party: its verbs, each with a watchdog; `start` to have one under way."""

    def __init__(self, party: Party, handle: Any, url: str) -> None:
        self.party = party
        self.handle = handle
        self.url = url

    def start(self, name: str, *args: Any, **named: Any) -> Future[Any]:
        return self.party.verb(self, name, args, named)

    def call(self, name: str, *args: Any, **named: Any) -> Any:
        return self.start(name, *args, **named).result(HANG)

    def send(self, value: Any, timeout: float | None = 10, priority: int = 0) -> None:
        self.call("send", value, timeout, priority)

    def recv(self, timeout: float | None = 10) -> Any:
        return self.call("recv", timeout)

    def accept(self, timeout: float = 10) -> End:
        return self.party.accept(self, timeout).result(HANG)

    def run(self, program: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        return self.party.run(program, self, *args)

    def close(self) -> None:
        self.call("close")


class Local:
    """A party in this process."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.ends: list[End] = []

    def open(self, verb: str, url: str | End, **named: Any) -> Future[End]:
        where = url.handle if isinstance(url, End) else url
        return _then(self.shell.verb(self.shell.api, verb, (where,), named), self._end)

    def pair(self, url: str) -> tuple[End, End]:
        left, right = self.shell.verb(self.shell.api, "pair", (url,), {}).result(HANG)
        return self._end(left), self._end(right)

    def accept(self, listener: End, timeout: float) -> Future[End]:
        return _then(self.shell.verb(listener.handle, "accept", (timeout,), {}), self._end)

    def adopt(self, channel: Any) -> Future[End]:
        return in_thread(lambda: self._end(channel))

    def verb(self, end: End, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
        return self.shell.verb(end.handle, name, args, named)

    def run(self, program: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        return self.shell.program(program, tuple(arg.handle if isinstance(arg, End) else arg for arg in args))

    def close(self) -> None:
        for end in self.ends:
            end.close()
        self.ends.clear()
        self.shell.close()

    def _end(self, raw: Any) -> End:
        end = End(self, raw, raw.url.reveal())
        self.ends.append(end)
        return end


def _then(future: Future[Any], make: Callable[[Any], T] = lambda result: result) -> Future[T]:
    after: Future[T] = Pending()

    def done(first: Future[Any]) -> None:
        try:
            after.set_result(make(first.result()))
        except BaseException as error:
            after.set_exception(error)

    future.add_done_callback(done)
    return after
