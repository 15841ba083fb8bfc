"""Publish/subscribe: from publisher to subscriber, what one message costs the publisher, and how many reach everybody.

With 1, 4 and 16 subscribers, each a process of its own; the publisher has one core for itself, they share the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import tables
from ..scenarios import Case, Raw, Variant
from . import Pattern, declared
from .channel import CHANNEL

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..results import Results

_HERE = "ipckit.bench.ours_queue:"
_RAW = "ipckit.bench.raw_topics:"
_CORE = "durable=0"

#: By hand, by scheme. Shared memory that is broadcast has no library of its own, so it stands beside what is used instead.
_BY_HAND = {
    "shm": Raw("pyzmq PUB/SUB, ipc", _RAW + "zmq", "ipc://{dir}/{name}.raw", needs=("zmq",)),
    "inproc": Raw("queue.SimpleQueue", _RAW + "inproc", "{name}", _RAW + "ainproc", "asyncio.Queue"),
    "unix": Raw("socket", _RAW + "unix", "{dir}/{name}.raw"),
    "tcp": Raw("socket", _RAW + "tcp", "127.0.0.1:0"),
    "tls": Raw("ssl", _RAW + "tls", "127.0.0.1:0"),
    "udp": Raw("socket, multicast", _RAW + "udp", "239.255.73.2:{port}"),
    "zmq+ipc": Raw("pyzmq PUB/SUB", _RAW + "zmq", "ipc://{dir}/{name}.raw", _RAW + "azmq"),
    "zmq+tcp": Raw("pyzmq PUB/SUB", _RAW + "zmq", "tcp://127.0.0.1:*"),
    "zmq+inproc": Raw("pyzmq PUB/SUB", _RAW + "zmq", "inproc://{name}.raw"),
    "nats": Raw("nats-py JetStream", _RAW + "jetstream", "{nats}/{name}-raw", _RAW + "ajetstream"),
    "redis": Raw("redis-py XADD/XREAD", _RAW + "redis", "{redis}/{name}.raw", _RAW + "aredis"),
}
_NATS_CORE = Raw("nats-py core", _RAW + "nats", "{nats}/{name}.raw", _RAW + "anats")
#: Where topics are at another place than channels.
_ELSEWHERE = {"udp": "udp://239.255.73.1:{port}?interface=127.0.0.1"}

BLANK = Case(scheme="", url="", opener=_HERE + "topics", awaited_opener=_HERE + "awaited_topics")


def cases() -> Sequence[Case]:
    found: list[Case] = []
    for place in declared("pubsub", CHANNEL, _ELSEWHERE):
        if place.handover is not None:  # one end of a pair is an audience of one: a queue
            continue
        case = replace(
            place,
            variants=(Variant(),),
            raw=_BY_HAND.get(place.scheme),
            opener=BLANK.opener,
            awaited_opener=BLANK.awaited_opener,
            flow_bytes=min(place.flow_bytes, 64 << 20) if not place.server else 16 << 20,
        )
        if place.scheme == "nats":  # a log, and a service without one: two things that are chosen between
            core = replace(case, variants=(Variant(_CORE),), raw=_NATS_CORE, lossy=True)
            found.append(replace(core, opener=_HERE + "dropping", awaited_opener=_HERE + "awaited_dropping"))
        found.append(case)
    return found


def _tables(results: Results) -> Iterator[RenderableType]:
    yield from tables.fans(results)


PATTERN = Pattern(
    name="pubsub",
    cases=cases,
    latency=("hops",),
    sizes=(64, 1 << 14),
    audiences=(1, 4, 16),
    bursts=True,
    first="drive",
    title="From publish to receive, {size}, one subscriber",
    tables=_tables,
    blank=BLANK,
)
