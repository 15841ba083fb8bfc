"""The server of an event loop: grpc.aio's, on the caller's own loop, whose tasks are the handlers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from typing import Any, NoReturn, Self

import grpc
import grpc.aio
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha._async import ReflectionServicer

from ... import _options, errors
from ..._endpoint import Endpoint, Opening
from ...transports._grpc_place import PlaceOptions
from .. import _aserver as _tasks
from .._exposed import Exposed
from .._limits import ShutdownReport
from .._site import Handling, Site
from ..contract import target_name
from ..events import Failure
from ..failures import failure_of
from ..protobuf import MethodSchema
from ._door import Arrived, Door, parsed, settings_of_server
from ._hall import Hall
from ._server import _NOT_SERVING, _SERVING
from ._status import Status


class AsyncServer(_tasks.AsyncServer):
    """`ipckit.aio.Server` of grpc://."""

    _server: Any = None

    async def _open(self) -> Self:
        opening = self._opened
        assert isinstance(opening, Opening)
        door = Door(opening.url, _options.read(PlaceOptions, opening.url))
        door.check_limits(self._serving)
        await opening.arun(door.taking(), self._timeout)
        grpc.aio.init_grpc_aio()  # and never to its end: to begin again with the next server is more than gRPC stands
        server = grpc.aio.server(options=settings_of_server(door.options, self._serving))
        try:
            site = self._furnish(door, server)
            await server.start()
        except BaseException:
            await server.start()  # one that was never started cannot be stopped
            await server.stop(None)
            door.close()
            raise
        Endpoint.__init__(self, site, site.url, opening.capabilities)
        return self

    def _furnish(self, door: Door, server: Any) -> Site:
        """Everything that there is before the first call."""
        self._engine = site = Site(door.bind(server), self._serving, self._interceptors)  # type: ignore[assignment]
        self._site, self._door, self._server = site, door, server
        self._health = HealthServicer()
        self._report = None
        self._tasks: set[asyncio.Task[None]] = set()
        loop = asyncio.get_running_loop()
        site.native, site.loop, site.on_abandon = server, lambda: loop, door.abandon
        self._hall = Hall(site, self._make, _refuse, ReflectionServicer, self._health)
        for service in self._services:
            self.expose(target_name(service), service)
        server.add_generic_rpc_handlers((self._hall,))
        return site

    async def __aenter__(self) -> Self:
        return await self if self._server is None else self

    # -- services ------------------------------------------------------------------------------------------------------

    def expose(self, name: str, service: Any) -> None:
        """As of every server; also a servicer of a class that protoc's plugin made, with coroutines."""
        self._door.check_name(name)
        before = set(self._hall.names())
        self._hall.expose(name, service)
        self._tell_health(before)

    def hide(self, name: str) -> None:
        self._door.check_name(name)
        before = set(self._hall.names())
        self._hall.hide(name)
        self._tell_health(before)

    def _tell_health(self, before: set[str]) -> None:
        now = set(self._hall.names())
        for each in now ^ before:
            task = self._site_loop().create_task(self._health.set(each, _SERVING if each in now else _NOT_SERVING))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _site_loop(self) -> asyncio.AbstractEventLoop:
        assert self._site.loop is not None
        return self._site.loop()

    def targets(self) -> tuple[str, ...]:
        return (*self._site.fingerprints(), *self._hall.foreign())

    # -- ends ----------------------------------------------------------------------------------------------------------

    async def shutdown(self, drain: float = 5) -> ShutdownReport:
        if self._report is not None or self.closed:
            return self._report or ShutdownReport(0, 0, 0)
        idle, loop = asyncio.Event(), asyncio.get_running_loop()
        self._site.on_idle = partial(loop.call_soon_threadsafe, idle.set)
        await self._health.enter_graceful_shutdown()
        started = self._site.stop()
        stopping = loop.create_task(self._server.stop(drain))
        with suppress(TimeoutError):
            await asyncio.wait_for(idle.wait(), drain)
        forced = self._site.abort()
        if not forced:
            await asyncio.wait([stopping], timeout=1)  # the last answers are on their way
        self._report = ShutdownReport(started, max(started - forced, 0), forced)
        await self.close()
        await asyncio.gather(stopping, return_exceptions=True)
        return self._report

    async def close(self) -> None:
        first = not self.closed
        self._close()
        if first:
            await self._server.stop(None)
            self._door.close()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._site.crew.close(0.1)
        self._ended.set()

    # -- handlers ------------------------------------------------------------------------------------------------------

    def _make(self, exposed: Exposed, schema: MethodSchema) -> Any:
        shape = exposed.method.shape
        call = _Procedure(self._site, exposed, schema)
        make: Callable[[Any], Any]
        if shape.streams_out:
            make = grpc.stream_stream_rpc_method_handler if shape.streams_in else grpc.unary_stream_rpc_method_handler
            return make(call.converse if shape.streams_in else call.stream)
        make = grpc.stream_unary_rpc_method_handler if shape.streams_in else grpc.unary_unary_rpc_method_handler
        return make(call.upload if shape.streams_in else call.unary)


class _Arrival(Arrived):
    """As grpc.aio's context has it."""

    __slots__ = ()

    def gone(self) -> bool:
        return bool(self.context.done())


class _Procedure:
    """One method of ours, as grpc.aio calls it: in a task of its own, which is cancelled when the caller is gone."""

    def __init__(self, site: Site, exposed: Exposed, schema: MethodSchema) -> None:
        self._site, self._exposed, self._schema = site, exposed, schema
        self._parse = parsed(schema.request)

    async def unary(self, body: bytes, context: Any) -> bytes:
        try:
            handling = self._begin(context)
        except errors.RpcError as error:
            await _abort(context, failure_of(0, error, False))
        try:
            value = await handling.arun(lambda: self._schema.decode_args(self._parse(body)))
            return self._schema.encode_result(value).SerializeToString()
        except BaseException as error:
            await _failed(context, handling, error)
        finally:
            handling.close()

    async def upload(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        try:
            handling = self._begin(context)
        except errors.RpcError as error:
            await _abort(context, failure_of(0, error, False))
        try:
            first = await self._first(requests)
            value = await handling.arun(lambda: self._schema.decode_args(first), self._items(first, requests))
            return self._schema.encode_result(value).SerializeToString()
        except BaseException as error:
            await _failed(context, handling, error)
        finally:
            handling.close()

    async def stream(self, body: bytes, context: Any) -> None:
        await self._produce(context, lambda: self._schema.decode_args(self._parse(body)), None)

    async def converse(self, requests: AsyncIterator[bytes], context: Any) -> None:
        await self._produce(context, None, requests)

    async def _produce(self, context: Any, arguments: Any, requests: AsyncIterator[bytes] | None) -> None:
        try:
            handling = self._begin(context)
        except errors.RpcError as error:
            await _abort(context, failure_of(0, error, False))
        schema, write, inputs = self._schema, context.write, None
        try:
            if requests is not None:
                first = await self._first(requests)
                arguments, inputs = lambda: schema.decode_args(first), self._items(first, requests)
            async with aclosing(handling.astream(arguments, inputs)) as results:  # type: ignore[type-var]
                async for value in results:
                    await write(schema.encode_result(value).SerializeToString())
        except BaseException as error:
            await _failed(context, handling, error)
        finally:
            handling.close()

    def _begin(self, context: Any) -> Handling:
        return self._site.begin(self._exposed, _Arrival(context))

    async def _first(self, requests: AsyncIterator[bytes]) -> Any:
        """The message with the arguments, where the method has any beside its stream."""
        if not self._schema.opens:
            return self._schema.request()
        return self._parse(await anext(aiter(requests), b""))

    async def _items(self, first: Any, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        schema = self._schema
        if schema.opens and schema.has_item(first):
            yield schema.decode_item(first)
        async for body in requests:
            yield schema.decode_item(self._parse(body))


async def _failed(context: Any, handling: Handling, error: BaseException) -> NoReturn:
    """What the handler raised, to the caller; who is gone is told nothing."""
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            handling.cancel("cancelled")
            raise error
    if isinstance(error, grpc.aio.InternalError) and context.done():  # a write, to a caller who was leaving
        handling.cancel("cancelled")
        raise asyncio.CancelledError from error
    await _abort(context, handling.fail(error))


async def _abort(context: Any, failure: Failure) -> NoReturn:
    status = Status(failure)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("it raises what grpc.aio knows")


def _refuse(failure: Failure) -> Any:
    async def refuse(requests: Any, context: Any) -> NoReturn:
        await _abort(context, failure)

    return grpc.stream_stream_rpc_method_handler(refuse)
