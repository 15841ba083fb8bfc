"""Where a server is, and where its clients reach it: a URL, or a channel that is connected already.

A channel serves one client, so a server over it ends with it; and a client over it cannot connect again. That is how a
transport without names (`pipe://`) has calls, and how an accepted channel becomes a server.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from typing import Any

from .. import _options, _registry, errors
from .._endpoint import Opening
from .._exchange import Calls
from .._spi import Abandoning, Link, Listener, Steps, Wait, Want
from .._url import Url, parse
from ..channel import AsyncChannel, Channel
from ._board import Board
from ._routing import Router


class Place(Opening):
    """What `Server` and `Client` are opened with."""

    def __init__(
        self, where: str | Url | Channel[Any] | AsyncChannel[Any], require: Collection[str], operation: str
    ) -> None:
        """Raises what opening a transport raises; ConfigError for a channel that holds messages which nobody took."""
        super().__init__(where, None, None, require, "rpc", operation)
        named = self.capabilities.listen or isinstance(self.transport, Calls)
        if operation == "serve" and self.end is None and not named:
            raise errors.Unsupported(
                "this transport has no names to serve at",
                url=self.url,
                operation=operation,
                hint="make a pair(), and give the server one end of it in place of a URL",
            )
        self._options = _options.read(self.transport.options, self.url)
        self._link = None if self.end is None else self.end.yield_link(operation)

    def listen(self) -> Steps[Listener]:
        if self._link is None:
            if isinstance(self.transport, Calls):
                return Board((yield from self.transport.exchange(self.url, self._options, serving=True)))
            return (yield from self.transport.listen(self.url, self._options))
        link, self._link = self._link, None
        return OneClient(self.url, link)

    def connect(self) -> Steps[Link]:
        if self.end is None:
            if isinstance(self.transport, Calls):
                return Router((yield from self.transport.exchange(self.url, self._options, serving=False)))
            return (yield from self.transport.connect(self.url, self._options))
        link, self._link = self._link, None
        if link is None:
            raise errors.NothingListening(
                "the channel has ended", url=self.url, operation="call", hint="a client over a channel ends with it"
            )
        return link

    def discard(self) -> None:
        """Close a channel's link that nobody has asked for."""
        link, self._link = self._link, None
        if link is not None:
            link.close()


class OneClient:
    """A listener to which one has come already, and nobody else will."""

    def __init__(self, url: Url, link: Link) -> None:
        self.url = url
        self._link: Link | None = link

    @property
    def native(self) -> Any:
        return None if self._link is None else self._link.native

    @property
    def exhausted(self) -> bool:
        return self._link is None

    def try_accept(self) -> Link | None:
        link, self._link = self._link, None
        return link

    def arm(self, want: Want) -> Wait:
        return Wait(())

    def close(self) -> None:
        if (link := self.try_accept()) is not None:
            link.close()

    def abandon(self) -> None:
        if isinstance(self._link, Abandoning):
            self._link.abandon()


def native_class(where: object, name: str) -> Any:
    """The class `name` of the module that has calls of its own for this address; None: calls go over links."""
    if not isinstance(where, str | Url):
        return None
    url = parse(where)
    transport = _registry.find(url)
    if transport.calls is None:
        return None
    try:
        return getattr(importlib.import_module(transport.calls), name, None)
    except ModuleNotFoundError as error:
        raise errors.MissingDependency(
            f"calls over {url.scheme}:// need the module {error.name!r}, which is not installed",
            url=url,
            hint=f'from the checkout: pip install ".[{transport.extra}]"' if transport.extra else None,
        ) from error
