"""The contract between `ipckit.rpc` and transports whose brokers give each call to one of many servers: `_spi`, for calls.

A broker knows a group of servers by one name, and a client none of them by theirs. So there is no Link between two parties, but
an *exchange*, to which all of them have come. Steps, closing and threads are as in `_spi`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, NamedTuple, Protocol

from ._spi import OptionsT, Steps, Wait, Want
from ._url import Url


class Came(NamedTuple):
    """What an exchange has for its owner.

    `what`, and who it is from or about:
        frame       `body` came from `who`
        here        a server has appeared at `who`
        mine        to a client that inquired: the call `id` is with `who`
        nobody      no server has the call `id`; `body` is empty if one may have begun it, and died
        who         to a server: does it have the call `id` of `who`? `answer` it
        reset       `who` has forgotten us, or something was lost on the way: its calls are over
        lost, left  `who` is gone: it died, or said so
        request     `body` came from one who is no ipckit; `who` is where an answer goes, `head` its headers
    """

    what: Literal["frame", "here", "mine", "nobody", "who", "reset", "lost", "left", "request"]
    who: str
    id: int = 0
    body: bytes = b""
    subject: str = ""
    head: Mapping[str, str] | None = None


class Exchange(Protocol):
    """Frames between clients and a group of servers that share one name, through a broker.

    `try_`, `arm` and `close` as for a Link.

    What a pair exchanges arrives whole and in order, or is over (`reset`, `lost`). A client's calls go to whichever server
    of the group the broker chooses, everything else to an address that a frame came from.
    """

    @property
    def url(self) -> Url: ...
    @property
    def native(self) -> Any: ...

    def try_call(self, id: int, frame: bytes) -> str | None:
        """To one of the servers. Its address where we have chosen it, "" where the broker does; None: it must wait."""

    def try_post(self, to: str, frame: bytes) -> bool:
        """To this address. False: it must wait."""

    def try_fetch(self) -> Came | None: ...

    def try_flush(self) -> bool: ...

    def inquire(self, id: int) -> None:
        """Of a client: find out which server has the call: `mine` or `nobody`, unless its answer comes first."""

    def answer(self, to: str, id: int, mine: bool) -> None: ...

    def watch(self, who: str, busy: Callable[[], bool]) -> None:
        """Tell when `who` is gone; soon, while it is busy for us or we for it."""

    def drop(self, who: str) -> None:
        """We have forgotten it; it is told."""

    def servers(self) -> tuple[str, ...]:
        """Of a client: those that are there, as far as it knows."""

    def finish(self, who: str, id: int) -> None:
        """The call is over: of a server, this client's; of a client, our own."""

    def withdraw(self) -> None:
        """Of a server: take no more calls from the group. `settled` once none is on its way any more."""

    @property
    def settled(self) -> bool: ...

    def pass_on(self, who: str, id: int, frame: bytes) -> None:
        """Of a server that has withdrawn: a call that it has not begun goes back to the group."""

    def arm(self, want: Want) -> Wait: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class Calls(ABC, Generic[OptionsT]):
    """Mixed into a Transport whose broker gives each call to one of many servers. The others have calls over links."""

    @abstractmethod
    def exchange(self, url: Url, options: OptionsT, *, serving: bool) -> Steps[Exchange]:
        """Join the servers of this name, or reach them: waiting for one until the driver throws `Timeout`."""
