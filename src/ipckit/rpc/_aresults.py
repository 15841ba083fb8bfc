"""`_results`, awaited: the stream that a call returns, and the pushes of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from .. import errors
from ._calling import Live
from ._clientcore import ClientCall
from ._request import Request, Subscribed

if TYPE_CHECKING:
    from ._aclient import AsyncClient

#: Items after which who consumes a stream that is already there looks after the loop.
_AT_ONCE = 64


class AsyncResults(AsyncIterator[Any]):
    """What a method streams back. Leaving it early (`aclose()`, or dropping it) cancels the call."""

    def __init__(self, client: AsyncClient, request: Request) -> None:
        self._client, self._request = client, request
        self._decode = request.method.wire("msgpack", named=False).decode_result
        self._begun: tuple[Live, ClientCall] | None = None
        self._feeder: asyncio.Task[None] | None = None
        self._over = False
        self._taken = 0

    async def __anext__(self) -> Any:
        if self._over:
            raise StopAsyncIteration
        if self._begun is None:
            try:
                self._begun = await self._client._start(self._request)
            except BaseException:
                self._over = True
                raise
            if self._request.stream is not None:
                self._feeder = self._client._begin_to_feed(*self._begun, self._request)
        conn, call = self._begun
        while True:
            with conn.mutex:
                body = conn.core.take(call)
            if body is not None:
                self._taken += 1
                if self._taken % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                if conn.core.outbox:
                    await self._client._send(conn, self._request.deadline)
                return self._client._read(self._decode, body, self._request.operation)
            if call.done:
                break
            try:
                in_time = await self._client._wait(call, lambda: bool(call.inbox) or call.done, self._request.deadline)
            except BaseException:
                self._stop()
                raise
            if not in_time:
                self._stop()
                raise self._client._overdue(self._request)
        self._over = True
        if self._feeder is not None:
            await self._client._fed(self._feeder)
        self._client._raise_failure(conn, call, self._request)
        raise StopAsyncIteration

    def _stop(self) -> None:
        self._over = True
        if self._begun is not None:
            self._client._give_up(*self._begun)
        if self._feeder is not None:
            self._feeder.cancel()

    async def aclose(self) -> None:
        """No longer interested: the server is told to stop."""
        self._stop()

    def __del__(self) -> None:
        with suppress(Exception):
            if self._begun is not None:
                conn, call = self._begun
                if not call.done:
                    conn.drop(call)
            if self._feeder is not None:
                self._feeder.cancel()


class Later(AsyncIterator[Any]):
    """The stream that an interceptor will return when it is awaited: with the first item."""

    def __init__(self, awaited: Any) -> None:
        self._awaited = awaited
        self._results: Any = None

    async def __anext__(self) -> Any:
        if self._results is None:
            self._results = aiter(await self._awaited)
        return await anext(self._results)

    async def aclose(self) -> None:
        """No longer interested."""
        if self._results is not None:
            await self._results.aclose()
        else:
            self._awaited.close()


class AsyncSubscription(AsyncIterator[Any]):
    """Pushes of the server, until `close`. It survives a lost connection; what was pushed meanwhile is gone."""

    def __init__(self, client: AsyncClient, subscribed: Subscribed) -> None:
        self._client, self._subscribed = client, subscribed

    @property
    def lost(self) -> int:
        """How many messages were dropped because this subscriber did not keep up."""
        return self._subscribed.lost

    async def _subscribe(self) -> None:
        client = self._client
        client._subscriptions.append(self._subscribed)
        try:
            await self._subscribe_until(client._patience_ends())
        except BaseException:
            client._unsubscribe(self._subscribed)
            raise

    async def _subscribe_until(self, deadline: float | None) -> None:
        client = self._client
        while True:
            before, conn = client._lines.conn, await client._connected(deadline)
            call = client._subscribe_to(conn, self._subscribed) if conn is before else None
            if call is not None:
                await self._answered(conn, call, deadline)
            if conn.error is None:
                return

    async def _answered(self, conn: Live, call: ClientCall, deadline: float | None) -> None:
        client = self._client
        await client._send(conn, deadline)
        if not await client._wait(call, lambda: call.done, deadline):
            raise errors.Timeout("the server did not answer", url=client.url, operation="subscribe")
        client._raise_refusal(call)

    async def recv(self, timeout: float | None = None) -> Any:
        """The next message. Raises Timeout, SchemaError, NothingListening when the server is gone for too long, Closed."""
        client, pushes = self._client, self._subscribed.pushes
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with suppress(IndexError):
                return client._read(self._subscribed.value, pushes.popleft(), "recv")
            client._gate.check("recv")
            conn = await client._connected(deadline)
            if not await client._wait(self._subscribed, partial(_stirred, conn, pushes), deadline):
                raise errors.Timeout(f"nothing was pushed within {timeout:g} s", url=client.url, operation="recv")

    async def __anext__(self) -> Any:
        try:
            return await self.recv()
        except errors.Closed:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        """No longer interested."""
        self._client._unsubscribe(self._subscribed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _stirred(conn: Live, pushes: Collection[Any]) -> bool:
    return bool(pushes) or conn.error is not None
