"""Calls from threads.

    with ipckit.client("unix://shop", Shop) as shop:      # typed: `shop` is a Shop whose methods call the server
        shop.price("tea")
        ipckit.rpc.using(shop, timeout=0.5).price("tea")  # with a deadline

    with ipckit.client("unix://shop") as client:          # untyped
        client.call("shop", "price", "tea", timeout=0.5)

Any number of threads may use one client at once: their calls share one connection, and whoever waits receives for the others.
A lost connection ends the calls that are under way, and the next call makes a new one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from .. import errors
from .._url import Url
from .._wait import run
from ..channel import AsyncChannel, Channel
from ._calling import DESCRIBE, NO_ARGUMENTS, TARGETS, Base, Live
from ._clientcore import ClientCall
from ._connection import BROKEN, Waiter
from ._exposed import BUILT_IN
from ._intercepting import to_be_awaited
from ._place import native_class
from ._proxy import P, R, Remote, make_proxy
from ._request import CallOptions, Interceptor, Request, Subscribed, encoded
from ._results import Results, Subscription
from ._short import short_way
from .contract import Method, Shape, unwritable

S = TypeVar("S")
T = TypeVar("T")

#: How long connecting may take unless said otherwise, in seconds; the first time as well as again.
PATIENCE = 10.0
#: Who sends a stream looks now and then, in seconds, whether anybody still wants it.
_UNHEARD = 0.005


class Client(Base):
    """A connection to a server that is made again when it is lost. See `client` for the arguments."""

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
        if to_be_awaited(interceptors):
            raise errors.BadOption("an interceptor is a coroutine function", hint="`ipckit.aio.client` awaits it")
        super().__init__(
            where,
            timeout=timeout,
            call_timeout=call_timeout,
            metadata=metadata,
            interceptors=interceptors,
            require=require,
        )
        self._dialing = threading.Lock()

    def __new__(cls, where: Any, /, **_: Any) -> Self:
        """Of the transport's own class, where it makes calls its own way."""
        native: type[Self] | None = native_class(where, "Client") if cls is Client else None
        return object.__new__(native or cls)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def call(
        self,
        target: str,
        method: str,
        /,
        *args: Any,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        **named: Any,
    ) -> Any:
        """Call a method without a contract. Values are plain (maps, lists, text ...).

        The result, or an iterator where the method streams. The stream of a method that takes one is its argument `stream`.
        `timeout`: seconds until the deadline. Raises what typed calls raise, and UnknownTarget, UnknownMethod.
        """
        began, options = time.monotonic(), self._options.with_(timeout, metadata)
        found = self._known(target, method)
        if found is None:
            self._ask_about(target, options)
            found = self._known(target, method)
        if found is None:
            raise self._unheard_of(target, method)
        with self._as_it_was_described(target):
            return self._call(target, found, args, named, options.since(began))

    def _ask_about(self, target: str, options: CallOptions) -> None:
        """Have it described. Raises UnknownTarget."""
        self._described[target] = self._perform(self._request(BUILT_IN, DESCRIBE, (target,), {}, options))

    def _call(
        self, target: str, method: Method, args: tuple[Any, ...], named: dict[str, Any], options: CallOptions
    ) -> Any:
        request = self._request(target, method, args, named, options)
        if self._interceptors:
            return self._intercepted(request, lambda: self._perform(request))
        return self._perform(request)

    def _perform(self, request: Request) -> Any:
        while True:
            try:
                conn, call = self._start(request)
                if request.method.shape.streams_out:
                    return Results(self, conn, call, request)
                try:
                    if request.stream is not None:
                        self._feed(conn, call, request)
                    self._await(conn, call, request)
                finally:
                    self._give_up(conn, call)
                return self._outcome(conn, call, request)
            except errors.IpcError as error:
                if not self._worth_again(error, request):
                    raise

    def _start(self, request: Request) -> tuple[Live, ClientCall]:
        """The call on its way. A connection that turns out to be lost before it could be sent costs nothing."""
        body = encoded(request, self.url)
        while True:
            conn = self._connected(request.deadline)
            call: ClientCall | None = None
            try:
                call = self._begin(conn, request, body)
                self._flush(conn, request.deadline)
            except BROKEN as error:
                self._broke(conn, error)
                if self.closed:
                    raise
            except BaseException as error:  # the deadline, or Ctrl-C
                if call is not None:
                    self._give_up(conn, call)
                if isinstance(error, errors.Timeout):
                    raise self._overdue(request) from error
                raise
            else:
                return conn, call

    def _await(self, conn: Live, call: ClientCall, request: Request) -> None:
        if not self._wait(conn, call, lambda: call.done, request.deadline):
            raise self._overdue(request)

    def _give_up(self, conn: Live, call: ClientCall) -> None:
        """Nothing for a call that is done."""
        if call.done:
            return
        with conn.mutex:
            conn.core.cancel(call)
        with suppress(errors.IpcError):
            conn.try_flush()

    def _call_off(self, conn: Live, call: ClientCall) -> None:
        """Give up a call that another thread may wait for. If one receives it is woken: by the answer to a question of ours."""
        self._give_up(conn, call)
        call.changed()
        if conn.turn.locked() and conn.error is None:
            with conn.mutex:
                conn.core.begin(BUILT_IN, TARGETS.name, NO_ARGUMENTS, time.monotonic())
            with suppress(errors.IpcError):
                conn.try_flush()

    def _feed(self, conn: Live, call: ClientCall, request: Request) -> None:
        """Send the stream of this call, until it ends or nobody wants it any more."""
        encode = request.method.wire("msgpack", named=False).encode
        heard = time.monotonic()
        for value in request.stream:
            now = time.monotonic()
            if request.deadline is not None and now >= request.deadline:
                raise self._overdue(request)
            if now - heard > _UNHEARD:
                heard = now
                self._glance(conn)
            if call.credit <= 0:
                self._wait(conn, call, lambda: call.done or call.credit > 0, request.deadline)
            try:
                body = encode(value)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise unwritable(error, self.url, request.operation) from error
            with conn.mutex:
                wanted = call.credit > 0 and conn.core.item(call, body)
            if not wanted:
                return
            self._send(conn, request.deadline)
        with conn.mutex:
            conn.core.end(call)
        self._send(conn, request.deadline)

    def _send(self, conn: Live, deadline: float | None) -> None:
        """What was not sent by the deadline stays in the outbox: whoever waits for the answer finds that its time is up."""
        try:
            self._flush(conn, deadline)
        except BROKEN as error:
            self._broke(conn, error)
        except errors.Timeout:
            pass

    # -- waiting: whoever waits turns the loop -------------------------------------------------------------------------

    def _wait(self, conn: Live, whose: Any, ready: Callable[[], bool], deadline: float | None) -> bool:
        """Until `ready`, the end of the connection, or the deadline. Receives for everybody while nobody else does."""
        if ready():
            return True
        waiter = Waiter()
        whose.watchers.append(waiter.wake)
        conn.waiting.append(waiter)
        try:
            while not ready() and conn.error is None:
                if deadline is not None and time.monotonic() >= deadline:
                    return False
                if conn.turn.acquire(False):
                    try:
                        while not ready() and conn.error is None:
                            if not self._receive(conn, deadline):
                                return False
                    finally:
                        conn.turn.release()
                else:
                    waiter.sleep(None if deadline is None else max(deadline - time.monotonic(), 0.0))
        finally:
            whose.watchers.remove(waiter.wake)
            conn.waiting.remove(waiter)
            if conn.waiting and not conn.turn.locked():  # it may have been handed to us, and we need it no more
                conn.hand_over()
        return True

    def _glance(self, conn: Live) -> None:
        """Hear what is there, unless somebody else receives."""
        if conn.turn.acquire(False):
            try:
                self._receive(conn, time.monotonic())
            finally:
                conn.turn.release()
                conn.hand_over()

    def _receive(self, conn: Live, deadline: float | None) -> bool:
        """Hear what comes next. False: nothing came before the deadline."""
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        try:
            if conn.fused is not None:
                conn.heard(conn.fused.recv_many(256, left))
            else:
                conn.heard(run(conn.receive(), conn.rx, left))
            if conn.core.outbox:
                self._flush(conn, deadline)
        except errors.Timeout:
            return False
        except BROKEN as error:
            self._broke(conn, error)
        return True

    def _flush(self, conn: Live, deadline: float | None) -> None:
        if not conn.try_flush():
            run(conn.flush(), conn.tx, None if deadline is None else max(deadline - time.monotonic(), 0.0))

    def _connected(self, deadline: float | None) -> Live:
        conn = self._lines.conn
        if conn is not None and conn.rested():
            self._glance(conn)
        if conn is not None and conn.good:
            return conn
        with self._dialing:
            conn = self._lines.conn
            if conn is not None and conn.good:
                return conn
            self._gate.check("call")
            return run(self._dial(), self._dial_lane, self._patient_until(deadline))

    # -- the short way -------------------------------------------------------------------------------------------------

    def _caller(self, target: str, method: Method, options: CallOptions) -> Callable[..., Any]:
        """The function behind a typed method."""

        def call(*args: Any, **named: Any) -> Any:
            return self._call(target, method, args, named, options)

        short = method.shape is Shape.UNARY and method.plain and not options.metadata and not self._interceptors
        return short_way(self, target, method, options, call) if short else call

    def _resume(self, conn: Live, call: ClientCall, request: Request) -> Any:
        """A call that took the short way and met something else."""
        try:
            self._await(conn, call, request)
            return self._outcome(conn, call, request)
        except errors.IpcError as error:
            if self._worth_again(error, request):
                return self._perform(request)
            raise

    # -- contracts, pushes, the end ------------------------------------------------------------------------------------

    def proxy(self, contract: type[S], target: str | None = None) -> S:
        """An object that is typed as `contract` and calls this server. Compares the contracts when it is connected."""
        with self._expecting(contract, target) as (name, known):
            conn = self._connected(None)
            if not conn.agrees(name, known):  # it was there before
                request = self._request(BUILT_IN, DESCRIBE, (name,), {}, self._options)
                self._compare(conn, name, known, self._perform(request))
        return make_proxy(self, contract, name, known, self._options)

    def subscribe(self, types: Any, *, backlog: int = 1000) -> Subscription:
        """The messages of these types that the server broadcasts, from when this returns: `for value in subscription`.

        Args:
            types: a message type, its name, or several.
            backlog: messages that may wait here; beyond it the oldest are dropped, and `Subscription.lost` counts them.
        """
        return Subscription(self, Subscribed(self._types_of(types), backlog))

    def close(self) -> None:
        """Immediate and idempotent. Calls under way raise Closed."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@overload
def client(
    where: str | Url | Channel[Any] | AsyncChannel[Any],
    contract: None = None,
    /,
    *,
    timeout: float | None = PATIENCE,
    call_timeout: float | None = None,
    metadata: Mapping[str, str] | None = None,
    interceptors: Sequence[Interceptor] = (),
    require: Collection[str] = (),
) -> Client: ...
@overload
def client(  # type: ignore[overload-overlap]  # a class can be called as well
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
def client(
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
def client(
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
    """Reach a server. With a contract: a typed object whose methods call it; without: a `Client`.

    Args:
        where: the URL of the server, or a channel to it (one end of a `pair`), which becomes the client's.
        contract: a Service class, or a function marked with `@ipckit.rpc`. It is compared with the server's when it is connected.
        target: the name that the service is exposed under; by default the class's, in lower case.
        timeout: seconds for connecting, the first time and again; None waits until there is a server.
        call_timeout: seconds until the deadline of each call; `using` gives single calls another one. None: no deadline.
        metadata: header names (lower case) and values that travel with every call.
        interceptors: `(request, proceed) -> result`, the first is the outermost.
        require: capabilities that the transport must have.

    Raises: NothingListening; UnknownTarget; SchemaError for a contract that the server's breaks, naming method and field; what
        opening a transport raises. Calls raise: RemoteError, DeadlineExceeded, PeerDied, PeerClosed, TargetBusy, RateLimited,
        ShuttingDown, SchemaError, CodecError, UnknownTarget, UnknownMethod, MessageTooLarge, Closed.
    """
    made = Client(
        where,
        timeout=timeout,
        call_timeout=call_timeout,
        metadata=metadata,
        interceptors=interceptors,
        require=require,
    )
    try:
        if contract is not None:
            return made.proxy(contract, target)
        made._connected(None)
    except BaseException:
        made.close()
        raise
    return made
