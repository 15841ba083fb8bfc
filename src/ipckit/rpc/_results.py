"""What a call from a thread may return besides a value: `Results`, a stream; and `Subscription`, the pushes of a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from .. import errors
from ._calling import Live
from ._clientcore import ClientCall
from ._request import Request, Subscribed

if TYPE_CHECKING:
    from .client import Client


class Results(Iterator[Any]):
    """What a method streams back. Leaving it early (`close()`, or dropping it) cancels the call."""

    def __init__(self, client: Client, conn: Live, call: ClientCall, request: Request) -> None:
        self._client, self._conn, self._call, self._request = client, conn, call, request
        self._decode = request.method.wire("msgpack", named=False).decode_result
        self._over = False
        self._feeder = None if request.stream is None else _Feeder(client, conn, call, request)

    def __next__(self) -> Any:
        call, conn = self._call, self._conn
        while not self._over:
            with conn.mutex:
                body = conn.core.take(call)
            if body is not None:
                if conn.core.outbox:
                    self._client._send(conn, self._request.deadline)
                return self._client._read(self._decode, body, self._request.operation)
            if call.done:
                self._over = True
                if self._feeder is not None and self._feeder.failed is not None:
                    raise self._feeder.failed
                self._client._raise_failure(conn, call, self._request)
            else:
                try:
                    in_time = self._client._wait(
                        conn, call, lambda: bool(call.inbox) or call.done, self._request.deadline
                    )
                except BaseException:
                    self.close()
                    raise
                if not in_time:
                    self.close()
                    raise self._client._overdue(self._request)
        raise StopIteration

    def close(self) -> None:
        """No longer interested: the server is told to stop."""
        self._over = True
        if not self._call.done:
            self._client._call_off(self._conn, self._call)

    def __del__(self) -> None:
        with suppress(Exception):
            if not self._call.done and self._conn.drop(self._call):
                self._client._call_off(self._conn, self._call)


class _Feeder:
    """The thread that sends the stream of a call whose results are read. It does not know the `Results`: they may be dropped."""

    def __init__(self, client: Client, conn: Live, call: ClientCall, request: Request) -> None:
        self._client, self._conn, self._call, self._request = client, conn, call, request
        self.failed: Exception | None = None
        threading.Thread(target=self._run, name=f"ipckit-{request.operation}", daemon=True).start()

    def _run(self) -> None:
        try:
            self._client._feed(self._conn, self._call, self._request)
        except Exception as error:  # of the user's iterator, or a value that cannot be sent: the caller is told
            self.failed = error
            self._client._call_off(self._conn, self._call)


class Subscription(Iterator[Any]):
    """Pushes of the server, as an iterator until `close`. It survives a lost connection; what was pushed meanwhile is gone."""

    def __init__(self, client: Client, subscribed: Subscribed) -> None:
        self._client, self._subscribed = client, subscribed
        client._subscriptions.append(subscribed)
        try:
            self._subscribe()
        except BaseException:
            client._unsubscribe(subscribed)
            raise

    @property
    def lost(self) -> int:
        """How many messages were dropped because this subscriber did not keep up."""
        return self._subscribed.lost

    def _subscribe(self) -> None:
        client = self._client
        deadline = client._patience_ends()
        while True:
            before, conn = client._lines.conn, client._connected(deadline)
            call = client._subscribe_to(conn, self._subscribed) if conn is before else None
            if call is not None:
                self._answered(conn, call, deadline)
            if conn.error is None:
                return

    def _answered(self, conn: Live, call: ClientCall, deadline: float | None) -> None:
        client = self._client
        client._send(conn, deadline)
        if not client._wait(conn, call, lambda: call.done, deadline):
            raise errors.Timeout("the server did not answer", url=client.url, operation="subscribe")
        client._raise_refusal(call)

    def recv(self, timeout: float | None = None) -> Any:
        """The next message. Raises Timeout, SchemaError, NothingListening when the server is gone for too long, Closed."""
        client, pushes = self._client, self._subscribed.pushes
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            with suppress(IndexError):
                return client._read(self._subscribed.value, pushes.popleft(), "recv")
            client._gate.check("recv")
            conn = client._connected(deadline)
            if not client._wait(conn, self._subscribed, lambda: bool(pushes), deadline):
                raise errors.Timeout(f"nothing was pushed within {timeout:g} s", url=client.url, operation="recv")

    def __next__(self) -> Any:
        try:
            return self.recv()
        except errors.Closed:
            raise StopIteration from None

    def close(self) -> None:
        """No longer interested."""
        self._client._unsubscribe(self._subscribed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
