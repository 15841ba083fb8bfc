"""What a server allows, and what it says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server serves.

    Attributes:
        workers: threads for handlers that are functions.
        max_connections: more are told that it is full, and closed.
        max_concurrent: calls under way in all; more are refused with TargetBusy.
        max_per_connection: the same, for each client.
        tracebacks: callers are sent the traceback of what a handler raised.
    """

    workers: int = 64
    max_connections: int = 10_000
    max_concurrent: int = 10_000
    max_per_connection: int = 1000
    tracebacks: bool = False


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
)
