"""The figures that were claimed for these mechanisms, with where they stand.

Two published tables set this project off. They were not measured alike, and neither says how: one speaks of a memory copy,
another of a round trip, another of a network. So they are printed beside what was measured here, on the same work,
and never mixed into a ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

_AGENKIC = "agenKic-orKistrator, decision 2, “Approximate round-trip latency by transport”"
_INFERENSYS = "Inferensys glossary, “IPC mechanism comparison”"

NOT_ALIKE = "Claims are quoted, not measured: a memory copy, a round trip, a network, on machines without a name."


@dataclass(frozen=True, slots=True)
class Claim:
    """`low` and `high` in nanoseconds (equal for a single figure)."""

    what: str
    text: str
    low: float
    high: float
    source: str


SHARED_MEMORY = Claim("shared memory", "~100 ns", 100, 100, _AGENKIC)
SHARED_MEMORY_TABLE = Claim("shared memory", "< 1 µs", 0, 1e3, _INFERENSYS)
UNIX = Claim("Unix domain socket", "~130 µs", 130e3, 130e3, _AGENKIC)
GRPC_LOCAL = Claim("gRPC, local", "5–20 ms", 5e6, 20e6, _AGENKIC)
GRPC_NETWORK = Claim("gRPC, network", "20–50 ms", 20e6, 50e6, _AGENKIC)
QUEUES = Claim("message queues", "10–100 µs", 10e3, 100e3, _INFERENSYS)
PIPES = Claim("pipes, named and anonymous", "50–200 µs", 50e3, 200e3, _INFERENSYS)
SOCKETS = Claim("sockets, local and network", "100 µs–10 ms", 100e3, 10e6, _INFERENSYS)

#: By scheme; the first is the one that the table has room for. ZeroMQ, NATS and Redis were claimed nothing for.
BY_SCHEME: dict[str, tuple[Claim, ...]] = {
    "shm": (SHARED_MEMORY, SHARED_MEMORY_TABLE),
    "mq": (QUEUES,),
    "pipe": (PIPES,),
    "fifo": (PIPES,),
    "unix": (UNIX, SOCKETS),
    "tcp": (SOCKETS,),
    "tls": (SOCKETS,),
    "udp": (SOCKETS,),
    "grpc": (GRPC_LOCAL, GRPC_NETWORK),
    "grpcs": (GRPC_LOCAL, GRPC_NETWORK),
    "grpc+unix": (GRPC_LOCAL,),
}


def claims(scheme: str) -> tuple[Claim, ...]:
    return BY_SCHEME.get(scheme, ())
