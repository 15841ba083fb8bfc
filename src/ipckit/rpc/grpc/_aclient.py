"""Calls from tasks over gRPC: a grpc.aio channel on the caller's loop. `_client.py` tells how."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from ... import errors
from ..._wait import arun
from .. import _aclient as _tasks
from .._proxy import make_proxy
from .._request import CallOptions, Request, Subscribed
from .._tracing import traced
from ..contract import Contract, Method, Shape
from ..events import Push
from ..protobuf import MethodSchema
from ._door import parsed
from ._routes import DESCRIBE, DESCRIPTOR, PUSHES, TARGETS, Line, Routes, left

S = TypeVar("S")
_READY = grpc.ChannelConnectivity.READY


class AsyncClient(Routes, _tasks.AsyncClient):
    """`ipckit.aio.Client` of grpc://."""

    def __init__(self, where: Any, /, **options: Any) -> None:
        super().__init__(where, **options)
        self._reconnecting = asyncio.Lock()
        self._feeding: set[AsyncSubscription] = set()
        try:
            self._prepare()
        except BaseException:
            self._close()
            raise

    # -- the channel ---------------------------------------------------------------------------------------------------

    async def _connected(self, deadline: float | None) -> Any:
        """The channel, to a server that has answered once."""
        line = self._lines.conn
        if line is None:
            async with self._dialing:
                if self._lines.conn is None:
                    self._gate.check("client")
                    patience = self._patient_until(deadline)
                    until = None if patience is None else time.monotonic() + patience
                    target = await arun(self._arriving(), self._dial_lane, patience)
                    self._lines.conn = self._open(target)
                    try:
                        await self._targets(until)
                    except BaseException:
                        line, self._lines.conn = self._lines.conn, None
                        if line is not None:
                            await line.link.native.close()
                        raise
            line = self._lines.conn
        self._gate.check("client")
        return line

    def _open(self, target: str) -> Any:
        settings = self._settings()
        grpc.aio.init_grpc_aio()  # and never to its end: to begin again with the next client is more than gRPC stands
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(target, settings)
        else:
            channel = grpc.aio.secure_channel(target, self._credentials, settings)
        self._stubs.clear()
        return Line(self.url, channel, self._held.close)

    async def _targets(self, until: float | None) -> dict[str, str] | None:
        """What the server has, with fingerprints; None: it is no ipckit's."""
        request = self._question(TARGETS, (), until)
        try:
            found: dict[str, str] = await self._again(request, self._attempt)
        except (errors.UnknownMethod, errors.UnknownTarget):
            self._greeted = False
            return None
        except errors.DeadlineExceeded as error:
            raise self._nobody(error) from error
        self._greeted = True
        return found

    async def _await_server(self, deadline: float | None, why: errors.IpcError | None) -> None:
        """The connection was lost: until there is another one, whose server has what we expect."""
        self._gate.check("call")
        line = self._lines.conn
        assert line is not None
        channel = line.link.native
        try:
            async with asyncio.timeout(self._patient_until(deadline)):
                while (state := channel.get_state(try_to_connect=True)) is not _READY:
                    await channel.wait_for_state_change(state)
        except TimeoutError as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise errors.DeadlineExceeded("no server before the deadline", url=self.url) from (why or error)
            raise errors.NothingListening("nobody listens there", url=self.url, operation="call") from (why or error)
        except grpc.aio.UsageError as error:  # the channel was closed under us
            raise errors.Closed("this endpoint is closed", url=self.url, operation="call") from error
        self._doubtful = False
        self.reconnects += 1
        self._agreed.clear()
        for (target, _), contract in tuple(self._expected.items()):
            await self._check(target, contract, deadline)

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def _ask_about(self, target: str, options: CallOptions) -> None:
        until = options.deadline()
        await self._connected(until)
        described = await self._ask(DESCRIBE, target, until)
        self._files[target] = await self._ask(DESCRIPTOR, target, until)
        self._described[target] = described

    async def _ask(self, method: Method, target: str, deadline: float | None = None) -> Any:
        return await self._again(self._question(method, (target,), deadline), self._attempt)

    def _results(self, request: Request) -> AsyncIterator[Any]:
        return AsyncResults(self, request)

    async def _perform(self, request: Request) -> Any:
        await self._connected(request.deadline)
        return await self._again(request, self._attempt)

    async def _again(self, request: Request, attempt: Callable[[Request], Awaitable[Any]]) -> Any:
        """Until it was sent; and if it may be repeated, until it has an answer."""
        why: errors.IpcError | None = None
        while True:
            if self._doubtful:
                await self._await_server(request.deadline, why)
            try:
                return await attempt(request)
            except errors.NothingListening as error:
                if self.closed:
                    raise
                why = error
            except errors.IpcError as error:
                if not self._worth_again(error, request):
                    raise
                why = error

    async def _attempt(self, request: Request) -> Any:
        schema = self._schema(request.target, request.method)
        call, feed = self._begin_call(schema, request)
        try:
            reply = await call
        except grpc.aio.AioRpcError as error:
            raise self._said(error, feed, request) from error
        except asyncio.CancelledError:
            self._not_by_us(feed, request.operation)
            raise
        return schema.decode_result(parsed(schema.response)(reply))

    def _begin_call(self, schema: MethodSchema, request: Request) -> tuple[Any, _Feed | None]:
        stub, feed = self._stub(schema, request.method.shape), None
        if request.stream is None:
            given: Any = schema.encode_args(request.args).SerializeToString()
        else:
            feed = _Feed(schema, request)
            given = feed.bodies()
        try:
            call = stub(given, timeout=left(request.deadline), metadata=self._headers(request))
        except (grpc.aio.UsageError, asyncio.CancelledError) as error:
            raise errors.Closed("this endpoint is closed", url=self.url, operation=request.operation) from error
        if feed is not None:
            feed.call = call
        return call, feed

    def _said(self, error: Any, feed: _Feed | None, request: Request) -> BaseException:
        if feed is not None and feed.failed is not None:
            return feed.failed
        return self._error(error, request.operation)

    def _not_by_us(self, feed: _Feed | None, operation: str) -> None:
        """grpc.aio cancels the task that waits when the call or the channel is; raise what that was, unless the task is meant."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return
        if feed is not None and feed.failed is not None:
            raise feed.failed from None
        if self.closed:
            raise errors.Closed("this endpoint is closed", url=self.url, operation=operation) from None

    def _caller(self, target: str, method: Method, options: CallOptions) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            return self._call(target, method, args, named, options)

        short = method.shape is Shape.UNARY and method.plain and not options.metadata and not self._interceptors
        return self._short_way(target, method, options, call) if short else call

    def _short_way(
        self, target: str, method: Method, options: CallOptions, long: Callable[..., Any]
    ) -> Callable[..., Any]:
        """`call`, when nothing is out of the ordinary: everything it needs is at hand."""
        schema = self._schema(target, method)
        encode, decode, parse = schema.encode_args, schema.decode_result, parsed(schema.response)
        count, timeout, gate = len(method.parameters), options.timeout, self._gate
        stub = self._stub(schema, method.shape)

        async def call(*args: Any, **named: Any) -> Any:
            if named or len(args) != count or self._doubtful or traced() or gate.closed or gate.foreign:
                return await long(*args, **named)
            body = encode(args).SerializeToString()
            try:
                reply = await stub(body, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                found = self._error(error, f"{target}.{method.name}")
                if isinstance(found, errors.NothingListening) or method.options.idempotent:
                    return await long(*args)
                raise found from error
            except asyncio.CancelledError:
                self._not_by_us(None, f"{target}.{method.name}")
                raise
            return decode(parse(reply))

        return call

    # -- contracts, pushes, the end ------------------------------------------------------------------------------------

    async def proxy(self, contract: type[S], target: str | None = None) -> S:
        with self._expecting(contract, target) as (name, known):
            await self._connected(None)
            self._learn(name, known)
            await self._check(name, known, None)
        return make_proxy(self, contract, name, known, self._options)

    async def _check(self, target: str, contract: Contract, deadline: float | None) -> None:
        """The server has what this contract needs; one that is not ours is taken at its word."""
        key = target, contract.fingerprint
        if key in self._agreed:
            return
        targets = await self._targets(deadline)
        if targets is not None and self._differs(targets, target, contract):
            self._fits(target, contract, await self._ask(DESCRIBE, target), await self._ask(DESCRIPTOR, target))
        self._agreed.add(key)

    async def subscribe(self, types: Any, *, backlog: int = 1000) -> Any:
        await self._connected(None)
        subscription = AsyncSubscription(self, Subscribed(self._types_of(types), backlog))
        await subscription._opened()
        return subscription

    async def close(self) -> None:
        line = self._lines.conn
        self._close()
        for each in tuple(self._feeding):
            await each.close()
        if line is not None:
            await line.link.native.close()


class _Feed:
    """What a caller streams. An error of the caller's own ends the call, and is kept."""

    def __init__(self, schema: MethodSchema, request: Request) -> None:
        self._schema, self._request = schema, request
        self.failed: Exception | None = None
        self.call: Any = None
        self._opening = schema.encode_args(request.args).SerializeToString() if schema.opens else None

    async def bodies(self) -> AsyncIterator[bytes]:
        if self._opening is not None:
            yield self._opening
        try:
            async for value in _tasks._each(self._request.stream):
                yield self._schema.encode_item(value).SerializeToString()
        except Exception as error:
            self.failed = error
            self.call.cancel()


class AsyncResults(AsyncIterator[Any]):
    """What a method streams back. Leaving it early (`aclose()`, or dropping it) cancels the call."""

    def __init__(self, client: AsyncClient, request: Request) -> None:
        self._client, self._request = client, request
        self._call: Any = None
        self._feed: _Feed | None = None
        self._over = self._received = False

    async def _begin(self, request: Request) -> None:
        self._schema = self._client._schema(request.target, request.method)
        self._parse = parsed(self._schema.response)
        self._call, self._feed = self._client._begin_call(self._schema, request)

    async def __anext__(self) -> Any:
        if self._call is None and not self._over:
            await self._client._connected(self._request.deadline)
            await self._client._again(self._request, self._begin)
        while not self._over:
            try:
                body = await self._call.read()
            except grpc.aio.AioRpcError as error:
                if not await self._begun_again(error):
                    self._over = True
                    raise self._client._said(error, self._feed, self._request) from error
            except asyncio.CancelledError:
                self._stop()
                self._client._not_by_us(self._feed, self._request.operation)
                raise
            else:
                if body is grpc.aio.EOF:
                    self._over = True
                    break
                self._received = True
                return self._schema.decode_result(self._parse(body))
        raise StopAsyncIteration

    async def _begun_again(self, error: Any) -> bool:
        """It could not be sent, so nothing has happened: once more, when there is a server."""
        if self._received or self._request.stream is not None or self._client.closed:
            return False
        if not isinstance(self._client._error(error, None), errors.NothingListening):
            return False
        await self._client._again(self._request, self._begin)
        return True

    def _stop(self) -> None:
        self._over = True
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
        """No longer interested: the server is told to stop."""
        self._stop()

    def __del__(self) -> None:
        with suppress(Exception):
            self._stop()


class AsyncSubscription(AsyncIterator[Any]):
    """Pushes of the server, until `close`. It survives a lost connection; what was pushed meanwhile is gone."""

    def __init__(self, client: AsyncClient, subscribed: Subscribed) -> None:
        self._client, self._subscribed = client, subscribed
        self._begun = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._read(), name=f"ipckit pushes {client.url}")
        client._feeding.add(self)

    @property
    def lost(self) -> int:
        """How many messages were dropped because this subscriber did not keep up."""
        return self._subscribed.lost

    async def _opened(self) -> None:
        waiting = asyncio.ensure_future(self._begun.wait())
        await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self._task.done():
            await self._task

    async def _read(self) -> None:
        request = self._client._question(PUSHES, (list(self._subscribed.types),), None)
        while True:
            with suppress(errors.PeerError, errors.ShuttingDown):
                async with aclosing(AsyncResults(self._client, request)) as results:
                    async for push in results:
                        if push.type:
                            self._subscribed.offer(Push(push.type, push.body))
                        else:
                            self._begun.set()
            self._client._doubtful = True

    async def recv(self, timeout: float | None = None) -> Any:
        """The next message. Raises Timeout, SchemaError, Closed."""
        client, pushes, deadline = self._client, self._subscribed.pushes, None
        if timeout is not None:
            deadline = time.monotonic() + timeout
        if not pushes:
            client._gate.check("recv")
            self._task.add_done_callback(self._tell)
            try:
                if not await client._wait(self._subscribed, lambda: bool(pushes) or self._task.done(), deadline):
                    raise errors.Timeout(f"nothing was pushed within {timeout} s", url=client.url, operation="recv")
            finally:
                self._task.remove_done_callback(self._tell)
        if pushes:
            return self._subscribed.value(pushes.popleft())
        client._gate.check("recv")
        if self._task.cancelled():
            raise errors.Closed("this endpoint is closed", url=client.url, operation="recv")
        return await self._task

    def _tell(self, _: Any) -> None:
        for watcher in tuple(self._subscribed.watchers):
            watcher()

    async def __anext__(self) -> Any:
        try:
            return await self.recv()
        except errors.Closed:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """No longer interested."""
        self._client._feeding.discard(self)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
