"""Calls from tasks: the client of `client.py`, awaited.

    async with await ipckit.aio.client("unix://shop", Shop) as shop:
        await shop.price("tea")
        async for price in shop.watch("tea"): ...

Any number of tasks may use one client at once. A task of its own receives for all of them while the client is open, and
flushes what the machine has to say. Editors and mypy see the contract as it is written: for calls that are awaited, declare
its methods `async def`, and streams as `AsyncIterator`; a contract of plain functions works as well, and is typed as what it
will be when it is awaited.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from .. import errors
from .._url import Url
from .._wait import arun
from ..channel import AsyncChannel, Channel
from ._aresults import AsyncResults, AsyncSubscription, Later
from ._calling import DESCRIBE, Base, Live
from ._clientcore import ClientCall
from ._connection import BROKEN
from ._exposed import BUILT_IN
from ._intercepting import awaited, to_be_awaited
from ._place import native_class
from ._proxy import P, R, Remote, make_proxy
from ._request import CallOptions, Interceptor, Request, Subscribed, encoded
from .client import PATIENCE
from .contract import Method, unwritable

S = TypeVar("S")


class AsyncClient(Base):
    """A connection to a server that is made again when it is lost. See `client` for the arguments; open it with `await`."""

    def __init__(
        self,
        where: str | Url | Channel[Any] | AsyncChannel[Any],
        /,
        *,
        timeout: float | None = PATIENCE,
        call_timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        interceptors: Sequence[Interceptor] = (),
        require: Collection[str] = (),
    ) -> None:
        super().__init__(
            where,
            timeout=timeout,
            call_timeout=call_timeout,
            metadata=metadata,
            interceptors=interceptors,
            require=require,
        )
        self._awaited = to_be_awaited(interceptors)
        self._dialing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __new__(cls, where: Any, /, **_: Any) -> Self:
        """Of the transport's own class, where it makes calls its own way."""
        native: type[Self] | None = native_class(where, "AsyncClient") if cls is AsyncClient else None
        return object.__new__(native or cls)

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def call(
        self,
        target: str,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **named: Any,
    ) -> Any:
        """`Client.call`, awaited; for a method that streams it returns an asynchronous iterator."""
        began, options = time.monotonic(), self._options.with_(timeout, metadata)
        found = self._known(target, method)
        if found is None:
            await self._ask_about(target, options)
            found = self._known(target, method)
        if found is None:
            raise self._unheard_of(target, method)
        with self._as_it_was_described(target):
            result = self._call(target, found, args, named, options.since(began))
            return result if found.shape.streams_out else await result

    async def _ask_about(self, target: str, options: CallOptions) -> None:
        self._described[target] = await self._perform(self._request(BUILT_IN, DESCRIBE, (target,), {}, options))

    def _caller(self, target: str, method: Method, options: CallOptions) -> Callable[..., Any]:
        return lambda *args, **named: self._call(target, method, args, named, options)

    def _call(
        self, target: str, method: Method, args: tuple[Any, ...], named: dict[str, Any], options: CallOptions
    ) -> Any:
        request = self._request(target, method, args, named, options)
        if not method.shape.streams_out:
            return self._intercepted(request, partial(self._perform, request))
        results = partial(self._results, request)
        if not self._awaited:
            return self._intercepted(request, results)
        return Later(self._intercepted(request, partial(awaited, results)))

    def _results(self, request: Request) -> AsyncIterator[Any]:
        return AsyncResults(self, request)

    async def _perform(self, request: Request) -> Any:
        while True:
            try:
                return await self._attempt(request)
            except errors.IpcError as error:
                if not self._worth_again(error, request):
                    raise

    async def _attempt(self, request: Request) -> Any:
        conn, call = await self._start(request)
        feeder: asyncio.Task[None] | None = None
        try:
            if request.stream is not None:
                feeder = self._begin_to_feed(conn, call, request)
            else:
                self._look(conn)
            if not await self._wait(call, lambda: call.done, request.deadline):
                raise self._overdue(request)
        finally:
            self._give_up(conn, call)
            if feeder is not None:
                await self._fed(feeder)
        return self._outcome(conn, call, request)

    async def _start(self, request: Request) -> tuple[Live, ClientCall]:
        body = encoded(request, self.url)
        while True:
            conn = await self._connected(request.deadline)
            call: ClientCall | None = None
            try:
                call = self._begin(conn, request, body)
                await self._flush(conn, request.deadline)
            except BROKEN as error:
                self._broke(conn, error)
                if self.closed:
                    raise
            except BaseException as error:  # the deadline, or whoever called is cancelled
                if call is not None:
                    self._give_up(conn, call)
                if isinstance(error, errors.Timeout):
                    raise self._overdue(request) from error
                raise
            else:
                return conn, call

    def _give_up(self, conn: Live, call: ClientCall) -> None:
        """Nothing for a call that is done."""
        with conn.mutex:
            conn.core.cancel(call)
        if conn.core.outbox:
            with suppress(errors.IpcError):
                conn.try_flush()

    def _begin_to_feed(self, conn: Live, call: ClientCall, request: Request) -> asyncio.Task[None]:
        """The stream of this call is being sent. What it fails with ends the call, and `_fed` raises it."""

        async def feed() -> None:
            try:
                await self._feed(conn, call, request)
            except BaseException:
                self._give_up(conn, call)
                call.changed()
                raise

        return asyncio.get_running_loop().create_task(feed())

    async def _fed(self, feeder: asyncio.Task[None]) -> None:
        """What the sending of a stream came to; it stops when the call is over."""
        feeder.cancel()
        await asyncio.wait([feeder])
        if not feeder.cancelled():
            feeder.result()

    async def _feed(self, conn: Live, call: ClientCall, request: Request) -> None:
        encode = request.method.wire("msgpack", named=False).encode
        async for value in _each(request.stream):
            if call.credit <= 0:
                await self._wait(call, lambda: call.done or call.credit > 0, request.deadline)
            try:
                body = encode(value)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise unwritable(error, self.url, request.operation) from error
            with conn.mutex:
                wanted = call.credit > 0 and conn.core.item(call, body)
            if not wanted:
                return
            await self._send(conn, request.deadline)
        with conn.mutex:
            conn.core.end(call)
        await self._send(conn, request.deadline)

    async def _send(self, conn: Live, deadline: float | None) -> None:
        """What was not sent by the deadline stays in the outbox: whoever waits for the answer finds that its time is up."""
        try:
            await self._flush(conn, deadline)
        except BROKEN as error:
            self._broke(conn, error)
        except errors.Timeout:
            pass

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def _wait(self, whose: Any, ready: Callable[[], bool], deadline: float | None) -> bool:
        """Until `ready`, or the deadline."""
        while not ready():
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            changed = _Once(future)
            whose.watchers.append(changed)
            timer = None
            if deadline is not None:
                timer = loop.call_later(max(deadline - time.monotonic(), 0.0), changed)
            try:
                await future
            finally:
                whose.watchers.remove(changed)
                if timer is not None:
                    timer.cancel()
            if deadline is not None and time.monotonic() >= deadline:
                return ready()
        return True

    def _glance(self, conn: Live) -> None:
        try:
            conn.glance()
        except BROKEN as error:
            self._broke(conn, error)

    def _look(self, conn: Live) -> None:
        try:
            conn.look()
        except BROKEN as error:
            self._broke(conn, error)

    async def _flush(self, conn: Live, deadline: float | None = None) -> None:
        if not conn.try_flush():
            await arun(conn.flush(), conn.tx, None if deadline is None else max(deadline - time.monotonic(), 0.0))

    async def _pump(self, conn: Live) -> None:
        """Receive for everybody, until the connection is lost or closed."""
        try:
            while True:
                frames = await arun(conn.receive(), conn.rx, None)
                conn.heard(frames)
                if len(frames) > 1:  # there may be as many again, and so on
                    await asyncio.sleep(0)
                if conn.core.outbox:
                    await self._flush(conn)
        except BROKEN as error:
            self._broke(conn, error)
            if self._subscriptions and not self.closed:
                with suppress(errors.IpcError):
                    await self._connected(None)

    async def _connected(self, deadline: float | None) -> Live:
        conn = self._lines.conn
        if conn is not None and conn.rested():
            self._glance(conn)
        if conn is not None and conn.good:
            return conn
        async with self._dialing:
            conn = self._lines.conn
            if conn is not None and conn.good:
                return conn
            self._gate.check("call")
            conn = await arun(self._dial(), self._dial_lane, self._patient_until(deadline))
            task = asyncio.get_running_loop().create_task(self._pump(conn), name=f"ipckit client {self.url}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return conn

    # -- contracts, pushes, the end ------------------------------------------------------------------------------------

    async def proxy(self, contract: type[S], target: str | None = None) -> S:
        """An object that is typed as `contract` and calls this server. Compares the contracts."""
        with self._expecting(contract, target) as (name, known):
            conn = await self._connected(None)
            if not conn.agrees(name, known):  # it was there before
                request = self._request(BUILT_IN, DESCRIBE, (name,), {}, self._options)
                self._compare(conn, name, known, await self._perform(request))
        return make_proxy(self, contract, name, known, self._options)

    async def subscribe(self, types: Any, *, backlog: int = 1000) -> AsyncSubscription:
        """`Client.subscribe`, awaited: `async for value in subscription`."""
        subscription = AsyncSubscription(self, Subscribed(self._types_of(types), backlog))
        await subscription._subscribe()
        return subscription

    async def close(self) -> None:
        self._close()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Once:
    """Ends a future, the first time it is called."""

    __slots__ = ("_future",)

    def __init__(self, future: asyncio.Future[None]) -> None:
        self._future = future

    def __call__(self) -> None:
        if not self._future.done():
            self._future.set_result(None)


async def _each(values: Iterable[Any] | AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The items of either kind of stream."""
    if hasattr(values, "__aiter__"):
        async for value in values:
            yield value
    else:
        for value in values:
            yield value


@overload
async def aclient(
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    contract: None = None,
    /,
    *,
    timeout: float | None = PATIENCE,
    call_timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
    interceptors: Sequence[Interceptor] = (),
    require: Collection[str] = (),
) -> AsyncClient: ...
@overload
async def aclient(  # type: ignore[overload-overlap]  # a class can be called as well
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    contract: type[S],
    /,
    *,
    target: str | None = None,
    timeout: float | None = PATIENCE,
    call_timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
    interceptors: Sequence[Interceptor] = (),
    require: Collection[str] = (),
) -> S: ...
@overload
async def aclient(
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    contract: Callable[P, R],
    /,
    *,
    target: str | None = None,
    timeout: float | None = PATIENCE,
    call_timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
    interceptors: Sequence[Interceptor] = (),
    require: Collection[str] = (),
) -> Remote[P, R]: ...
async def aclient(
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    contract: Any = None,
    /,
    *,
    target: str | None = None,
    timeout: float | None = PATIENCE,
    call_timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
    interceptors: Sequence[Interceptor] = (),
    require: Collection[str] = (),
) -> Any:
    """`client`, awaited. Calls of what it returns are awaited; streams are asynchronous iterators."""
    made = AsyncClient(
        where,
        timeout=timeout,
        call_timeout=call_timeout,
        metadata=metadata,
        interceptors=interceptors,
        require=require,
    )
    try:
        if contract is not None:
            return await made.proxy(contract, target)
        await made._connected(None)
    except BaseException:
        await made.close()
        raise
    return made
