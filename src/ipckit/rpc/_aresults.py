"""`_results`, awaited: the stream that a call returns, and the pushes of a server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .. import errors
from ._calling import Live, Request, Subscribed
from ._clientcore import ClientCall

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
            self._begun = await self._client._start(self._request)
            if self._request.stream is not None:
                self._feeder = asyncio.get_running_loop().create_task(self._feed(*self._begun))
        conn, call = self._begun
        while True:
            with conn.mutex:
                body = conn.core.take(call)
            if body is not None:
                self._taken += 1
                if self._taken % _AT_ONCE == 0:
                    await asyncio.sleep(0)
                if conn.core.outbox:
                    await self._client._send(conn)
                return self._decode(body)
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
            await self._fed(self._feeder)
        self._client._raise_failure(conn, call, self._request)
        raise StopAsyncIteration

    async def _feed(self, conn: Live, call: ClientCall) -> None:
        try:
            await self._client._feed(conn, call, self._request)
        except BaseException:
            self._client._give_up(conn, call)
            call.changed()
            raise

    async def _fed(self, feeder: asyncio.Task[None]) -> None:
        """What the sending of our stream came to; it stops when the call is over."""
        if not feeder.done():
            feeder.cancel()
        with suppress(asyncio.CancelledError):
            await feeder

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
            self._stop()


class AsyncSubscription(AsyncIterator[Any]):
    """Pushes of the server, until `close`. It survives a lost connection; what was pushed meanwhile is gone."""

    def __init__(self, client: AsyncClient, subscribed: Subscribed) -> None:
        self._client, self._subscribed = client, subscribed

    @property
    def lost(self) -> int:
        """How many messages were dropped because this subscriber did not keep up."""
        return self._subscribed.lost

    async def _open(self) -> None:
        client = self._client
        conn = await client._connected(None)
        client._subscriptions.append(self._subscribed)
        with conn.mutex:
            call = conn.core.subscribe(list(self._subscribed.types))
        await client._flush(conn)
        await client._wait(call, lambda: call.done, None)

    async def recv(self, timeout: float | None = None) -> Any:
        """The next message. Raises Timeout, SchemaError, Closed."""
        client, pushes = self._client, self._subscribed.pushes
        deadline = None if timeout is None else time.monotonic() + timeout
        client._gate.check("recv")
        if not await client._wait(self._subscribed, lambda: bool(pushes) or client.closed, deadline):
            raise errors.Timeout(f"nothing was pushed within {timeout} s", url=client.url, operation="recv")
        if not pushes:
            client._gate.check("recv")
        return self._subscribed.value(pushes.popleft())

    async def __anext__(self) -> Any:
        try:
            return await self.recv()
        except errors.Closed:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        """No longer interested."""
        subscriptions = self._client._subscriptions
        if self._subscribed in subscriptions:
            subscriptions.remove(self._subscribed)
            gone = [name for name in self._subscribed.types if all(name not in each.types for each in subscriptions)]
            conn = self._client._lines.conn
            if gone and conn is not None and conn.good:
                with conn.mutex:
                    conn.core.unsubscribe(gone)
                await self._client._send(conn)
