"""Channel: a message there and back, and messages one way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .. import ours, raw, tables
from ..scenarios import Case, Raw, Variant
from . import Pattern

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..results import Results


def spinning(blocking: str, *also: str, spin: str | None = None) -> tuple[Variant, ...]:
    """The two variants of a transport with a `spin` option: as it comes, and never spinning."""
    return Variant("spin=auto", (spin or blocking, *also)), Variant("spin=0", (blocking,))


_RAW = "ipckit.bench.raw:"
_BROKERS = "ipckit.bench.raw_brokers:"
_AIO = "ipckit.bench.raw_aio:"

CHANNEL: tuple[Case, ...] = (
    Case(
        scheme="shm",
        url="shm://{name}",
        variants=spinning("shm-futex", "sem", spin="shm-spin"),
        raw=Raw("shared_memory", _RAW + "shm", "/{name}", needs=("posix_ipc",)),
    ),
    Case(
        scheme="inproc",
        url="inproc://{name}",
        together=True,
        raw=Raw("queue.SimpleQueue", _RAW + "inproc", awaited=_AIO + "inproc", awaited_name="asyncio.Queue"),
        awaited=True,
    ),
    Case(
        scheme="unix",
        url="unix://{dir}/{name}",
        variants=spinning("unix", "unix-spin"),
        raw=Raw("socket", _RAW + "unix", "{dir}/{name}.raw", _AIO + "streams", "asyncio streams"),
        awaited=True,
    ),
    Case(
        scheme="pipe",
        url="pipe://",
        variants=spinning("pipe"),
        opener="ipckit.bench.ours:inherited",
        handover=ours.pipe_ends,
        raw=Raw("multiprocessing.Pipe", _RAW + "pipe", handover=raw.pipe_ends),
    ),
    Case(
        scheme="fifo",
        url="fifo://{name}",
        variants=spinning("fifo"),
        raw=Raw("os.mkfifo", _RAW + "fifo", "{dir}/{name}.raw"),
    ),
    Case(
        scheme="mq",
        url="mq://{name}",
        variants=(Variant("", ("mq",)),),
        raw=Raw("posix_ipc", _RAW + "mq", "/{name}"),
    ),
    Case(
        scheme="tcp",
        url="tcp://127.0.0.1:0",
        variants=spinning("tcp"),
        raw=Raw("socket", _RAW + "tcp", "127.0.0.1:0", _AIO + "streams", "asyncio streams"),
        awaited=True,
    ),
    Case(
        scheme="tls",
        url="tls://localhost:0?cert={dir}/certificate.pem&key={dir}/key.pem",
        dial="ca={dir}/certificate.pem",
        raw=Raw("ssl", _RAW + "tls", "127.0.0.1:0"),
    ),
    Case(
        scheme="udp",
        url="udp://127.0.0.1:0",
        variants=(Variant("", ("udp",)),),
        raw=Raw("socket", _RAW + "udp", "127.0.0.1:0"),
        lossy=True,
    ),
    Case(
        scheme="zmq+ipc",
        url="zmq+ipc://{dir}/{name}",
        raw=Raw("pyzmq PAIR", _RAW + "zmq", "ipc://{dir}/{name}.raw", _AIO + "zmq"),
        awaited=True,
    ),
    Case(scheme="zmq+tcp", url="zmq+tcp://127.0.0.1:0", raw=Raw("pyzmq PAIR", _RAW + "zmq", "tcp://127.0.0.1:*")),
    Case(
        scheme="zmq+inproc",
        url="zmq+inproc://{name}",
        raw=Raw("pyzmq PAIR", _RAW + "zmq", "inproc://{name}.raw"),
        together=True,
    ),
    Case(
        scheme="nats",
        url="{nats}/{name}",
        raw=Raw("nats-py", _BROKERS + "nats", "{nats}/{name}.raw", _AIO + "nats"),
        server="nats",
        awaited=True,
        flow_bytes=32 << 20,
    ),
    Case(
        scheme="redis",
        url="{redis}/0/{name}",
        raw=Raw("redis-py", _BROKERS + "redis", "{redis}/{name}.raw", _AIO + "redis"),
        server="redis",
        awaited=True,
        flow_bytes=32 << 20,
    ),
    Case(
        scheme="grpc+unix",
        url="grpc+unix://{dir}/{name}",
        raw=Raw("grpcio stream", _BROKERS + "grpc", "unix:{dir}/{name}.raw"),
        flow_bytes=128 << 20,
    ),
    Case(
        scheme="grpc",
        url="grpc://127.0.0.1:0",
        raw=Raw("grpcio stream", _BROKERS + "grpc", "127.0.0.1:0", _AIO + "grpc", "grpc.aio stream"),
        awaited=True,
        flow_bytes=128 << 20,
    ),
)


def _tables(results: Results) -> Iterator[RenderableType]:
    yield tables.one_way(results)


PATTERN = Pattern(
    name="channel",
    cases=lambda: CHANNEL,
    latency=("trips",),
    flow="flow",
    sizes=(64, 1 << 20),
    title="Round trip of {size}",
    tables=_tables,
    claimed=True,
)
