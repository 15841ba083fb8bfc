"""Serving from threads.

    ipckit.serve("unix://shop", Shop())                 # until Ctrl-C or SIGTERM

    with ipckit.Server("unix://shop", Shop()) as server:  # in the background
        server.broadcast(PriceChanged("tea", 3))
        ...
        print(server.shutdown(drain=5))

Functions run on threads, coroutines on an event loop that the server keeps for them. `_engine` tells how.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self, TypedDict, Unpack

from .. import errors
from .._endpoint import Endpoint
from .._spi import Listener
from .._url import Url
from .._wait import Gate, Lane, run
from ..channel import AsyncChannel, Channel
from ._engine import Engine
from ._exposed import servable
from ._intercepting import checked
from ._limits import ServerOptions, ShutdownReport
from ._place import Place, native_class
from .contract import target_name

#: `interceptor(call, proceed)`: `call` is the `CallContext`; returns what `proceed()` returns (awaitable for coroutines).
#: It may be a coroutine function, which awaits `proceed()` whatever the handler is.
ServerInterceptor = Callable[[Any, Callable[[], Any]], Any]


class Options(TypedDict, total=False):
    """What `serve` passes on to `Server`."""

    timeout: float | None
    workers: int
    max_connections: int
    max_concurrent: int
    max_per_connection: int
    tracebacks: bool
    connection_timeout: float | None
    requests_per_second: float | None
    burst_size: int | None
    interceptors: Sequence[ServerInterceptor]
    require: Collection[str]


class BaseServer(Endpoint):
    """What both shells have."""

    def __init__(
        self,
        opened: Place,
        listener: Listener,
        services: Sequence[Any],
        options: ServerOptions,
        interceptors: Sequence[ServerInterceptor],
        *,
        threads: bool,
    ) -> None:
        self._engine = Engine(listener.url, listener, options, interceptors, threads=threads)
        super().__init__(self._engine, listener.url, opened.capabilities)
        self._watcher_gate = Gate(self.url, self._engine.release)
        self._watcher_gate.prepare()
        self._watcher_lane = Lane(self._watcher_gate, "serve")
        self._report: ShutdownReport | None = None
        for service in services:
            self._engine.services.expose(target_name(service), service)

    def expose(self, name: str, service: Any) -> None:
        """Make a service callable under this name, from now on; it replaces what had the name. Raises ConfigError."""
        if not name or "." in name or name == "ipckit":
            raise errors.BadOption(f"{name!r} is no name for a target", url=self.url, operation="expose")
        self._engine.services.expose(name, service)

    def hide(self, name: str) -> None:
        """Take the name away. Calls under way are finished. Raises UnknownTarget."""
        self._engine.services.hide(name)

    def broadcast(self, value: Any, *, type: str | None = None) -> int:
        """Push a message to every client that subscribed to its type (its class's name). Returns to how many.

        A client that does not read is sent no more pushes until it does: `stats()["pushes_dropped"]`.
        """
        return self._engine.broadcast(type or value.__class__.__name__, value)

    def register(self, *types: type | str) -> None:
        """Make known that messages of these types are pushed. `broadcast` does it for what it is given; this does it before."""
        for each in types:
            self._engine.services.register(each if isinstance(each, str) else each.__name__)

    def is_registered(self, name: str) -> bool:
        """Something answers to messages of this type (or is a method of this name), or they are pushed."""
        return self._engine.services.is_registered(name)

    def registered_types(self) -> tuple[str, ...]:
        """The types of messages that are answered or pushed, and the methods that take arguments instead of a message."""
        return tuple(self._engine.services.message_types())

    def targets(self) -> tuple[str, ...]:
        """What is exposed."""
        return tuple(self._engine.services.fingerprints())

    def stats(self) -> Mapping[str, int]:
        """Counts since the start: connections, messages, calls, errors, refusals, pushes; and what is under way now.

        Some stand there twice, under the names of the envelope protocol as well: docs/howto/listener.md lists them.
        """
        return self._engine.stats()


def check_server(services: Sequence[Any], interceptors: Sequence[ServerInterceptor]) -> None:
    """Before anything is opened. Raises ConfigError, BadOption."""
    for service in services:
        servable(service)
    checked(interceptors)


class Server(BaseServer):
    """A server in the background of this process. See `serve` for the arguments; `timeout` is for taking the address."""

    def __new__(cls, where: Any, /, *_: Any, **__: Any) -> Self:
        """Of the transport's own class, where it makes calls its own way."""
        native: type[Self] | None = native_class(where, "Server") if cls is Server else None
        return object.__new__(native or cls)

    def __init__(
        self,
        where: str | Url | Channel[Any] | AsyncChannel[Any],
        /,
        *services: Any,
        timeout: float | None = None,
        workers: int = 64,
        max_connections: int = 10_000,
        max_concurrent: int = 10_000,
        max_per_connection: int = 1000,
        tracebacks: bool = False,
        connection_timeout: float | None = 30.0,
        requests_per_second: float | None = None,
        burst_size: int | None = None,
        interceptors: Sequence[ServerInterceptor] = (),
        require: Collection[str] = (),
    ) -> None:
        check_server(services, interceptors)
        options = ServerOptions(
            workers,
            max_connections,
            max_concurrent,
            max_per_connection,
            tracebacks,
            connection_timeout,
            requests_per_second,
            burst_size,
        )
        opened = Place(where, require, "serve")
        listener = opened.run(opened.listen(), timeout)
        try:
            super().__init__(opened, listener, services, options, interceptors, threads=True)
        except BaseException:
            listener.close()
            raise
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loop_thread: threading.Thread | None = None
        self._loop_mutex = threading.Lock()
        self._engine.loop = self._own_loop
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"ipckit-{self.url.scheme}-watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            run(self._engine.watching(), self._watcher_lane, None)
            self.close()  # it had one client, who has left
        except errors.Closed:
            pass
        except Exception as error:  # ours, or the machine's: nothing of the user's gets here
            self._engine.failing(error)
            self.close()
        finally:
            self._watcher_gate.close()

    def _own_loop(self) -> asyncio.AbstractEventLoop:
        with self._loop_mutex:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop_thread = threading.Thread(
                    target=self._loop.run_forever, name=f"ipckit-{self.url.scheme}-loop", daemon=True
                )
                self._loop_thread.start()
            return self._loop

    def wait(self, timeout: float | None = None) -> bool:
        """Until the server has ended. False when it still runs after `timeout` seconds."""
        return self._ended.wait(timeout)

    def shutdown(self, drain: float = 5) -> ShutdownReport:
        """Take no new calls, let those under way finish for `drain` seconds, cut off the rest, and end."""
        if self._report is not None or self.closed:
            return self._report or ShutdownReport(0, 0, 0)
        deadline = time.monotonic() + drain
        drained = threading.Event()
        self._engine.on_drained = drained.set
        started = self._engine.stop()
        while not self._engine.drained() and (left := deadline - time.monotonic()) > 0:
            drained.wait(min(left, 0.02))  # what runs on the thread that received it says nothing at its end
        forced = self._engine.abort()
        self._report = ShutdownReport(started, max(started - forced, 0), forced)
        self.close()
        return self._report

    def close(self) -> None:
        """End at once: callers hear ShuttingDown or a closed connection. Idempotent."""
        self._close()
        self._watcher_gate.close()
        if self._gate.foreign:  # a forked child has none of the threads
            return
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        with self._loop_mutex:
            loop, thread = self._loop, self._loop_thread
            self._loop = None
        if loop is not None and thread is not None:
            _end_loop(loop, thread)
        self._engine.crew.close(0.5)
        self._ended.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    async def wind_up() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await loop.shutdown_asyncgens()

    with suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(wind_up(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    if not thread.is_alive():
        loop.close()


def serve(
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    /,
    *services: Any,
    drain: float = 5,
    ready: Callable[[Server], None] | None = None,
    **options: Unpack[Options],
) -> ShutdownReport:
    """Serve until Ctrl-C or SIGTERM, then let the calls under way finish for `drain` seconds.

    Args:
        where: the URL to be reached at; or a channel (one end of a `pair`, an accepted one): its peer is the one client, and
            the server ends with it.
        services: Service instances, functions marked with `@ipckit.rpc`, or objects with such methods. Each is exposed under its
            class's name in lower case (a function under its own).
        ready: called with the server once it can be reached.
        options: those of `Server`: `timeout` (seconds for taking the address), `workers`, `max_connections`, `max_concurrent`,
            `max_per_connection`, `tracebacks`, `connection_timeout`, `requests_per_second`, `burst_size` (`ServerOptions` tells
            what they mean), `interceptors`, `require`.

    Raises: AddressInUse, and what opening a transport raises; ConfigError for a service whose annotations cannot be read.
    """
    server = Server(where, *services, **options)
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    before: Any = None
    main = threading.current_thread() is threading.main_thread()
    if main:
        before = signal.signal(signal.SIGTERM, stop)
    try:
        if ready is not None:
            ready(server)
        with suppress(KeyboardInterrupt):
            while not stopped.is_set() and not server.wait(0):
                stopped.wait(1)
        return server.shutdown(drain)
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        server.close()
