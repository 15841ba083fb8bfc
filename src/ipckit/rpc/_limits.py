"""What a server allows, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import errors
from ._servercore import CORE_COUNTS


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server serves.

    Attributes:
        workers: threads for handlers that are functions.
        max_connections: more are told that it is full, and closed.
        max_concurrent: calls under way in all; more are refused with TargetBusy.
        max_per_connection: the same, for each client.
        connection_timeout: seconds after which a client of the envelope protocol that says nothing, hears nothing and waits for
            nothing is let go, and any client that has not begun to speak; None: never.
        requests_per_second: what each client may ask in the long run; None: as much as it likes.
        burst_size: what it may ask at once; None: what it may ask in a second.
        tracebacks: callers are sent the traceback of what a handler raised.
    """

    workers: int = 64
    max_connections: int = 10_000
    max_concurrent: int = 10_000
    max_per_connection: int = 1000
    tracebacks: bool = False
    connection_timeout: float | None = 30.0
    requests_per_second: float | None = None
    burst_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "max_connections", "max_concurrent", "max_per_connection"):
            _check(name, getattr(self, name), int, 1)
        for name, kind in (("connection_timeout", float), ("requests_per_second", float), ("burst_size", int)):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), kind, 1 if kind is int else 0)
        if self.burst_size is not None and self.requests_per_second is None:
            raise errors.BadOption("burst_size means nothing without requests_per_second")


def _check(name: str, value: Any, kind: type, least: int) -> None:
    """A whole number from `least` on, or any number above it. Raises BadOption."""
    number = isinstance(value, int) or (kind is float and isinstance(value, float))
    if not number or isinstance(value, bool) or not (value > least or (kind is int and value == least)):
        want = f"a whole number, {least} at least" if kind is int else f"more than {least}, or None"
        raise errors.BadOption(f"{name} is {value!r}, and has to be {want}")


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """How a server ended: calls under way when it began to, those that were finished, those that were cut off."""

    in_flight_at_start: int
    drained_gracefully: int
    forced_closed: int


#: What a server counts, from its start on.
COUNTS = (
    "connections_accepted",
    "messages_received",
    "calls",
    "errors",
    "protocol_errors",
    "pushes",
    "pushes_dropped",
    "connections_refused",
    "connections_idle_closed",
    *CORE_COUNTS,
)


def statistics(own: dict[str, int]) -> dict[str, int]:
    """With the names of the envelope protocol: the seed's, and those of its versioned successor."""
    found = own | {
        "messages_processed": own["calls"],
        "messages_routed": own["calls"] + own["in_flight"],
        "in_flight_requests": own["in_flight"],
        "push_notifications_sent": own["pushes"],
    }
    if "connections_active" in own:  # gRPC does not tell
        found["active_connections"] = own["connections_active"]
    return found
