"""RPC: a unary call, and a server stream as fast as it goes.

Beside ours stands what people call with today: grpcio over the same kind of socket, the request of nats-py, REQ and REP of pyzmq.
And beside each link transport its own bare channel, which carries the same bytes there and back: what is above that is the
price of the contract, the call protocol and the handler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import ours, tables
from ..scenarios import Case, Raw, Variant
from . import Pattern, declared
from .channel import CHANNEL

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..results import Results

_HERE = "ipckit.bench.ours_rpc:"
_RAW = "ipckit.bench.raw_rpc:"

GRPC = Raw("grpcio unary", _RAW + "grpc", "unix:{dir}/{name}.raw", _RAW + "agrpc", "grpc.aio unary", needs=("grpc",))
GRPC_TCP = replace(GRPC, address="127.0.0.1:0")
NATS = Raw("nats-py request", _RAW + "nats", "{nats}/{name}.raw", _RAW + "anats")
_ZMQ = Raw("pyzmq REQ/REP", _RAW + "zmq", "ipc://{dir}/{name}.raw")

_BY_HAND = {
    **dict.fromkeys(("shm", "unix", "pipe", "fifo", "mq", "grpc+unix"), GRPC),
    **dict.fromkeys(("tcp", "tls", "grpc"), GRPC_TCP),
    "zmq+ipc": _ZMQ,
    "zmq+tcp": replace(_ZMQ, address="tcp://127.0.0.1:*"),
    "zmq+inproc": replace(_ZMQ, address="inproc://{name}.raw"),
    "nats": NATS,
}

BLANK = Case(scheme="", url="", opener=_HERE + "sync", awaited_opener=_HERE + "awaited")


def _bare(case: Case) -> tuple[Raw, ...]:
    """The channel of the same transport. Its name is ours, so it is one column."""
    if case.server is not None or case.together or case.dial or case.scheme.startswith("grpc"):
        return ()
    address = f"{case.url}.bare" if "{name}" in case.url else case.url
    if case.handover is not None:
        return (Raw("ipckit channel", "ipckit.bench.ours:inherited", "pipe://", handover=ours.pipe_ends),)
    return (Raw("ipckit channel", "ipckit.bench.ours:sync", address),)


def cases() -> Sequence[Case]:
    return [
        replace(
            case,
            variants=(Variant(),),
            raw=_BY_HAND.get(case.scheme),
            opener=BLANK.opener if case.handover is None else _HERE + "inherited",
            awaited_opener=BLANK.awaited_opener,
            references=_bare(case),
            flow_bytes=min(case.flow_bytes, 64 << 20),
        )
        for case in declared("rpc", CHANNEL)
    ]


def _tables(results: Results) -> Iterator[RenderableType]:
    yield tables.one_way(results, batched=False, title="Server stream")


PATTERN = Pattern(
    name="rpc",
    cases=cases,
    latency=("trips",),
    flow="flow",
    sizes=(64, 1 << 16),
    title="Unary call of {size}",
    tables=_tables,
    batched=False,
    blank=BLANK,
)
