"""`ipckit transports`: what each transport promises, from its own declaration.

Two tables: the comparison table that set this project off, with all its rows (here a column each), and the capabilities that a
program can ask for by `require=`. Nothing is written by hand: the conformance suite holds the declarations true, and
`--markdown` makes docs/reference/transports.md of them, which a test keeps current.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .. import _capabilities, _linkhub, _linkqueue, _registry
from .._capabilities import Capabilities
from .._options import size as read_size
from .._spi import Queues, Topics, Transport
from .._url import Url, parse
from ..bench.claims import NOT_ALIKE, claims
from ..bench.stats import size as write_size
from ..errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

_YES, _NO = "✓", "·"


@dataclass(frozen=True, slots=True)
class Entry:
    """One scheme.

    Attributes:
        options: (name, default, what it is for) of what stands behind the `?`.
        get: how to get what it needs; None: it can be used here.
    """

    scheme: str
    capabilities: Capabilities
    options: tuple[tuple[str, str, str], ...]
    get: str | None
    ours: bool


def add(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "transports",
        help="what each transport promises",
        description="The comparison table and the capabilities of every transport, from their own declarations.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as docs/reference/transports.md")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json:
        json.dump([_plain(entry) for entry in entries()], sys.stdout, indent=1, ensure_ascii=False)
        print()
    elif args.markdown:
        sys.stdout.write(markdown())
    else:
        _show()
    return 0


def entries() -> list[Entry]:
    """Every scheme that is known here, in the order of the registry. One that cannot be loaded is told on standard error."""
    found = []
    for scheme in _registry.schemes():
        url = parse(scheme + "://x")
        try:
            transport = _registry.find(url)
        except ConfigError as error:  # an entry point of somebody else's that is broken hides none of the others
            print(f"ipckit: {error}", file=sys.stderr)
            continue
        lacking = _registry.missing(transport)
        get = None
        if lacking is not None:
            get = f'pip install ".[{transport.extra}]"' if transport.extra else f"needs the module {lacking}"
        ours = type(transport).__module__.startswith("ipckit.")
        found.append(Entry(scheme, transport.capabilities_of(url), _all_options(transport, url), get, ours))
    return found


def _all_options(transport: Transport[Any], url: Url) -> tuple[tuple[str, str, str], ...]:
    """Of channels first; then what queues and topics take besides."""
    found = {each[0]: each for each in _options_of(transport.options)}
    for pattern, own in (
        ("queue", transport.queue_options if isinstance(transport, Queues) else _linkqueue.Options),
        ("pubsub", transport.topic_options if isinstance(transport, Topics) else _linkhub.Options),
    ):
        if pattern in transport.capabilities_of(url).patterns:
            for name, default, text in _options_of(own):
                found.setdefault(name, (name, default, f"{pattern}: {text}"))
    return tuple(found.values())


def _options_of(cls: type[Any]) -> tuple[tuple[str, str, str], ...]:
    return tuple(
        (each.name.rstrip("_"), _default(each.name, each.default), each.metadata.get("help", ""))
        for each in fields(cls)
    )


def _default(name: str, value: object) -> str:
    if value is None or value is MISSING:
        return "auto" if name == "spin" else ""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int) and value >= 1024 and read_size(str(value)) == value:
        return write_size(value).replace(" ", "")
    if isinstance(value, float):
        return f"{value:g}s"
    return str(value)


# -- the rows of the comparison table, and the features --------------------------------------------------------------

#: Row of the seed's table → how it reads here.
_COMPARISON: dict[str, Callable[[Entry], str]] = {
    "Communication model": lambda e: e.capabilities.model,
    "Synchronization required": lambda e: e.capabilities.synchronisation,
    "Speed (claimed)": lambda e: ", ".join(claim.text for claim in claims(e.scheme)[:1]) or "no claim",
    "Data structure": lambda e: e.capabilities.data,
    "Inherent decoupling": lambda e: _tick(e.capabilities.decoupled),
    "Built-in persistence": lambda e: _tick(e.capabilities.durable),
    "Cross-machine": lambda e: _tick(e.capabilities.cross_machine),
    "Typical use case": lambda e: e.capabilities.use_case,
}
#: Those that need room for words.
_PROSE = ("Communication model", "Data structure", "Typical use case")


def _tick(value: object) -> str:
    return _YES if value else _NO


def _able(capabilities: Capabilities) -> list[str]:
    """What `require=` would find here."""
    names = [name for name in _capabilities.features() if getattr(capabilities, name)]
    return [f"{name} ({capabilities.priorities})" if name == "priorities" else name for name in names]


def _largest(capabilities: Capabilities) -> str:
    return "limit=" if capabilities.max_message is None else write_size(capabilities.max_message)


def _death(capabilities: Capabilities) -> str:
    return f"lease, {capabilities.death_bound:g} s" if capabilities.death == "lease" else capabilities.death


# -- for a terminal -------------------------------------------------------------------------------------------------


def _show() -> None:
    from . import need_rich

    need_rich()
    from rich.text import Text

    from ..bench.report import console

    known, out = entries(), console()
    for title, names in (
        ("Comparison", _PROSE),
        ("Comparison, continued", [n for n in _COMPARISON if n not in _PROSE]),
    ):
        table = _grid(title, "", *names)
        for entry in known:
            table.add_row(entry.scheme, *(_cell(_COMPARISON[name](entry)) for name in names))
        out.print(table)
        out.print()
    out.print(Text(f"Speed: {NOT_ALIKE} Measure all of them here, on the same work: ipckit bench", style="dim"))
    out.print()
    table = _grid(
        "Capabilities, as require= takes them", "", "patterns", "able to", "largest", "a killed peer is heard"
    )
    for entry in known:
        able = entry.capabilities
        patterns = ", ".join(sorted(able.patterns))
        table.add_row(entry.scheme, patterns, ", ".join(_able(able)), _largest(able), _death(able))
    out.print(table)
    out.print(Text("The options of each: docs/reference/transports.md, or ipckit transports --markdown", style="dim"))
    for entry in known:
        if entry.get:
            out.print(Text.assemble((f"{entry.scheme}:// is not installed; from the checkout: ", "yellow"), entry.get))


def _grid(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
    )
    for number, name in enumerate(columns):
        ticks = name in _TICKS
        table.add_column(
            name, style="bold cyan" if number == 0 else "", no_wrap=number == 0, justify="center" if ticks else "left"
        )
    return table


_TICKS = ("Inherent decoupling", "Built-in persistence", "Cross-machine")


def _cell(text: str) -> Any:
    from rich.text import Text

    return Text(text, style="green" if text == _YES else "dim" if text == _NO else "")


# -- for programs, and for the docs ---------------------------------------------------------------------------------


def _plain(entry: Entry) -> dict[str, Any]:
    able = asdict(entry.capabilities)
    able["patterns"] = sorted(entry.capabilities.patterns)
    return {
        "scheme": entry.scheme,
        "installed": entry.get is None,
        "get": entry.get,
        "claims": [{"text": claim.text, "of": claim.what, "source": claim.source} for claim in claims(entry.scheme)],
        "capabilities": able,
        "options": [{"name": name, "default": default, "help": text} for name, default, text in entry.options],
    }


def markdown() -> str:
    """docs/reference/transports.md: the transports that ipckit brings."""
    known = [entry for entry in entries() if entry.ours]
    features = _capabilities.features()
    lines = [
        "<!-- Generated by `ipckit transports --markdown`, from the declarations. Edit those. -->",
        "",
        "# Transports",
        "",
        "## Comparison",
        "",
        f"Speed: {NOT_ALIKE} `ipckit bench` measures all of them on your machine, on the same work; see [bench.md](bench.md).",
        "",
        *_rows(
            ["", *(name for name in _COMPARISON)],
            ([f"`{e.scheme}`", *(read(e) for read in _COMPARISON.values())] for e in known),
        ),
        "",
        "## Capabilities",
        "",
        "What `require=` checks when an endpoint is opened, and what the conformance suite holds true.",
        "",
        *_rows(
            ["", "patterns", "largest message", "a killed peer is heard", *features],
            (
                [
                    f"`{e.scheme}`",
                    ", ".join(sorted(e.capabilities.patterns)),
                    _largest(e.capabilities),
                    _death(e.capabilities),
                    *(_feature(name, e.capabilities) for name in features),
                ]
                for e in known
            ),
        ),
        "",
        "`limit=`: only the endpoint's own limit, 16 MiB unless its URL says otherwise.",
        "",
        "## Options",
        "",
        "What stands behind the `?` of a URL. Durations carry units (`20us`, `1.5s`), sizes too (`64KiB`).",
    ]
    for schemes, options in _families(known):
        lines += ["", f"### {', '.join(f'`{scheme}://`' for scheme in schemes)}", ""]
        lines += _rows(
            ["option", "default", "what it is"], ([f"`{name}`", d and f"`{d}`", text] for name, d, text in options)
        )
    return "\n".join(lines) + "\n"


def _feature(name: str, capabilities: Capabilities) -> str:
    value = getattr(capabilities, name)
    return str(value) if name == "priorities" and value else _tick(value)


def _families(known: Iterable[Entry]) -> Iterable[tuple[list[str], tuple[tuple[str, str, str], ...]]]:
    """Schemes that take the same options, together."""
    found: dict[tuple[tuple[str, str, str], ...], list[str]] = {}
    for entry in known:
        found.setdefault(entry.options, []).append(entry.scheme)
    return ((schemes, options) for options, schemes in found.items())


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
