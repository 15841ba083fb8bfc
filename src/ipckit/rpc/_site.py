"""The side that runs handlers, for a server whose transport has calls of its own (gRPC).

Such a transport brings bytes to their procedure by itself; what it needs of us is the table of services, and a `Handling` for
each call: limits, `current()`, interceptors, cancellation, what is counted and logged, and what becomes of an exception.

    handling = site.begin(exposed, arrival)                     # raises TargetBusy, ShuttingDown
    try:
        value = handling.run(lambda: decode(body))              # on this thread; `stream` for a stream of results
    except BaseException as error:
        failure = handling.fail(error)                          # to tell the caller
    finally:
        handling.close()

A coroutine of a server of threads runs on the server's own loop; a function of a server on a loop runs on a thread of the crew,
unless it is marked inline.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import msgspec

from .. import errors
from .._url import Url
from . import events, failures
from ._arrival import Arrival, Arrived
from ._bridges import FromLoop, FromThread, OnLoop
from ._crew import Crew, on_crew
from ._exposed import BUILT_IN, Exposed, Services
from ._intercepting import around, awaited, checked, settled, to_be_awaited
from ._limits import COUNTS, ServerOptions, statistics
from ._tracing import enter
from .context import CallContext, overdue

_log = logging.getLogger("ipckit")
#: Pushes that may wait for a subscriber that does not read; what comes then is dropped, and counted.
_BACKLOG = 1000

#: Of all counts, those that are ours to make.
_COUNTED = ("calls", "errors", "pushes", "pushes_dropped", "shutdown_rejections", "backpressure_rejections")

Arguments = Callable[[], tuple[Any, ...]]


class Site:
    """What is served: services, limits, counts, subscribers. It is an Endpoint's resource; the transport's `server` is in it."""

    def __init__(self, url: Url, options: ServerOptions, interceptors: Sequence[Callable[..., Any]]) -> None:
        self.url = url
        self.options = options
        self.interceptors = checked(interceptors)
        self.awaited = to_be_awaited(interceptors)
        self.crew = Crew(options.workers, f"ipckit-{url.scheme}-server")
        self.services = Services()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.loop: Callable[[], asyncio.AbstractEventLoop] | None = None
        self.native: Any = None
        self.on_close: Callable[[], None] = lambda: None
        self.on_abandon: Callable[[], None] = lambda: None
        self.stopping = False
        self.idle = threading.Event()  # while it is stopping: nothing is under way any more
        self.on_idle: Callable[[], object] = self.idle.set
        self._mutex = threading.Lock()
        self._under_way: set[Handling] = set()
        self._subscribers: set[Subscriber] = set()

    def close(self) -> None:
        self.stopping = True
        self.abort()
        self._dismiss()
        self.on_close()

    def abandon(self) -> None:
        """In a forked child."""
        self.on_abandon()

    # -- services ------------------------------------------------------------------------------------------------------

    def find(self, target: str, method: str) -> Exposed:
        """Raises UnknownTarget, UnknownMethod. `method` may be a message type."""
        found = self.services.find(target, method)
        if found is None:
            if target not in self.services.contracts:
                raise errors.UnknownTarget(f"nothing is exposed as {target!r}", url=self.url)
            raise errors.UnknownMethod(f"{target!r} has no method {method!r}", url=self.url)
        return found

    def fingerprints(self) -> dict[str, str]:
        return self.services.fingerprints()

    # -- calls ---------------------------------------------------------------------------------------------------------

    def begin(self, exposed: Exposed, arrival: Arrival) -> Handling:
        """One more call. Raises TargetBusy, ShuttingDown."""
        handling = Handling(self, exposed, arrival)
        if exposed.target == BUILT_IN:  # a question, or a subscription: it holds nothing up
            return handling
        with self._mutex:
            if self.stopping:
                self.counts["shutdown_rejections"] += 1
                raise errors.ShuttingDown("the server is shutting down", url=self.url)
            if len(self._under_way) >= self.options.max_concurrent:
                self.counts["backpressure_rejections"] += 1
                raise errors.TargetBusy(f"{len(self._under_way)} calls are under way", url=self.url)
            self._under_way.add(handling)
        return handling

    def ended(self, handling: Handling) -> None:
        with self._mutex:
            if handling not in self._under_way:
                return
            self._under_way.discard(handling)
            self.counts["calls"] += 1
            last = self.stopping and not self._under_way
        if last:
            self.on_idle()

    def failed(self, context: CallContext, error: BaseException) -> None:
        """A handler raised: the caller is told the type and the text; here it is logged whole."""
        self.counts["errors"] += 1
        _log.warning("%s: %s.%s raised", self.url, context.target, context.method, exc_info=error)

    @property
    def in_flight(self) -> int:
        return len(self._under_way)

    def stats(self) -> Mapping[str, int]:
        """Without what only the transport could count."""
        own = {name: self.counts[name] for name in _COUNTED}
        return statistics({**own, "in_flight": self.in_flight, "subscribers": len(self._subscribers)})

    # -- subscribers ---------------------------------------------------------------------------------------------------

    def subscribe(self, types: Sequence[str], wake: Callable[[], None]) -> Subscriber:
        """`wake` is called, on any thread, when there is a push, and when the server shuts down."""
        made = Subscriber(frozenset(types), wake)
        with self._mutex:
            self._subscribers.add(made)
        return made

    def unsubscribe(self, subscriber: Subscriber) -> None:
        with self._mutex:
            self._subscribers.discard(subscriber)

    def broadcast(self, type: str, value: Any) -> int:
        """To how many it went."""
        push = events.Push(type, msgspec.msgpack.encode(value))
        with self._mutex:
            audience = [each for each in self._subscribers if type in each.types]
        reached = sum(each.offer(push) for each in audience)
        self.counts["pushes"] += reached
        self.counts["pushes_dropped"] += len(audience) - reached
        return reached

    # -- ends ----------------------------------------------------------------------------------------------------------

    def stop(self) -> int:
        """Take no new calls. Returns how many are under way."""
        self._dismiss()
        with self._mutex:
            self.stopping = True
            left = len(self._under_way)
        if not left:
            self.on_idle()
        return left

    def _dismiss(self) -> None:
        with self._mutex:
            subscribers, self._subscribers = self._subscribers, set()
        for each in subscribers:
            each.over = True
            each.wake()

    def abort(self) -> int:
        """Cut off what is still under way. Returns how many."""
        with self._mutex:
            left = tuple(self._under_way)
        for each in left:
            each.cancel("shutdown")
        return len(left)


class Subscriber:
    """Pushes on their way to one subscription. `over`: there will be no more."""

    def __init__(self, types: frozenset[str], wake: Callable[[], None]) -> None:
        self.types, self.wake = types, wake
        self.over = False
        self.pushes: deque[events.Push] = deque()

    def offer(self, push: events.Push) -> bool:
        if len(self.pushes) >= _BACKLOG:
            return False
        self.pushes.append(push)
        self.wake()
        return True


class Handling:
    """One call and its handler."""

    __slots__ = ("_reading", "_task", "context", "exposed", "site")

    def __init__(self, site: Site, exposed: Exposed, arrival: Arrival) -> None:
        self.site, self.exposed = site, exposed
        self.context = Arrived(exposed, arrival)
        self._task: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._reading: FromThread | None = None

    def cancel(self, why: str) -> None:
        """Nobody waits for it any more. From any thread: the handler finds out, and its task is cancelled."""
        self.context.decide(why)
        if self._task is not None:
            loop, task = self._task
            with suppress(RuntimeError):  # the loop is closed, and with it the task
                loop.call_soon_threadsafe(task.cancel)

    def fail(self, error: BaseException) -> events.Failure:
        """What to tell the caller. What is not of ipckit's own is logged."""
        if isinstance(error, asyncio.CancelledError | concurrent.futures.CancelledError):
            error = errors.Cancelled("the handler was cancelled")
        if self.context.why == "shutdown":
            error = errors.ShuttingDown("the server shut down before the call was done")
        failure = failures.failure_of(0, error, self.site.options.tracebacks)
        if failure.code == "REMOTE_ERROR":
            self.site.failed(self.context, error)
        return failure

    def close(self) -> None:
        """The call is over. Once."""
        self.context.let_go()
        if self._reading is not None:
            self._reading.close()
        self.site.ended(self)

    def _invoke(self, arguments: Arguments, inputs: Any) -> Any:
        exposed = self.exposed
        args = arguments()
        if not self.site.interceptors or exposed.open:
            return exposed.method.invoke(exposed.function, args, inputs)
        proceed: Callable[[], Any] = lambda: exposed.method.invoke(exposed.function, args, inputs)  # noqa: E731
        if self.site.awaited:
            proceed = partial(awaited if exposed.method.coroutine else self._on_crew, proceed)
        return around(self.site.interceptors, self.context, proceed)()

    @property
    def _on_loop(self) -> bool:
        """The handler is a coroutine, or what is around it."""
        return self.exposed.method.coroutine or (self.site.awaited and not self.exposed.open)

    # -- for a transport that has threads; it calls in a `contextvars` context of the call's own -------------------------

    def run(self, arguments: Arguments, inputs: Iterator[Any] | None = None) -> Any:
        """The result, on this thread or, of a coroutine, from the server's loop. `inputs`: items that the caller streams."""
        if self._on_loop:
            loop = self._own_loop()
            return self._on(loop, self._coroutine(arguments, self._inputs(inputs)))
        enter(self.context)
        return self._in_time(self._invoke(arguments, inputs))

    def plainly(self, args: tuple[Any, ...]) -> Any:
        """`run`, of a function that takes these arguments as they are, and without interceptors."""
        enter(self.context)
        return self._in_time(self.exposed.function(*args))

    def _in_time(self, value: Any) -> Any:
        """A result that comes after the deadline is none, though the caller may not have noticed yet."""
        if self.context.late:
            raise overdue()
        return value

    def stream(self, arguments: Arguments, inputs: Iterator[Any] | None = None) -> Iterator[Any]:
        """The results. Closing it closes the handler's generator."""
        if self._on_loop:
            results = FromLoop(self._own_loop(), self._asynchronous(arguments, self._inputs(inputs)), self._started)
            try:
                yield from results
            finally:
                results.close()
            return
        enter(self.context)
        results = iter(self._invoke(arguments, inputs))
        try:
            yield from results
        finally:
            close = getattr(results, "close", None)
            if close is not None:
                close()

    def _inputs(self, inputs: Iterator[Any] | None) -> Any:
        """For a coroutine; a function reads them as they are."""
        if inputs is None or not self.exposed.method.coroutine:
            return inputs
        self._reading = FromThread(inputs, self.site.crew.submit)
        return self._reading

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        assert self.site.loop is not None
        return self.site.loop()

    def _on(self, loop: asyncio.AbstractEventLoop, coroutine: Any) -> Any:
        async def followed() -> Any:
            self._started(loop)
            return await coroutine

        future = asyncio.run_coroutine_threadsafe(followed(), loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _started(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the task that may be cancelled."""
        task = asyncio.current_task()
        assert task is not None
        self._task = loop, task
        if self.context.why is not None:
            task.cancel()

    # -- for a transport on a loop -------------------------------------------------------------------------------------

    def arun(self, arguments: Arguments, inputs: AsyncIterator[Any] | None = None) -> Awaitable[Any]:
        """The result. The caller's task is the handler's: cancelling it is `cancel`."""
        if self._on_loop:
            return self._coroutine(arguments, self._ainputs(inputs))
        return self._function(arguments, inputs)

    def _ainputs(self, inputs: AsyncIterator[Any] | None) -> Any:
        """For a coroutine as they are, for a function on a thread."""
        if inputs is None or self.exposed.method.coroutine:
            return inputs
        return OnLoop(inputs, asyncio.get_running_loop())

    async def _function(self, arguments: Arguments, inputs: AsyncIterator[Any] | None) -> Any:
        method = self.exposed.method
        if method.options.inline and inputs is None:
            return self.run(arguments)
        readable = self._ainputs(inputs)
        return await self._on_crew(lambda: self.run(arguments, readable))

    async def astream(self, arguments: Arguments, inputs: AsyncIterator[Any] | None = None) -> AsyncIterator[Any]:
        """The results. Closing it closes the handler's generator."""
        if self._on_loop:
            results: Any = self._asynchronous(arguments, self._ainputs(inputs))
        else:
            results = FromThread(self.stream(arguments, self._ainputs(inputs)), self.site.crew.submit)
        async with aclosing(results):
            async for value in results:
                yield value

    async def _coroutine(self, arguments: Arguments, inputs: Any) -> Any:
        enter(self.context)
        return self._in_time(await settled(self._invoke(arguments, inputs)))

    async def _asynchronous(self, arguments: Arguments, inputs: Any) -> AsyncIterator[Any]:
        enter(self.context)
        results = await settled(self._invoke(arguments, inputs))
        if not hasattr(results, "__aiter__"):
            results = FromThread(iter(results), self.site.crew.submit)
        try:
            async for value in results:
                yield value
        finally:
            if hasattr(results, "aclose"):
                await results.aclose()

    async def _on_crew(self, work: Callable[[], Any]) -> Any:
        """Nobody waits for a function whose caller is gone; it goes on by itself, and `current().cancelled` tells it."""
        try:
            return await on_crew(self.site.crew, work)
        except asyncio.CancelledError:
            self.cancel("cancelled")
            raise


__all__ = ["BUILT_IN", "Handling", "Site", "Subscriber"]
