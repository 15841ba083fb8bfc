"""A call as a transport with calls of its own has it, and what `current()` makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from .._spi import Peer
from ._exposed import Exposed
from .context import CallContext


class Arrival(Protocol):
    """A call as the transport has it."""

    def metadata(self) -> Mapping[str, str]: ...
    def deadline(self) -> float | None:
        """On the clock of `time.monotonic`."""

    def peer(self) -> Peer: ...
    def gone(self) -> bool:
        """Nobody waits for it any more."""


class Arrived(CallContext):
    """What a handler can know of its call, found out when it asks: most never do."""

    __slots__ = ("_arrival", "_known", "why")

    def __init__(self, exposed: Exposed, arrival: Arrival) -> None:
        self.target, self.method = exposed.target, exposed.method.name
        self.why: str | None = None  # it is over: "cancelled", "deadline", "shutdown"
        self._arrival: Arrival | None = arrival
        self._known: dict[str, Any] = {}

    def _ask(self, what: str, otherwise: Any) -> Any:
        if what not in self._known:
            self._known[what] = otherwise if self._arrival is None else getattr(self._arrival, what)()
        return self._known[what]

    @property
    def metadata(self) -> Mapping[str, str]:  # type: ignore[override]
        found: Mapping[str, str] = self._ask("metadata", {})
        return found

    @property
    def deadline(self) -> float | None:  # type: ignore[override]
        found: float | None = self._ask("deadline", None)
        return found

    @property
    def peer(self) -> Peer:  # type: ignore[override]
        found: Peer = self._ask("peer", Peer())
        return found

    def _why(self) -> str | None:
        if self.why is None and self._arrival is not None and self._arrival.gone():
            self.decide("cancelled")
        return self.why

    def decide(self, why: str) -> None:
        if self.why is None:
            self.why = "deadline" if why == "cancelled" and self.remaining == 0.0 else why

    @property
    def late(self) -> bool:
        """It knows of a deadline, and that has passed. Who never asked is not to pay for it: the caller has a clock as well."""
        return self._known.get("deadline") is not None and self.remaining == 0.0

    def let_go(self) -> None:
        """The call is over. What is not known now will not be: the transport's call leads back to the context that we are in,
        and a cycle is garbage that only a collection finds, every few hundred calls.
        """
        self._arrival = None
