"""Serving from an event loop: the server of `server.py`, awaited.

    async with ipckit.aio.Server("unix://shop", Shop()) as server: ...
    await ipckit.aio.serve("unix://shop", Shop())       # until it is cancelled, or SIGTERM

The loop receives; coroutines are its tasks. Functions run on threads, unless they are marked `inline=True`.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from .. import errors
from .._url import Url
from .._wait import arun
from ..channel import AsyncChannel, Channel
from ._limits import ServerOptions, ShutdownReport
from ._place import Place, native_class
from .server import BaseServer, Options, ServerInterceptor, check_server


class AsyncServer(BaseServer):
    """`Server`, awaited: it listens once it has been awaited or entered."""

    def __new__(cls, where: Any, /, *_: Any, **__: Any) -> Self:
        """Of the transport's own class, where it makes calls its own way."""
        native: type[Self] | None = native_class(where, "AsyncServer") if cls is AsyncServer else None
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
        self._serving = ServerOptions(
            workers,
            max_connections,
            max_concurrent,
            max_per_connection,
            tracebacks,
            connection_timeout,
            requests_per_second,
            burst_size,
        )
        self._opened = Place(where, require, "serve")
        self.url = self._opened.url
        self._services = services
        self._interceptors = tuple(interceptors)
        self._timeout = timeout
        self._watcher: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        """What there is only when it listens."""
        if name == "_engine":
            raise errors.ConfigError(
                "this server does not listen yet",
                url=self.url,
                hint="await it, or enter it by `async with`, before you use it",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __await__(self) -> Generator[Any, None, Self]:
        return self._open().__await__()

    async def _open(self) -> Self:
        check_server(self._services, self._interceptors)
        listener = await self._opened.arun(self._opened.listen(), self._timeout)
        try:
            super().__init__(self._opened, listener, self._services, self._serving, self._interceptors, threads=False)
        except BaseException:
            listener.close()
            raise
        loop = asyncio.get_running_loop()
        self._engine.loop = lambda: loop
        self._watcher = loop.create_task(self._watch(), name=f"ipckit server {self.url}")
        return self

    async def _watch(self) -> None:
        try:
            await arun(self._engine.watching(), self._watcher_lane, None)
            await self.close()  # it had one client, who has left
        except errors.Closed:
            pass
        except Exception as error:  # ours, or the machine's: nothing of the user's gets here
            self._engine.failing(error)
            await self.close()

    async def wait(self, timeout: float | None = None) -> bool:
        """Until the server has ended. False when it still runs after `timeout` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), timeout)
        return self._ended.is_set()

    async def shutdown(self, drain: float = 5) -> ShutdownReport:
        """Take no new calls, let those under way finish for `drain` seconds, cut off the rest, and end."""
        if self._report is not None or self.closed:
            return self._report or ShutdownReport(0, 0, 0)
        drained, loop = asyncio.Event(), asyncio.get_running_loop()
        self._engine.on_drained = partial(loop.call_soon_threadsafe, drained.set)
        started = self._engine.stop()
        if not self._engine.drained():
            with suppress(TimeoutError):
                await asyncio.wait_for(drained.wait(), drain)
        forced = self._engine.abort()
        self._report = ShutdownReport(started, max(started - forced, 0), forced)
        await self.close()
        return self._report

    async def close(self) -> None:
        """End at once."""
        self._close()
        self._watcher_gate.close()
        tasks = tuple(self._engine.tasks)
        for task in tasks:
            task.cancel()
        if self._watcher is not None and self._watcher is not asyncio.current_task():
            tasks += (self._watcher,)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._engine.crew.close(0.1)
        self._ended.set()

    async def __aenter__(self) -> Self:
        return self if self._watcher is not None else await self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()


async def aserve(
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    /,
    *services: Any,
    drain: float = 5,
    ready: Callable[[AsyncServer], None] | None = None,
    **options: Unpack[Options],
) -> ShutdownReport:
    """`serve`, awaited: until SIGTERM, or until it is cancelled; calls under way are given `drain` seconds in both cases.

    Over a channel: until its one client has left.
    """
    server = await AsyncServer(where, *services, **options)
    loop = asyncio.get_running_loop()
    ended = loop.create_task(server.wait())
    main = threading.current_thread() is threading.main_thread()
    if main:
        loop.add_signal_handler(signal.SIGTERM, ended.cancel)
    try:
        if ready is not None:
            ready(server)
        await asyncio.wait([ended])
    finally:
        ended.cancel()
        if main:
            loop.remove_signal_handler(signal.SIGTERM)
        report = await server.shutdown(drain)
    return report
