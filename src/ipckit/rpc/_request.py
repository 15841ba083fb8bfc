"""What a caller wants, before it has a connection: `Request`, one call; `Subscribed`, the pushes of some types."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .. import errors
from .._url import Url
from ..message import check_headers
from . import events
from .contract import Method, Shape, decoder, unwritable

#: `interceptor(request, proceed)`: look at the request, change its metadata, return what `proceed()` returns (awaitable in aio,
#: but for streams; a coroutine function awaits `proceed()` always).
Interceptor = Callable[["Request", Callable[[], Any]], Any]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How calls are made. `timeout`: seconds until the deadline, which travels with the call; None: no deadline."""

    timeout: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.timeout is not None and not self.timeout >= 0:
            raise errors.BadOption(f"a timeout of {self.timeout!r}: it is None, 0 or more seconds")

    def with_(self, timeout: float | None, metadata: Mapping[str, str] | None) -> CallOptions:
        merged = {**self.metadata, **check_headers(metadata)} if metadata else self.metadata
        return replace(self, timeout=self.timeout if timeout is None else timeout, metadata=merged)

    def deadline(self) -> float | None:
        """Of a call that begins now, on the clock of `time.monotonic`."""
        return None if self.timeout is None else time.monotonic() + self.timeout

    def since(self, began: float) -> CallOptions:
        """What is left of them, for a call that began at this time."""
        if self.timeout is None:
            return self
        return replace(self, timeout=max(self.timeout - (time.monotonic() - began), 0.0))


@dataclass(slots=True)
class Request:
    """One call, as interceptors see it. `metadata` may be changed."""

    target: str
    method: Method
    args: tuple[Any, ...]
    stream: Any
    metadata: dict[str, str]
    deadline: float | None

    @property
    def operation(self) -> str:
        return f"{self.target}.{self.method.name}"

    @property
    def retriable(self) -> bool:
        """It may be begun a second time though the first may have had an effect."""
        return self.method.options.idempotent and self.method.shape is Shape.UNARY


@dataclass(frozen=True, slots=True)
class Left:
    """In place of an argument that an untyped caller left to the server. `default`: what the server says it is, or `...`."""

    default: Any

    def described(self, operation: str) -> Any:
        if self.default is ...:
            raise TypeError(
                f"{operation}: give the arguments before this one as well: the server did not tell their defaults"
            )
        return self.default


def encoded(request: Request, url: Url) -> bytes:
    """Its arguments, before there is a connection that they could cost. Raises CodecError, TypeError.

    An untyped caller leaves optional ones to the server: those at the end are not sent, the others as the server described them.
    """
    args = request.args
    while args and isinstance(args[-1], Left):
        args = args[:-1]
    if any(isinstance(each, Left) for each in args):
        args = tuple(each.described(request.operation) if isinstance(each, Left) else each for each in args)
    try:
        return request.method.wire("msgpack", named=False).encode_args(args)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise unwritable(error, url, request.operation) from error


class Subscribed:
    """The pushes of some types, for one who listens. Those who do not keep up lose the oldest, and are told how many."""

    def __init__(self, types: dict[str, Any], backlog: int) -> None:
        if backlog < 1:
            raise errors.BadOption(f"a backlog of {backlog!r}: one message at least has to fit")
        self.types = types
        self.lost = 0
        self.watchers: list[Callable[[], None]] = []
        self.pushes: deque[Any] = deque()
        self._backlog = backlog
        self._decoders = {name: decoder("msgpack", kind) for name, kind in types.items()}

    def changed(self) -> None:
        """There is a message, or the connection is lost: who waits looks."""
        for watcher in tuple(self.watchers):
            watcher()

    def offer(self, push: events.Push) -> None:
        if push.type not in self.types:
            return
        self.lost += push.missed
        if len(self.pushes) >= self._backlog:
            self.pushes.popleft()
            self.lost += 1
        self.pushes.append(push)
        self.changed()

    def value(self, push: events.Push) -> Any:
        return self._decoders[push.type](push.body)
