"""What is measured: a table of cases, and a registry of patterns that such tables belong to.

A case is one transport: the URLs under which ours is opened (its *variants*), the raw client that does the same work, the
C floors of the same mechanism. All of them are measured side by side, in turns, because on a busy or throttled machine
only the ratio of neighbours means anything.

A later pattern (queue, pubsub, rpc) adds its own tuple of cases to `PATTERNS`, with openers of its own; the session, the
workers and the report do not change.

Placeholders in addresses: `{dir}` a fresh directory, `{name}` a fresh name, `{redis}` and `{nats}` the server's URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from .. import _registry
from .._url import parse
from ..errors import BadOption, UnknownScheme
from . import ours, raw
from .crew import Plan
from .wires import Handover

Shell = Literal["sync", "aio"]


@dataclass(frozen=True, slots=True)
class Raw:
    """The raw client that a case is measured against.

    Attributes:
        name: what a reader knows it by.
        opener: in `raw` or `raw_brokers`, for the sync shell.
        address: where its echo listens.
        awaited: in `raw_aio`, for the aio shell; "" where there is none.
        awaited_name: the name of that one, where it differs.
        handover: makes both ends in the parent.
        needs: modules beyond those of the transport.
    """

    name: str
    opener: str
    address: str = ""
    awaited: str = ""
    awaited_name: str = ""
    handover: Handover | None = None
    needs: tuple[str, ...] = ()

    def name_in(self, shell: Shell) -> str:
        return self.name if shell == "sync" else self.awaited_name or self.name


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of opening the transport: options of the URL, and the floors that it is compared with.

    The first floor is the one that ratios are of; the others are measured and told as well.
    """

    options: str = ""
    floors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One transport.

    Attributes:
        url: the echo's, without the variant's options.
        dial: options of the connecting side, where they differ.
        together: both ends live in one process.
        lossy: a flow may lose messages.
        server: what has to be started first.
        awaited: it has a row of its own in the aio shell.
        flow_bytes: no single flow carries more: a broker holds it all in memory, or drops a reader that lags.
    """

    scheme: str
    url: str
    variants: tuple[Variant, ...] = (Variant(),)
    dial: str = ""
    raw: Raw | None = None
    together: bool = False
    lossy: bool = False
    server: Literal["redis", "nats"] | None = None
    awaited: bool = False
    opener: str = "ipckit.bench.ours:sync"
    awaited_opener: str = "ipckit.bench.ours:awaited"
    handover: Handover | None = None
    flow_bytes: int = 1 << 30

    def ours(self, variant: Variant, shell: Shell) -> Plan:
        """How ours is opened; its placeholders are still to be filled in."""
        url = "?".join(part for part in (self.url, variant.options) if part)
        if "?" in self.url and variant.options:
            url = f"{self.url}&{variant.options}"
        dial = "&".join(part for part in (self.dial, variant.options) if part) if self.dial else ""
        opener = self.opener if shell == "sync" else self.awaited_opener
        return Plan(opener, url, dial, shell, self.together, self.handover)

    def rival(self, shell: Shell) -> Plan | None:
        """How the raw client is opened, where there is one in this shell."""
        opener = self.raw and (self.raw.opener if shell == "sync" else self.raw.awaited)
        if self.raw is None or not opener:
            return None
        return Plan(opener, self.raw.address, "", shell, self.together, self.raw.handover)


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
        raw=Raw("socket", _RAW + "unix", "{dir}/{name}.raw", _AIO + "unix", "asyncio streams"),
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
        raw=Raw("socket", _RAW + "tcp", "127.0.0.1:0", _AIO + "tcp", "asyncio streams"),
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

#: Pattern → its cases, in the order of the table.
PATTERNS: dict[str, tuple[Case, ...]] = {"channel": CHANNEL}


def select(pattern: str, wanted: Sequence[str]) -> tuple[Case, ...]:
    """The cases for what was asked for: schemes (`unix`, `zmq` for the family), or whole URLs; nothing: all of them.

    A whole URL is measured as it stands, against the raw client of its scheme; for a broker, that server is used.
    """
    cases = PATTERNS[pattern]
    if not wanted:
        return cases
    chosen: list[Case] = []
    for text in wanted:
        if "://" in text:
            chosen.append(_from_url(text, cases))
            continue
        found = [case for case in cases if text in (case.scheme, case.scheme.partition("+")[0])]
        if not found:
            names = sorted({name for case in cases for name in (case.scheme, case.scheme.partition("+")[0])})
            close = get_close_matches(text, names, 1)
            raise UnknownScheme(
                f"no transport is called {text!r}",
                hint=f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names),
            )
        chosen += found
    return tuple(dict.fromkeys(chosen))


def _from_url(text: str, cases: Sequence[Case]) -> Case:
    url = parse(text)
    _registry.find(url)  # an unknown scheme is told here, with a suggestion
    bare = replace(url, options=()).reveal()
    options = text.partition("?")[2]
    case = next((case for case in cases if case.scheme == url.scheme), None)
    if case is None:  # a third party's: nothing is known to compare it with
        return Case(scheme=url.scheme, url=_literal(bare), variants=(Variant(_literal(options)),))
    if case.handover is not None:
        raise BadOption("this transport has no addresses", url=url, hint=f"--transport {url.scheme}")
    like = next((v for v in case.variants if v.options == options), case.variants[-1])
    variant = Variant(_literal(options), like.floors)
    if case.server is None or case.raw is None:
        return replace(case, url=_literal(bare), variants=(variant,))
    server = replace(url, options=(), path="").reveal()
    opposite = replace(case.raw, address=f"{_literal(server)}/{{name}}.raw")
    return replace(case, url=_literal(bare), variants=(variant,), raw=opposite, server=None)


def _literal(text: str) -> str:
    """As it stands, through `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")
