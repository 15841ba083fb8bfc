"""Calls from threads over gRPC: a grpcio channel.

A unary call is grpcio's own blocking call, with bytes that protobuf made. Nothing here knows connections: gRPC makes
them, and again; a call that could not be sent waits for the server as long as connecting may take, one that was under way ends
with PeerDied.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import grpc

from ... import errors
from ..._spi import Steps, Wait
from ..._wait import run
from .._proxy import make_proxy
from .._request import CallOptions, Request, Subscribed
from .._tracing import traced
from ..client import Client as _Client
from ..contract import Contract, Method, Shape
from ..protobuf import MethodSchema
from ._door import parsed
from ._results import Feed, Results, Subscription
from ._routes import DESCRIBE, DESCRIPTOR, TARGETS, Line, Routes, left

S = TypeVar("S")
_READY = grpc.ChannelConnectivity.READY


class Client(Routes, _Client):
    """`ipckit.Client` of grpc://."""

    def __init__(self, where: Any, /, **options: Any) -> None:
        super().__init__(where, **options)
        self._feeding: set[Subscription] = set()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    # -- the channel ---------------------------------------------------------------------------------------------------

    def _connected(self, deadline: float | None) -> Any:
        """The channel, to a server that has answered once."""
        line = self._lines.conn
        if line is None:
            with self._dialing:
                if self._lines.conn is None:
                    self._gate.check("client")
                    patience = self._patient_until(deadline)
                    until = None if patience is None else time.monotonic() + patience
                    target = run(self._arriving(), self._dial_lane, patience)
                    self._lines.conn = self._open(target)
                    try:
                        self._targets(until)
                    except BaseException:
                        line, self._lines.conn = self._lines.conn, None
                        if line is not None:
                            line.close()
                        raise
            line = self._lines.conn
        self._gate.check("client")
        return line

    def _open(self, target: str) -> Any:
        settings = self._settings()
        if self._credentials is None:
            channel = grpc.insecure_channel(target, settings)
        else:
            channel = grpc.secure_channel(target, self._credentials, settings)

        def close() -> None:
            channel.close()
            self._held.close()

        self._stubs.clear()
        return Line(self.url, channel, close)

    def _targets(self, until: float | None) -> dict[str, str] | None:
        """What the server has, with fingerprints; None: it is no ipckit's."""
        request = self._question(TARGETS, (), until)
        try:
            found: dict[str, str] = self._again(request, self._attempt)
        except (errors.UnknownMethod, errors.UnknownTarget):
            self._greeted = False
            return None
        except errors.DeadlineExceeded as error:
            raise self._nobody(error) from error
        self._greeted = True
        return found

    def _ready(self) -> Steps[None]:
        """Until gRPC has a connection."""
        line = self._lines.conn
        assert line is not None
        channel, mutex, bell = line.link.native, threading.Lock(), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        open = True
        states: list[Any] = []

        def changed(state: Any) -> None:  # on a thread of grpcio's
            with mutex:
                if open:
                    states.append(state)
                    os.eventfd_write(bell, 1)

        channel.subscribe(changed, try_to_connect=True)
        try:
            while not states or states[-1] is not _READY:
                yield Wait(((bell, select.POLLIN),))
                with suppress(BlockingIOError):
                    os.eventfd_read(bell)
        finally:
            channel.unsubscribe(changed)
            with mutex:
                open = False
                os.close(bell)

    def _await_server(self, deadline: float | None, why: errors.IpcError | None) -> None:
        """The connection was lost: until there is another one, whose server has what we expect."""
        self._gate.check("call")
        try:
            run(self._ready(), self._dial_lane, self._patient_until(deadline))
        except errors.Timeout as error:
            if deadline is not None and time.monotonic() >= deadline:
                raise errors.DeadlineExceeded("no server before the deadline", url=self.url) from (why or error)
            raise errors.NothingListening("nobody listens there", url=self.url, operation="call") from (why or error)
        self._doubtful = False
        self.reconnects += 1
        self._agreed.clear()
        for (target, _), contract in tuple(self._expected.items()):
            self._check(target, contract, deadline)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _ask_about(self, target: str, options: CallOptions) -> None:
        until = options.deadline()
        self._connected(until)
        described = self._ask(DESCRIBE, target, until)
        self._files[target] = self._ask(DESCRIPTOR, target, until)
        self._described[target] = described

    def _ask(self, method: Method, target: str, deadline: float | None = None) -> Any:
        return self._again(self._question(method, (target,), deadline), self._attempt)

    def _perform(self, request: Request) -> Any:
        self._connected(request.deadline)
        if request.method.shape.streams_out:
            return Results(self, request)
        return self._again(request, self._attempt)

    def _again(self, request: Request, attempt: Callable[[Request], Any]) -> Any:
        """Until it was sent; and if it may be repeated, until it has an answer."""
        why: errors.IpcError | None = None
        while True:
            if self._doubtful:
                self._await_server(request.deadline, why)
            try:
                return attempt(request)
            except errors.NothingListening as error:
                if self.closed:
                    raise
                why = error
            except errors.IpcError as error:
                if not self._worth_again(error, request):
                    raise
                why = error

    def _attempt(self, request: Request) -> Any:
        schema = self._schema(request.target, request.method)
        if request.stream is not None:
            return self._upload(schema, request)
        body = schema.encode_args(request.args).SerializeToString()
        stub, headers = self._stub(schema, request.method.shape), self._headers(request)
        try:
            reply = stub(body, left(request.deadline), headers)
        except grpc.RpcError as error:
            raise self._error(error, request.operation) from error
        except ValueError as error:
            raise self._refused(error, request.operation) from error
        return schema.decode_result(parsed(schema.response)(reply))

    def _refused(self, error: ValueError, operation: str) -> Exception:
        """What a `ValueError` of grpcio means: most often that the channel was closed under us."""
        return errors.Closed("this endpoint is closed", url=self.url, operation=operation) if self.closed else error

    def _upload(self, schema: MethodSchema, request: Request) -> Any:
        feed = Feed(schema, request)
        stub, headers = self._stub(schema, request.method.shape), self._headers(request)
        try:
            call = feed.call = stub.future(feed, left(request.deadline), headers)
        except ValueError as error:
            raise self._refused(error, request.operation) from error
        try:
            reply = call.result()
        except grpc.RpcError as error:
            if feed.failed is not None:
                raise feed.failed from None
            raise self._error(error, request.operation) from error
        except grpc.FutureCancelledError as error:
            if feed.failed is not None:
                raise feed.failed from None
            raise errors.Closed("this endpoint is closed", url=self.url, operation=request.operation) from error
        except BaseException:  # Ctrl-C
            call.cancel()
            raise
        return schema.decode_result(parsed(schema.response)(reply))

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

        def call(*args: Any, **named: Any) -> Any:
            if named or len(args) != count or self._doubtful or traced() or gate.closed or gate.foreign:
                return long(*args, **named)
            body = encode(args).SerializeToString()
            try:
                reply = stub(body, timeout)
            except grpc.RpcError as error:
                found = self._error(error, f"{target}.{method.name}")
                if isinstance(found, errors.NothingListening) or method.options.idempotent:
                    return long(*args)
                raise found from error
            except ValueError as error:
                raise self._refused(error, f"{target}.{method.name}") from error
            return decode(parse(reply))

        return call

    # -- contracts, pushes, the end ------------------------------------------------------------------------------------

    def proxy(self, contract: type[S], target: str | None = None) -> S:
        with self._expecting(contract, target) as (name, known):
            self._connected(None)
            self._learn(name, known)
            self._check(name, known, None)
        return make_proxy(self, contract, name, known, self._options)

    def _check(self, target: str, contract: Contract, deadline: float | None) -> None:
        """The server has what this contract needs; one that is not ours is taken at its word."""
        key = target, contract.fingerprint
        if key in self._agreed:
            return
        targets = self._targets(deadline)
        if targets is not None and self._differs(targets, target, contract):
            self._fits(target, contract, self._ask(DESCRIBE, target), self._ask(DESCRIPTOR, target))
        self._agreed.add(key)

    def subscribe(self, types: Any, *, backlog: int = 1000) -> Any:
        return Subscription(self, Subscribed(self._types_of(types), backlog))

    def close(self) -> None:
        super().close()
        for each in tuple(self._feeding):
            each._end()
