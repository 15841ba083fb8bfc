"""What every endpoint has, whatever its pattern: how it is opened, how it is closed, what a fork does to it.

`Opening` makes a URL ready: every mistake is told before anything is opened. `Endpoint` is an address, a gate and the thing
underneath; patterns add their verbs.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar, runtime_checkable

from . import _registry, errors
from ._capabilities import Capabilities, Pattern
from ._spi import Abandoning, Batching, Draining, Link, Located, Outlet, Steps, Want
from ._url import Url, parse
from ._wait import Gate, Lane, arun, run
from .codecs import Codec, choose
from .message import Parcel

_AT_ONCE = 1024  # messages of a batch that an outlet is offered in one call

T = TypeVar("T")


class Resource(Protocol):
    """A link, a listener, an outlet, an intake."""

    @property
    def native(self) -> Any: ...

    def close(self) -> None: ...


_open: weakref.WeakSet[Endpoint] = weakref.WeakSet()


def _let_go() -> None:
    """In a forked child: give up inherited descriptors, or the peer would not hear that its partner died."""
    for endpoint in tuple(_open):
        if isinstance(endpoint._resource, Abandoning):
            endpoint._resource.abandon()


os.register_at_fork(after_in_child=_let_go)


class Endpoint:
    """An address, a gate, an end."""

    url: Url

    def __init__(self, resource: Resource, url: Url, capabilities: Capabilities) -> None:
        self.url = url
        self.capabilities = capabilities
        self._resource = resource
        self._gate = Gate(url, resource.close)
        _open.add(self)

    @property
    def closed(self) -> bool:
        return self._gate.closed

    @property
    def native(self) -> Any:
        """The object underneath (socket, zmq socket, broker client ...), for what ipckit does not wrap."""
        return self._resource.native

    def _close(self) -> None:
        self._gate.close()

    def _forget(self) -> None:
        """What is underneath is another endpoint's."""
        _open.discard(self)

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if _finalizing():  # threads stand still now, perhaps with a lock of ours; the kernel closes everything
            return
        gate = getattr(self, "_gate", None)
        if gate is not None and not gate.closed and not gate.foreign:
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            finally:  # a warning may be an error
                self._close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}{' closed' if self.closed else ''}>"


def located(resource: object, url: Url) -> Url:
    """Where it can be reached, where that is more than what was asked for."""
    return resource.url if isinstance(resource, Located) else url


def body_of(data: Any) -> bytes:
    """What a codec made, as bytes. Raises TypeError for what is no buffer: `bytes` would make n zeros of a number."""
    return data if type(data) is bytes else bytes(memoryview(data))


def put(outlet: Outlet, parcel: Parcel) -> Steps[None]:
    while not outlet.try_put(parcel):
        wait = outlet.arm(Want.SEND)
        if outlet.try_put(parcel):
            return
        yield wait


def put_all(outlet: Outlet, parcels: Sequence[Parcel], url: Url, operation: str) -> Steps[int]:
    """Put and `confirm` them; how many, which is fewer only when the time was up."""
    at_once = outlet.try_put_many if len(parcels) > 1 and isinstance(outlet, Batching) else None
    done = 0
    try:
        while done < len(parcels):
            if at_once is not None and (taken := at_once(parcels[done : done + _AT_ONCE])):
                done += taken
            else:
                yield from put(outlet, parcels[done])
                done += 1
    except errors.Timeout:
        if not done:
            raise
        confirm_in_time(outlet, parcels[:done], url, operation)
        return done
    if done:
        yield from confirm(outlet, parcels, url, operation)
    return done


def confirm(outlet: Outlet, parcels: Sequence[Parcel], url: Url, operation: str) -> Steps[None]:
    """Return when all of them are in good hands; raise what became of the first that is not, or OutcomeUnknown."""
    try:
        while not outlet.try_flush():
            wait = outlet.arm(Want.SEND)
            if outlet.try_flush():
                break
            yield wait
    except errors.OutcomeUnknown:
        raise
    except errors.Timeout as timeout:
        _raise_failure(parcels)
        raise _unconfirmed(parcels, url, operation) from timeout
    _raise_failure(parcels)


def confirm_in_time(outlet: Outlet, parcels: Sequence[Parcel], url: Url, operation: str) -> None:
    """`confirm` for whoever has no time left. Where they depend on this process anyway, having taken them is all there is."""
    confirmed = outlet.try_flush()
    _raise_failure(parcels)
    if not confirmed and not isinstance(outlet, Draining):
        raise _unconfirmed(parcels, url, operation)


def _unconfirmed(parcels: Sequence[Parcel], url: Url, operation: str) -> errors.OutcomeUnknown:
    return errors.OutcomeUnknown(
        "sent, and nobody confirmed it in time",
        url=url,
        operation=operation,
        message_id=parcels[-1].id,
        message_ids=tuple(parcel.id for parcel in parcels),
        hint=(
            "sending it again with id= the same makes no duplicate where the transport is durable"
            if operation == "send"
            else "it may still arrive; published again, it may come twice"
        ),
    )


def _raise_failure(parcels: Sequence[Parcel]) -> None:
    for parcel in parcels:
        if parcel.failure is not None:
            raise parcel.failure


@runtime_checkable
class Yielding(Protocol):
    """A Channel, which may be given where a URL is expected."""

    url: Url
    codec: Codec[Any]

    def yield_link(self, operation: str) -> Link: ...


class Opening:
    """A URL made ready: transport found, pattern and requirements checked, codec chosen."""

    def __init__(
        self,
        url: str | Url | Yielding,
        codec: str | Codec[Any] | None,
        type: Any,
        require: Collection[str],
        pattern: Pattern,
        operation: str,
    ) -> None:
        self.end = url if isinstance(url, Yielding) else None
        self.operation = operation
        self.url = url.url if isinstance(url, Yielding) else parse(url)
        required = frozenset(
            (require,) if isinstance(require, str) else require
        )  # a str is a collection too, of letters
        self.transport = _registry.open_transport(self.url, required)
        self.capabilities = self.transport.capabilities_of(self.url)
        if pattern not in self.capabilities.patterns:
            raise errors.Unsupported(
                f"there is no pattern {pattern!r} at this address{_why_not(pattern, self.capabilities)}",
                url=self.url,
                operation=operation,
                hint=f"it has: {', '.join(sorted(self.capabilities.patterns))}",
            )
        inherits = self.end is not None and codec is type is None
        self.codec = self.end.codec if inherits and self.end is not None else choose(codec, type)
        self._lane = Lane(Gate(self.url, lambda: None), operation, passing=True)

    def run(self, steps: Steps[T], timeout: float | None) -> T:
        with closing(self._lane.gate):
            return run(steps, self._lane, timeout)

    async def arun(self, steps: Steps[T], timeout: float | None) -> T:
        with closing(self._lane.gate):
            return await arun(steps, self._lane, timeout)


def _why_not(pattern: Pattern, capabilities: Capabilities) -> str:
    if capabilities.reliable or pattern not in ("queue", "rpc"):
        return ""
    what = "a queue loses nothing" if pattern == "queue" else "what is lost would be a call that is never answered"
    return f": {what}, and this transport does not declare 'reliable'"
