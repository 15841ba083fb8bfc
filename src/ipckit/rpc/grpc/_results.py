"""Streams of calls over gRPC from threads: what a caller sends, `Results`, and `Subscription`."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, Self

import grpc

from ... import errors
from .._request import Request, Subscribed
from ..events import Push
from ..protobuf import MethodSchema
from ._door import parsed
from ._routes import PUSHES, left

if TYPE_CHECKING:
    from ._client import Client


class Feed(Iterator[bytes]):
    """What a caller streams, as grpcio's thread asks for it. An error of the caller's own ends the call, and is kept."""

    def __init__(self, schema: MethodSchema, request: Request) -> None:
        self._schema, self._source = schema, iter(request.stream)
        self._opening = schema.encode_args(request.args).SerializeToString() if schema.opens else None
        self.failed: Exception | None = None
        self.call: Any = None

    def __next__(self) -> bytes:
        opening, self._opening = self._opening, None
        if opening is not None:
            return opening
        try:
            return self._schema.encode_item(next(self._source)).SerializeToString()
        except StopIteration:
            raise
        except Exception as error:
            self.failed = error
            while self.call is None:
                time.sleep(0)  # it is being made right now
            self.call.cancel()
            raise StopIteration from error


class Results(Iterator[Any]):
    """What a method streams back. Leaving it early (`close()`, or dropping it) cancels the call."""

    def __init__(self, client: Client, request: Request) -> None:
        self._client, self._request = client, request
        self._schema = client._schema(request.target, request.method)
        self._parse = parsed(self._schema.response)
        self._feed: Feed | None = None
        self._call: Any = None
        self._over = self._received = False
        client._again(request, self._begin)

    def _begin(self, request: Request) -> None:
        schema, client = self._schema, self._client
        if request.stream is None:
            given: Any = schema.encode_args(request.args).SerializeToString()
        else:
            given = self._feed = Feed(schema, request)
        stub, headers = client._stub(schema, request.method.shape), client._headers(request)
        try:
            self._call = stub(given, left(request.deadline), headers)
        except ValueError as error:
            raise client._refused(error, request.operation) from error
        if self._feed is not None:
            self._feed.call = self._call

    def __next__(self) -> Any:
        while not self._over:
            try:
                body = next(self._call)
            except StopIteration:
                self._over = True
                break
            except grpc.RpcError as error:
                if self._over:  # closed, by another thread
                    break
                if not self._begun_again(error):
                    self._over = True
                    if self._feed is not None and self._feed.failed is not None:
                        raise self._feed.failed from None
                    raise self._client._error(error, self._request.operation) from error
            except BaseException:  # Ctrl-C
                self.close()
                raise
            else:
                self._received = True
                return self._schema.decode_result(self._parse(body))
        raise StopIteration

    def _begun_again(self, error: Any) -> bool:
        """It could not be sent, so nothing has happened: once more, when there is a server."""
        if self._received or self._request.stream is not None or self._client.closed:
            return False
        if not isinstance(self._client._error(error, None), errors.NothingListening):
            return False
        self._client._again(self._request, self._begin)
        return True

    def close(self) -> None:
        """No longer interested: the server is told to stop."""
        self._over = True
        if self._call is not None:
            self._call.cancel()

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


class Subscription(Iterator[Any]):
    """Pushes of the server, as an iterator until `close`. It survives a lost connection; what was pushed meanwhile is gone.

    A thread reads them, for gRPC stops a server whose client does not read.
    """

    def __init__(self, client: Client, subscribed: Subscribed) -> None:
        self._client, self._subscribed = client, subscribed
        self._changed = threading.Condition()
        self._begun = self._over = False
        self._error: BaseException | None = None
        self._results: Results | None = None
        client._feeding.add(self)
        subscribed.watchers.append(self._tell)
        client._connected(None)
        threading.Thread(target=self._read, name=f"ipckit-{client.url.scheme}-pushes", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._begun or self._over)
        if not self._begun and self._error is not None:
            raise self._error

    @property
    def lost(self) -> int:
        """How many messages were dropped because this subscriber did not keep up."""
        return self._subscribed.lost

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _read(self) -> None:
        request = self._client._question(PUSHES, (list(self._subscribed.types),), None)
        try:
            while not self._over:
                with (
                    suppress(errors.PeerError, errors.ShuttingDown),
                    closing(Results(self._client, request)) as results,
                ):
                    self._results = results
                    for push in results:
                        self._pushed(push)
                if not self._over:
                    self._client._doubtful = True
        except BaseException as error:
            self._error = error
        finally:
            self._over = True
            self._tell()

    def _pushed(self, push: Any) -> None:
        if push.type:
            self._subscribed.offer(Push(push.type, push.body))
        else:
            self._begun = True
            self._tell()

    def recv(self, timeout: float | None = None) -> Any:
        """The next message. Raises Timeout, SchemaError."""
        pushes: deque[Any] = self._subscribed.pushes
        with self._changed:
            in_time = self._changed.wait_for(lambda: pushes or self._over, timeout)
        if pushes:
            return self._subscribed.value(pushes.popleft())
        if not in_time:
            raise errors.Timeout(f"nothing was pushed within {timeout} s", url=self._client.url, operation="recv")
        if self._error is not None and not self._client.closed:
            raise self._error
        raise errors.Closed("this endpoint is closed", url=self._client.url, operation="recv")

    def __next__(self) -> Any:
        try:
            return self.recv()
        except errors.Closed:
            raise StopIteration from None

    def _end(self) -> None:
        self._over = True
        if self._results is not None:
            self._results.close()
        self._tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No longer interested."""
        self._client._feeding.discard(self)
        self._end()
