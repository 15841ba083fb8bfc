"""What the two clients share: everything but the waiting.

`Base` knows the server's address, what is expected of it, and how a connection is made (steps, for either driver).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec

from .. import errors
from .._endpoint import Endpoint
from .._spi import Abandoning, Fused, Steps, Wait
from .._url import Url
from .._wait import Gate, Lane
from ..channel import AsyncChannel, Channel
from ..message import check_headers
from . import compat, events, failures
from ._clientcore import ClientCall
from ._connection import BROKEN, Connection, again
from ._exposed import BUILT_IN
from ._intercepting import around, checked
from ._place import Place
from ._request import CallOptions, Interceptor, Left, Request, Subscribed
from ._tracing import outgoing
from .contract import (
    Contract,
    Method,
    MethodOptions,
    Parameter,
    Service,
    Shape,
    contract_of,
    rpc,
    target_name,
)

_FIRST_PAUSE, _LAST_PAUSE = 0.01, 1.0


class _Resource:
    """The current connection, as an Endpoint wants it."""

    def __init__(self) -> None:
        self.conn: Live | None = None
        self.old: list[Live] = []

    @property
    def native(self) -> Any:
        return None if self.conn is None else self.conn.link.native

    def close(self) -> None:
        conn, self.conn = self.conn, None
        for each in (*self.old, *([conn] if conn is not None else [])):
            each.close()

    def abandon(self) -> None:
        for each in (*self.old, *([self.conn] if self.conn is not None else [])):
            if isinstance(each.link, Abandoning):
                each.link.abandon()


class Live(Connection):
    """A connection with what it is waited on by."""

    def __init__(self, link: Any, url: Url, pushed: Callable[[events.Push], None]) -> None:
        super().__init__(link, url, pushed)
        self.gate = Gate(url, link.close)
        self.rx = Lane(self.gate, "call")
        self.tx = Lane(self.gate, "call")
        self.agreed: set[tuple[str, str]] = set()  # targets, and the fingerprints of contracts that they fit
        self.fused: Fused | None = link if isinstance(link, Fused) else None

    def agrees(self, target: str, contract: Contract) -> bool:
        """The server was found to have what this contract needs."""
        return (target, contract.fingerprint) in self.agreed

    def close(self) -> None:
        """Its calls end with it: who waits for one may be asleep where the gate does not wake it."""
        self.break_off(errors.Closed("the client was closed", url=self.url))
        self.gate.close()
        if self.fused is not None:  # its own calls wait inside it, not at our gate
            self.link.close()


class Base(Endpoint):
    """Addresses, expectations, retries. Subclassed by the shells."""

    def __init__(
        self,
        where: str | Url | Channel[Any] | AsyncChannel[Any],
        *,
        timeout: float | None,
        call_timeout: float | None,
        metadata: Mapping[str, str] | None,
        interceptors: Sequence[Interceptor],
        require: Collection[str],
    ) -> None:
        self._options = CallOptions(call_timeout, dict(check_headers(metadata)))
        self._interceptors = checked(interceptors)
        self._place = Place(where, require, "client")
        self._lines = _Resource()
        super().__init__(self._lines, self._place.url, self._place.capabilities)
        self._patience = timeout
        self._expected: dict[tuple[str, str], Contract] = {}  # by target and fingerprint
        self._described: dict[str, dict[str, Any]] = {}
        self._subscriptions: list[Subscribed] = []
        self._dial_lane = Lane(self._gate, "client", passing=True)
        self._pause = 0.0
        self.reconnects = -1

    def _close(self) -> None:
        super()._close()
        if not self._gate.foreign:
            self._lines.close()
            self._place.discard()
            self._subscribers_look()

    # -- connecting ----------------------------------------------------------------------------------------------------

    def _dial(self) -> Steps[Live]:
        """A connection whose server has what we expect. A server that leaves before it said hello is waited for, as one that
        is not there yet. Raises SchemaError for a contract that is incompatible.
        """
        pause = _FIRST_PAUSE
        if self._pause:  # not at once: the last one was lost as soon as it was made
            try:
                yield Wait((), self._pausing())
            except errors.Timeout as timeout:
                raise errors.NothingListening(
                    "the connection was lost, and there was no time to make another", url=self.url, operation="client"
                ) from timeout
        while True:
            conn = Live((yield from self._place.connect()), self.url, self._pushed)
            try:
                yield from self._greet(conn)
            except errors.Timeout as timeout:
                conn.close()
                raise errors.NothingListening(
                    "somebody listens there, and did not answer in time", url=self.url, operation="client"
                ) from timeout
            except errors.PeerError as error:
                conn.close()
                if self._place.end is not None:
                    raise
                last = error
            except BaseException:
                conn.close()
                raise
            else:
                self._adopt(conn)
                return conn
            try:
                yield Wait((), pause)
            except errors.Timeout:
                raise errors.NothingListening(
                    "the server closed the connection before it said hello", url=self.url, operation="client"
                ) from last
            pause = min(pause * 2, _LAST_PAUSE)

    def _greet(self, conn: Live) -> Steps[None]:
        conn.core.hello(dict(self._expected.keys()))
        yield from conn.flush()
        while conn.core.server is None:
            conn.heard((yield from conn.receive()))
            if conn.core.refusal is not None:
                raise failures.error_of(conn.core.refusal, self.url, "client")
        yield from self._resubscribe(conn)
        for (target, _), contract in tuple(self._expected.items()):
            yield from self._agree(conn, target, contract)

    def _adopt(self, conn: Live) -> None:
        """New calls go over this one; calls under way are finished on the old one, whose server is leaving."""
        old = self._lines.conn
        every = [*self._lines.old, *([old] if old is not None else [])]
        self._lines.old = [each for each in every if each.error is None and each.core.calls]
        for each in every:
            if each not in self._lines.old:
                each.close()
        self._lines.conn = conn
        self.reconnects += 1

    def _agree(self, conn: Live, target: str, contract: Contract) -> Steps[None]:
        """What this new connection's server has at `target`, against what we expect of it."""
        assert conn.core.server is not None
        theirs = conn.core.server.targets.get(target)
        if theirs == contract.fingerprint:
            conn.agreed.add((target, theirs))
        elif theirs is None:
            have = ", ".join(sorted(conn.core.server.targets)) or "nothing"
            raise errors.UnknownTarget(
                f"nothing is exposed as {target!r}", url=self.url, operation="client", hint=f"there is: {have}"
            )
        else:
            self._compare(conn, target, contract, (yield from self._describe(conn, target)))

    def _compare(self, conn: Live, target: str, contract: Contract, description: dict[str, Any]) -> None:
        """Raises SchemaError for what the server has changed and a caller of `contract` would break on."""
        self._described[target] = description
        broken = compat.check(contract.description, description)
        if broken:
            raise errors.SchemaError(
                f"the server's {target!r} is not compatible with {contract.name}: " + "; ".join(broken),
                url=self.url,
                operation="client",
                hint="`ipckit contract check` compares the two",
            )
        conn.agreed.add((target, contract.fingerprint))

    def _describe(self, conn: Live, target: str) -> Steps[dict[str, Any]]:
        with conn.mutex:
            call = conn.core.begin(BUILT_IN, DESCRIBE.name, msgspec.msgpack.encode((target,)), time.monotonic())
        yield from conn.flush()
        while not call.done:
            conn.heard((yield from conn.receive()))
        if call.failure is not None:
            raise failures.error_of(call.failure, self.url, "client")
        description: dict[str, Any] = msgspec.msgpack.decode(call.result or b"\x80")
        return description

    def _broke(self, conn: Live, error: errors.IpcError) -> None:
        """This connection is over. The client is not: the next call connects again."""
        if self._lines.conn is conn:
            young = time.monotonic() - conn.since < 1
            self._pause = min(max(self._pause * 2, _FIRST_PAUSE), _LAST_PAUSE) if young else 0.0
            self._lines.conn = None
        conn.break_off(error)
        conn.close()
        self._subscribers_look()

    def _patient_until(self, deadline: float | None) -> float | None:
        """How long connecting again may take, in seconds: as the first time, and within the deadline of the call."""
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        if self._patience is None or left is None:
            return left if self._patience is None else self._patience
        return min(left, self._patience)

    def _patience_ends(self) -> float | None:
        return None if self._patience is None else time.monotonic() + self._patience

    def _pausing(self) -> float:
        return self._pause * random.uniform(0.5, 1.0)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _request(
        self, target: str, method: Method, args: tuple[Any, ...], named: dict[str, Any], options: CallOptions
    ) -> Request:
        positional, stream = method.bind(args, named)
        return Request(target, method, positional, stream, {**outgoing(), **options.metadata}, options.deadline())

    def _begin(self, conn: Live, request: Request, body: bytes) -> ClientCall:
        with conn.mutex:
            if conn.error is not None:
                raise again(conn.error, request.operation)
            try:
                return conn.core.begin(
                    request.target,
                    request.method.name,
                    body,
                    time.monotonic(),
                    deadline=request.deadline,
                    metadata=request.metadata,
                )
            except errors.MessageTooLarge as error:  # its metadata
                error.url, error.operation = str(self.url), request.operation
                raise

    def _outcome(self, conn: Live, call: ClientCall, request: Request) -> Any:
        """The result of a call that is done. Raises what it failed with."""
        self._raise_failure(conn, call, request)
        assert call.result is not None
        return self._read(request.method.wire("msgpack", named=False).decode_result, call.result, request.operation)

    def _read(self, decode: Callable[[Any], Any], body: Any, operation: str) -> Any:
        """What the server sent. Raises SchemaError, CodecError, which say of which call it was."""
        try:
            return decode(body)
        except (errors.SchemaError, errors.CodecError) as error:
            error.url, error.operation = str(self.url), operation
            raise

    def _raise_failure(self, conn: Live, call: ClientCall, request: Request) -> None:
        if call.failure is not None:
            raise failures.error_of(call.failure, self.url, request.operation)
        if call.result is None and not call.complete and conn.error is not None:
            raise again(conn.error, request.operation)

    def _worth_again(self, error: errors.IpcError, request: Request) -> bool:
        """It ended with its connection or its server, which says nothing about the call, and may be made again."""
        if self.closed:
            return False
        if isinstance(error, failures.NotTaken):
            return request.stream is None
        if isinstance(error, errors.SchemaError | errors.CodecError):  # ProtocolErrors too, but of this call's values
            return False
        return isinstance(error, (*BROKEN, errors.ShuttingDown)) and request.retriable

    def _overdue(self, request: Request) -> errors.DeadlineExceeded:
        return errors.DeadlineExceeded("no answer before the deadline", url=self.url, operation=request.operation)

    def _intercepted(self, request: Request, proceed: Callable[[], Any]) -> Any:
        return around(self._interceptors, request, proceed)()

    # -- what is typed and what is not ---------------------------------------------------------------------------------

    @contextmanager
    def _expecting(self, contract: Any, target: str | None) -> Iterator[tuple[str, Contract]]:
        """From now on every connection is to have this contract; unless the block, which connects, finds that it does not fit."""
        if isinstance(contract, Service):
            kind = type(contract).__name__
            raise errors.ConfigError(
                f"this is a {kind}, not its contract", url=self.url, hint=f"give the class: {kind}"
            )
        known = contract_of(contract)
        key = target or target_name(contract), known.fingerprint
        new = key not in self._expected
        self._expected[key] = known
        try:
            yield key[0], known
        except BaseException:
            if new:
                self._expected.pop(key, None)
            raise

    def _known(self, target: str, name: str) -> Method | None:
        """A method as the server described it, for callers without a contract. None: it has said nothing of it so far."""
        methods = self._described.get(target, {}).get("methods", {})
        if name not in methods:
            name = next((each for each, method in methods.items() if method.get("message") == name), name)
        return _as_described(name, methods[name]) if name in methods else None

    def _unheard_of(self, target: str, name: str) -> errors.UnknownMethod:
        """The server has described the target just now, and nothing there has this name."""
        have = ", ".join(sorted(self._described[target]["methods"]))
        return errors.UnknownMethod(
            f"{target!r} has no method {name!r}", url=self.url, operation="call", hint=f"it has: {have}"
        )

    @contextmanager
    def _as_it_was_described(self, target: str) -> Iterator[None]:
        """A target that answers otherwise than it was described is another one by now, and is asked again next time."""
        try:
            yield
        except (errors.SchemaError, errors.UnknownMethod, errors.UnknownTarget):
            self._described.pop(target, None)
            raise

    # -- pushes --------------------------------------------------------------------------------------------------------

    def _subscribe_to(self, conn: Live, subscribed: Subscribed) -> ClientCall | None:
        """Ask for them, on a connection that was there before; one that is made from now on is made with them."""
        with conn.mutex:
            if conn.error is not None:
                return None
            return conn.core.subscribe(list(subscribed.types))

    def _resubscribe(self, conn: Live) -> Steps[None]:
        """A new connection has the subscriptions of the old one. Raises what the server says if it refuses."""
        types = sorted({name for each in self._subscriptions for name in each.types})
        if types:
            with conn.mutex:
                call = conn.core.subscribe(types)
            yield from conn.flush()
            while not call.done:
                conn.heard((yield from conn.receive()))
            self._raise_refusal(call)

    def _raise_refusal(self, call: ClientCall) -> None:
        if call.failure is not None:
            raise failures.error_of(call.failure, self.url, "subscribe")

    def _unsubscribe(self, subscribed: Subscribed) -> None:
        """Ask for those no more that nobody else here wants."""
        if subscribed not in self._subscriptions:
            return
        self._subscriptions.remove(subscribed)
        gone = [name for name in subscribed.types if all(name not in each.types for each in self._subscriptions)]
        conn = self._lines.conn
        if gone and conn is not None and conn.good:
            with conn.mutex:
                conn.core.unsubscribe(gone)
            with suppress(errors.IpcError):
                conn.try_flush()

    def _subscribers_look(self) -> None:
        for each in tuple(self._subscriptions):
            each.changed()

    def _pushed(self, push: events.Push) -> None:
        for each in tuple(self._subscriptions):
            each.offer(push)

    def _types_of(self, types: Any) -> dict[str, Any]:
        """Message types by name; a name alone is taken as it comes."""
        every = [types] if isinstance(types, str | type) else list(types)
        return {
            each if isinstance(each, str) else each.__name__: Any if isinstance(each, str) else each for each in every
        }


def _as_described(name: str, described: dict[str, Any]) -> Method:
    parameters = tuple(
        Parameter(each["name"], Any)
        if each["required"]
        else Parameter(each["name"], Any, Left(each.get("default", ...)))
        for each in described["parameters"]
    )
    shape = Shape(described["shape"])
    stream = "stream" if shape.streams_in else None
    options = MethodOptions(idempotent=described.get("idempotent", False))
    return Method(name, _no_function, shape, parameters, Any, stream, len(parameters), Any, None, False, options)


class _Builtin(Service):
    """The target `ipckit` that every server has, as far as clients use it."""

    @rpc(idempotent=True)
    def describe(self, target: str) -> dict[str, Any]:
        raise NotImplementedError

    @rpc(idempotent=True)
    def targets(self) -> dict[str, str]:
        raise NotImplementedError


NO_ARGUMENTS = msgspec.msgpack.encode(())
DESCRIBE, TARGETS = (contract_of(_Builtin).methods[name] for name in ("describe", "targets"))


def _no_function(*_: Any) -> Any:
    raise TypeError("this method is the server's")
