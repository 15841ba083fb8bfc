"""Queue: a message from one process to another that acknowledges it; one at a time, and as fast as it goes.

Beside each transport stands the library that it is made on, used by hand; beside the local ones also the two queues that every
Python programmer knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import raw_queue, tables
from ..scenarios import Case, Raw, Variant
from . import Pattern, declared
from .channel import CHANNEL

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..results import Results

_HERE = "ipckit.bench.ours_queue:"
_RAW = "ipckit.bench.raw_queue:"
_BROKERS = "ipckit.bench.raw_queue_brokers:"

MP_QUEUE = Raw("multiprocessing.Queue", _RAW + "mp_queue", handover=raw_queue.mp_queue_ends)
MP_SIMPLE_QUEUE = Raw("multiprocessing.SimpleQueue", _RAW + "mp_simple_queue", handover=raw_queue.mp_simple_queue_ends)

#: By hand, by scheme. Where nothing of the kind is in use (grpc), there is none.
_BY_HAND = {
    "shm": MP_SIMPLE_QUEUE,
    "inproc": Raw("queue.SimpleQueue", _RAW + "inproc", "{name}", _RAW + "ainproc", "asyncio.Queue"),
    "unix": Raw("socket", _RAW + "unix", "{dir}/{name}.raw", _RAW + "astreams", "asyncio streams"),
    "pipe": MP_SIMPLE_QUEUE,
    "fifo": Raw("os.mkfifo", _RAW + "fifo", "{dir}/{name}.raw"),
    "mq": Raw("posix_ipc", _RAW + "mq", "/{name}"),
    "tcp": Raw("socket", _RAW + "tcp", "127.0.0.1:0", _RAW + "astreams", "asyncio streams"),
    "tls": Raw("ssl", _RAW + "tls", "127.0.0.1:0"),
    "zmq+ipc": Raw("pyzmq PUSH/PULL", _RAW + "zmq", "ipc://{dir}/{name}.raw", _RAW + "azmq"),
    "zmq+tcp": Raw("pyzmq PUSH/PULL", _RAW + "zmq", "tcp://127.0.0.1:*"),
    "zmq+inproc": Raw("pyzmq PUSH/PULL", _RAW + "zmq", "inproc://{name}.raw"),
    "nats": Raw("nats-py", _BROKERS + "nats", "{nats}/{name}-raw", _BROKERS + "anats", batches=True),
    "redis": Raw("redis-py", _BROKERS + "redis", "{redis}/{name}.raw", _BROKERS + "aredis", batches=True),
}
#: What these are used instead of.
_KNOWN = dict.fromkeys(("unix", "fifo", "mq"), (MP_QUEUE, MP_SIMPLE_QUEUE)) | dict.fromkeys(
    ("shm", "pipe"), (MP_QUEUE,)
)
#: Where nobody outlives the two, an acknowledgement is their own affair; a broker's answer can be waited for or not.
_ACKS = (Variant(), Variant(name="ack=manual", opener=_HERE + "manual", shells=("sync",)))

BLANK = Case(scheme="", url="", opener=_HERE + "auto", awaited_opener=_HERE + "awaited")


def cases() -> Sequence[Case]:
    return [
        replace(
            case,
            variants=_ACKS if case.server else (Variant(),),
            raw=_BY_HAND.get(case.scheme),
            opener=BLANK.opener if case.handover is None else _HERE + "inherited",
            awaited_opener=BLANK.awaited_opener,
            references=_KNOWN.get(case.scheme, ()),
            flow_bytes=min(case.flow_bytes, 256 << 20) if not case.server else 16 << 20,
        )
        for case in declared("queue", CHANNEL)
    ]


def _tables(results: Results) -> Iterator[RenderableType]:
    yield tables.hops(results)
    yield tables.one_way(results, batched=False)
    yield tables.batches(results)


PATTERN = Pattern(
    name="queue",
    cases=cases,
    latency=("turns", "hops"),
    sizes=(64, 1 << 16),
    title="One message of {size} sent, received, acknowledged",
    tables=_tables,
    blank=BLANK,
)
