"""What a case is: one transport in one pattern, and everything that it is compared with.

A case has the URLs under which ours is opened (its *variants*), the raw client that does the same work, the C floors of the
same mechanism, well-known references. All of them are measured side by side, in turns, because on a busy or throttled
machine only the ratio of neighbours means anything. The tables of cases are in `patterns`, one module for each.

Placeholders in addresses: `{dir}` a fresh directory, `{name}` a fresh name, `{port}` a free port,
`{redis}` and `{nats}` the server's URL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .. import _registry
from .._url import Url, parse
from ..errors import BadOption, UnknownScheme, likeliest
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
        batches: it has a way of its own to send and receive many at once.
    """

    name: str
    opener: str
    address: str = ""
    awaited: str = ""
    awaited_name: str = ""
    handover: Handover | None = None
    needs: tuple[str, ...] = ()
    batches: bool = False

    def name_in(self, shell: Shell) -> str:
        return self.name if shell == "sync" else self.awaited_name or self.name


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of opening the transport: options of the URL, and the floors that it is compared with.

    The first floor is the one that ratios are of; the others are measured and told as well. A variant that is more than
    options has a `name`, and an opener of its own for each shell ("": the case's); `shells` says where it is measured.
    """

    options: str = ""
    floors: tuple[str, ...] = ()
    name: str = ""
    opener: str = ""
    shells: tuple[Shell, ...] = ("sync", "aio")

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.options, self.name) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One transport.

    Attributes:
        url: the echo's, without the variant's options.
        dial: options of the connecting side, where they differ.
        together: both ends live in one process.
        lossy: a flow may lose messages.
        server: what has to be started first.
        theirs: the server that a whole URL names, which the raw client uses as well, and leaves as it was.
        awaited: it has a row of its own in the aio shell.
        flow_bytes: no single flow carries more: a broker holds it all in memory, or drops a reader that lags.
        references: what people know, to compare with in place of floors; sync only.
        loop: a second place, for `Wire.turn`; "": as `url`, with another name.
    """

    scheme: str
    url: str
    variants: tuple[Variant, ...] = (Variant(),)
    dial: str = ""
    raw: Raw | None = None
    together: bool = False
    lossy: bool = False
    server: Literal["redis", "nats"] | None = None
    theirs: str = ""
    awaited: bool = False
    opener: str = "ipckit.bench.ours:sync"
    awaited_opener: str = "ipckit.bench.ours:awaited"
    handover: Handover | None = None
    flow_bytes: int = 1 << 30
    references: tuple[Raw, ...] = ()
    loop: str = ""

    def ours(self, variant: Variant, shell: Shell) -> Plan:
        """How ours is opened; its placeholders are still to be filled in."""
        dial = "&".join(part for part in (self.dial, variant.options) if part) if self.dial else ""
        opener = variant.opener or (self.opener if shell == "sync" else self.awaited_opener)
        loop = _with(self.loop or self.url, variant.options)
        url = _with(self.url, variant.options)
        return Plan(opener, url, dial, shell, self.together, self.handover, loop)

    def rival(self, shell: Shell) -> Plan | None:
        """How the raw client is opened, where there is one in this shell."""
        opener = self.raw and (self.raw.opener if shell == "sync" else self.raw.awaited)
        if self.raw is None or not opener:
            return None
        return Plan(opener, self.raw.address, "", shell, self.together, self.raw.handover, self.raw.address)

    def known(self, reference: Raw) -> Plan:
        """How a reference is opened."""
        return Plan(reference.opener, reference.address, "", "sync", False, reference.handover, reference.address)

    def variants_in(self, shell: Shell) -> tuple[Variant, ...]:
        return tuple(variant for variant in self.variants if shell in variant.shells)


def _with(url: str, options: str) -> str:
    return url + ("&" if "?" in url else "?") + options if options else url


def select(cases: Sequence[Case], wanted: Sequence[str], blank: Case) -> tuple[Case, ...]:
    """The cases for what was asked for: schemes (`unix`, `zmq` for the family), or whole URLs; nothing: all of them.

    A whole URL is measured as it stands, against the raw client of its scheme; for a broker, that server is used. `blank` is
    the case of a transport that no table knows.
    """
    if not wanted:
        return tuple(cases)
    chosen: list[Case] = []
    for text in wanted:
        if "://" in text:
            chosen.append(_from_url(text, cases, blank))
            continue
        found = [case for case in cases if text in (case.scheme, case.scheme.partition("+")[0])]
        if not found:
            names = sorted({name for case in cases for name in (case.scheme, case.scheme.partition("+")[0])})
            raise UnknownScheme(
                f"no transport is called {text!r}",
                hint=likeliest(text, names, "known: " + ", ".join(names)),
            )
        chosen += found
    return tuple(dict.fromkeys(chosen))


def _from_url(text: str, cases: Sequence[Case], blank: Case) -> Case:
    url = parse(text)
    _registry.find(url)  # an unknown scheme is told here, with a suggestion
    bare = replace(url, options=()).reveal()
    options = text.partition("?")[2]
    loop = _literal(_beside(replace(url, options=())).reveal())
    like = [case for case in cases if case.scheme == url.scheme]
    if not like:  # a third party's: nothing is known to compare it with
        return replace(blank, scheme=url.scheme, url=_literal(bare), loop=loop, variants=(Variant(_literal(options)),))
    case = next((case for case in like if any(variant.options == options for variant in case.variants)), like[0])
    if case.handover is not None:
        raise BadOption("this transport has no addresses", url=url, hint=f"--transport {url.scheme}")
    floors = next((v.floors for v in case.variants if v.options == options), case.variants[-1].floors)
    variant = Variant(_literal(options), floors)
    if case.server is None or case.raw is None:
        return replace(case, url=_literal(bare), loop=loop, variants=(variant,))
    server = replace(url, options=(), path="").reveal()
    opposite = replace(case.raw, address=f"{_literal(server)}/{{name}}.raw")
    return replace(case, url=_literal(bare), loop=loop, variants=(variant,), raw=opposite, server=None, theirs=server)


def _beside(url: Url) -> Url:
    """A place of its own near this one."""
    if url.path:
        return replace(url, path=url.path + "-loop")
    if url.hosts and url.host.port is not None:
        return url.with_port(0)
    return replace(url, hosts=tuple(replace(host, name=host.name + "-loop") for host in url.hosts))


def _literal(text: str) -> str:
    """As it stands, through `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")
