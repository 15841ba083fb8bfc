"""How channels come to be: `listen` takes a name, `connect` reaches it, `pair` makes two ends at once.

A `Listener` is the name while it is taken; each `accept` is a Channel. Those with an `a` in front are for `ipckit.aio`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from . import _options, errors
from ._capabilities import Capabilities
from ._endpoint import Endpoint, Opening
from ._spi import Link, Steps, Want
from ._spi import Listener as LinkListener
from ._url import Url
from ._wait import Lane, arun, run
from .channel import AsyncChannel, Channel
from .codecs import Codec

T = TypeVar("T")


# -- names ---------------------------------------------------------------------------------------------------------


def _accept(listener: LinkListener) -> Steps[Link]:
    while (link := listener.try_accept()) is None:
        wait = listener.arm(Want.RECV)
        if (link := listener.try_accept()) is not None:
            break
        yield wait
    return link


class _BaseListener(Endpoint, Generic[T]):
    def __init__(self, listener: LinkListener, codec: Codec[T], capabilities: Capabilities) -> None:
        super().__init__(listener, listener.url, capabilities)
        self._listener = listener
        self._codec = codec
        self._lane = Lane(self._gate, "accept", passing=True)


class Listener(_BaseListener[T]):
    """A name that peers connect to, for threads."""

    def accept(self, timeout: float | None = None) -> Channel[T]:
        """The next peer. A peer that fails its handshake is dropped and logged, and costs nobody else anything."""
        link = run(_accept(self._listener), self._lane, timeout)
        return Channel(link, self.url, self._codec, self.capabilities)

    def close(self) -> None:
        """Stop listening and remove the name. Accepted channels live on."""
        self._close()

    def __iter__(self) -> Iterator[Channel[T]]:
        """Peers until `close()`."""
        try:
            while True:
                yield self.accept()
        except errors.Closed:
            return

    def __enter__(self) -> Listener[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncListener(_BaseListener[T]):
    """A name that peers connect to, for tasks."""

    async def accept(self, timeout: float | None = None) -> AsyncChannel[T]:
        link = await arun(_accept(self._listener), self._lane, timeout)
        return AsyncChannel(link, self.url, self._codec, self.capabilities)

    async def close(self) -> None:
        self._close()

    async def __aiter__(self) -> AsyncIterator[AsyncChannel[T]]:
        try:
            while True:
                yield await self.accept()
        except errors.Closed:
            return

    async def __aenter__(self) -> AsyncListener[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# -- the ways to a Channel ------------------------------------------------------------------------------------------


class _Opening(Opening):
    """An `Opening` for this pattern, and the options of the transport's links."""

    def __init__(
        self, url: str | Url, codec: str | Codec[Any] | None, type: Any, require: Collection[str], operation: str
    ) -> None:
        super().__init__(url, codec, type, require, "channel", operation)
        if operation == "listen" and not self.capabilities.listen:
            raise errors.Unsupported(
                "this transport has no names to listen at", url=self.url, operation=operation, hint="use pair()"
            )
        self._options = _options.read(self.transport.options, self.url)

    def listen(self) -> Steps[LinkListener]:
        return self.transport.listen(self.url, self._options)

    def connect(self) -> Steps[Link]:
        return self.transport.connect(self.url, self._options)

    def pair(self) -> tuple[Link, Link]:
        return self.transport.pair(self.url, self._options)


@overload
def listen(url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()) -> Listener[bytes]: ...
@overload
def listen(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Listener[T]: ...
@overload
def listen(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> Listener[Any]: ...
def listen(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Listener[Any]:
    """Take a name that peers can connect to.

    Args:
        url: where; `Listener.url` says where it really is (the port that the system chose for port 0).
        timeout: seconds for what may take time (a broker); None waits.
        codec: "bytes" (default), "msgpack", "json", or a Codec.
        type: what messages are; validated on arrival.
        require: capabilities that the transport must have, such as {"zero_copy"}.

    Raises: BadUrl, UnknownScheme, BadOption, MissingDependency, Unsupported, AddressInUse, AccessDenied, Timeout.
    """
    opening = _Opening(url, codec, type, require, "listen")
    return Listener(opening.run(opening.listen(), timeout), opening.codec, opening.capabilities)


@overload
def connect(url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()) -> Channel[bytes]: ...
@overload
def connect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Channel[T]: ...
@overload
def connect(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> Channel[Any]: ...
def connect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Channel[Any]:
    """Reach a listener, waiting until there is one.

    `timeout`: seconds to wait for it; None waits for ever. The other arguments are those of `listen`.

    Raises: NothingListening when the time was up and there was none; otherwise as `listen`.
    """
    opening = _Opening(url, codec, type, require, "connect")
    return Channel(opening.run(opening.connect(), timeout), opening.url, opening.codec, opening.capabilities)


@overload
def pair(url: str | Url, *, require: Collection[str] = ()) -> tuple[Channel[bytes], Channel[bytes]]: ...
@overload
def pair(
    url: str | Url, *, codec: str | Codec[Any] | None = None, type: type[T], require: Collection[str] = ()
) -> tuple[Channel[T], Channel[T]]: ...
@overload
def pair(
    url: str | Url, *, codec: str | Codec[Any], require: Collection[str] = ()
) -> tuple[Channel[Any], Channel[Any]]: ...
def pair(
    url: str | Url, *, codec: str | Codec[Any] | None = None, type: Any = None, require: Collection[str] = ()
) -> tuple[Channel[Any], Channel[Any]]:
    """Two connected ends, where the transport makes them (`pipe://`, `unix://`, `inproc://`, `shm://`). Arguments as `listen`."""
    opening = _Opening(url, codec, type, require, "pair")
    left, right = opening.pair()
    return (
        Channel(left, opening.url, opening.codec, opening.capabilities),
        Channel(right, opening.url, opening.codec, opening.capabilities),
    )


@overload
async def alisten(
    url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()
) -> AsyncListener[bytes]: ...
@overload
async def alisten(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> AsyncListener[T]: ...
@overload
async def alisten(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> AsyncListener[Any]: ...
async def alisten(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> AsyncListener[Any]:
    """`listen`, awaited."""
    opening = _Opening(url, codec, type, require, "listen")
    return AsyncListener(await opening.arun(opening.listen(), timeout), opening.codec, opening.capabilities)


@overload
async def aconnect(
    url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()
) -> AsyncChannel[bytes]: ...
@overload
async def aconnect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> AsyncChannel[T]: ...
@overload
async def aconnect(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> AsyncChannel[Any]: ...
async def aconnect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> AsyncChannel[Any]:
    """`connect`, awaited."""
    opening = _Opening(url, codec, type, require, "connect")
    link = await opening.arun(opening.connect(), timeout)
    return AsyncChannel(link, opening.url, opening.codec, opening.capabilities)


@overload
async def apair(
    url: str | Url, *, require: Collection[str] = ()
) -> tuple[AsyncChannel[bytes], AsyncChannel[bytes]]: ...
@overload
async def apair(
    url: str | Url,
    *,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> tuple[AsyncChannel[T], AsyncChannel[T]]: ...
@overload
async def apair(
    url: str | Url, *, codec: str | Codec[Any], require: Collection[str] = ()
) -> tuple[AsyncChannel[Any], AsyncChannel[Any]]: ...
async def apair(
    url: str | Url,
    *,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> tuple[AsyncChannel[Any], AsyncChannel[Any]]:
    """`pair`, awaited."""
    opening = _Opening(url, codec, type, require, "pair")
    left, right = opening.pair()
    return (
        AsyncChannel(left, opening.url, opening.codec, opening.capabilities),
        AsyncChannel(right, opening.url, opening.codec, opening.capabilities),
    )
