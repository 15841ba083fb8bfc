"""The server of threads: grpcio's, whose pool runs the handlers.

Bytes come in and bytes go out: parsing and validating is ours, so that what is wrong with a message is told as such. Coroutines
run on a loop that the server keeps for them; their streams wait on threads of a pool of their own, for a subscription may last
for days.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, cast

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import HealthServicer
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from ... import _options, errors
from ..._endpoint import Endpoint, Opening
from ..._url import Url
from ...transports._grpc_place import PlaceOptions
from .. import server as _threads
from .._exposed import Exposed
from .._limits import ServerOptions, ShutdownReport
from .._site import Handling, Site
from ..contract import target_name
from ..events import Failure
from ..failures import failure_of
from ..protobuf import MethodSchema
from ..server import ServerInterceptor
from ._door import Arrived, Door, parsed, settings_of_server
from ._hall import Hall
from ._pool import Pool
from ._status import Status

_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
#: Streams of coroutines that may be open at once.
_STREAMS = 10_000


class Server(_threads.Server):
    """`ipckit.Server` of grpc://."""

    def __init__(
        self,
        url: str | Url,
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
        opening = Opening(url, None, None, require, "rpc", "serve")
        serving = ServerOptions(
            workers,
            max_connections,
            max_concurrent,
            max_per_connection,
            tracebacks,
            connection_timeout,
            requests_per_second,
            burst_size,
        )
        door = Door(opening.url, _options.read(PlaceOptions, opening.url))
        door.check_limits(serving)
        opening.run(door.taking(), timeout)
        self._pool = Pool(workers, f"ipckit-{opening.url.scheme}-server")
        self._streams = ThreadPoolExecutor(_STREAMS, f"ipckit-{opening.url.scheme}-stream")
        server = grpc.server(cast("ThreadPoolExecutor", self._pool), options=settings_of_server(door.options, serving))
        self._engine = site = Site(door.bind(server), serving, interceptors)  # type: ignore[assignment]
        self._site, self._door, self._server = site, door, server
        self._health = HealthServicer()
        self._loop, self._loop_thread, self._loop_mutex = None, None, threading.Lock()
        self._ended = threading.Event()
        self._report = None
        site.native, site.loop = server, self._own_loop
        site.on_close, site.on_abandon = self._release, door.abandon
        Endpoint.__init__(self, site, site.url, opening.capabilities)
        try:
            self._hall = Hall(site, self._make, _refuse, ReflectionServicer, self._health)
            for service in services:
                self.expose(target_name(service), service)
            server.add_generic_rpc_handlers((self._hall,))
            server.start()
        except BaseException:
            self.close()
            raise

    # -- services ------------------------------------------------------------------------------------------------------

    def expose(self, name: str, service: Any) -> None:
        """As of every server; also a servicer of a class that protoc's plugin made."""
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
        for each in now - before:
            self._health.set(each, _SERVING)
        for each in before - now:
            self._health.set(each, _NOT_SERVING)

    def targets(self) -> tuple[str, ...]:
        return (*self._site.fingerprints(), *self._hall.foreign())

    # -- ends ----------------------------------------------------------------------------------------------------------

    def shutdown(self, drain: float = 5) -> ShutdownReport:
        if self._report is not None or self.closed:
            return self._report or ShutdownReport(0, 0, 0)
        self._health.enter_graceful_shutdown()
        started = self._site.stop()
        stopped = self._server.stop(drain)  # no new connections; those that there are may go on for so long
        self._site.idle.wait(drain)
        forced = self._site.abort()
        if not forced:
            stopped.wait(1)  # the last answers are on their way
        self._report = ShutdownReport(started, max(started - forced, 0), forced)
        self.close()
        return self._report

    def close(self) -> None:
        self._close()
        self._end_own_loop()
        self._ended.set()

    def _release(self) -> None:
        """Once."""
        self._server.stop(None).wait(5)
        self._door.close()
        self._pool.close()
        self._streams.shutdown(wait=False, cancel_futures=True)
        self._site.crew.close(0.1)

    def _end_own_loop(self) -> None:
        with self._loop_mutex:
            loop, thread = self._loop, self._loop_thread
            self._loop = None
        if loop is not None and thread is not None:
            _threads._end_loop(loop, thread)

    # -- handlers ------------------------------------------------------------------------------------------------------

    def _make(self, exposed: Exposed, schema: MethodSchema) -> Any:
        shape = exposed.method.shape
        call = _Procedure(self._site, exposed, schema)
        if not shape.streams_out:
            make = grpc.stream_unary_rpc_method_handler if shape.streams_in else grpc.unary_unary_rpc_method_handler
            return make(call.upload if shape.streams_in else call.unary if call.slow else call.quick)
        make = grpc.stream_stream_rpc_method_handler if shape.streams_in else grpc.unary_stream_rpc_method_handler

        def stream(request: Any, context: Any) -> Iterator[bytes]:
            return call.stream(request, context)

        if exposed.method.coroutine:
            stream.experimental_thread_pool = self._streams  # type: ignore[attr-defined]
        return make(stream)


class _Arrival(Arrived):
    """As grpcio's context has it."""

    __slots__ = ()

    def gone(self) -> bool:
        return not self.context.is_active()


class _Procedure:
    """One method of ours, as grpcio calls it: on a thread of its pool."""

    def __init__(self, site: Site, exposed: Exposed, schema: MethodSchema) -> None:
        self._site, self._exposed, self._schema = site, exposed, schema
        self._parse = parsed(schema.request)
        self.slow = exposed.method.coroutine or not exposed.method.plain or bool(site.interceptors)

    def quick(self, body: bytes, context: Any) -> bytes:
        """`unary`, of a function whose arguments are as they come: the commonest call, without a step that it does not need."""
        handling = self._begin(context)
        try:
            args = self._schema.decode_args(self._parse(body))
            value = handling.plainly(args)
            return bytes(self._schema.encode_result(value).SerializeToString())
        except BaseException as error:
            _abort(context, handling.fail(error))
        finally:
            handling.close()

    def unary(self, body: bytes, context: Any) -> bytes:
        handling = self._begin(context)
        try:
            value = handling.run(lambda: self._schema.decode_args(self._parse(body)))
            return bytes(self._schema.encode_result(value).SerializeToString())
        except BaseException as error:
            _abort(context, handling.fail(error))
        finally:
            handling.close()

    def upload(self, requests: Iterator[bytes], context: Any) -> bytes:
        handling = self._begin(context)
        try:
            first = self._first(requests)
            value = handling.run(lambda: self._schema.decode_args(first), self._items(first, requests, handling))
            return bytes(self._schema.encode_result(value).SerializeToString())
        except BaseException as error:
            _abort(context, handling.fail(error))
        finally:
            handling.close()

    def stream(self, request: Any, context: Any) -> Iterator[bytes]:
        handling = self._begin(context)
        schema = self._schema
        try:
            if self._exposed.method.shape.streams_in:
                first = self._first(request)
                inputs: Iterator[Any] | None = self._items(first, request, handling)
            else:
                first, inputs = None, None
            results = handling.stream(lambda: schema.decode_args(first or self._parse(request)), inputs)
            context.add_callback(lambda: handling.cancel("cancelled"))
            try:
                for value in results:
                    yield schema.encode_result(value).SerializeToString()
            finally:
                results.close()  # type: ignore[attr-defined]
        except GeneratorExit:  # the caller is gone
            handling.cancel("cancelled")
            raise
        except BaseException as error:
            _abort(context, handling.fail(error))
        finally:
            handling.close()

    def _begin(self, context: Any) -> Handling:
        try:
            handling = self._site.begin(self._exposed, _Arrival(context))
        except errors.RpcError as error:
            _abort(context, failure_of(0, error, False))
        if self._exposed.method.coroutine:
            context.add_callback(lambda: handling.cancel("cancelled"))
        return handling

    def _first(self, requests: Iterator[bytes]) -> Any:
        """The message with the arguments, where the method has any beside its stream."""
        if not self._schema.opens:
            return self._schema.request()
        try:
            return self._parse(next(requests, b""))
        except grpc.RpcError as error:
            raise errors.Cancelled("the caller is gone") from error

    def _items(self, first: Any, requests: Iterator[bytes], handling: Handling) -> Iterator[Any]:
        schema = self._schema
        if schema.opens and schema.has_item(first):
            yield schema.decode_item(first)
        try:
            for body in requests:
                yield schema.decode_item(self._parse(body))
        except grpc.RpcError as error:
            handling.context.check()
            raise errors.Cancelled("the caller is gone") from error


def _abort(context: Any, failure: Failure) -> NoReturn:
    context.abort_with_status(Status(failure))
    raise AssertionError("it raises what grpcio knows")


def _refuse(failure: Failure) -> Any:
    def refuse(requests: Any, context: Any) -> NoReturn:
        _abort(context, failure)

    return grpc.stream_stream_rpc_method_handler(refuse)
