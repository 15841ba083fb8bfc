"""How a run looks: heading, bars, tables, notes. It all fits into 100 columns, and says the same without colour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import floor as round_down
from math import log10

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from . import claims as claimed
from . import patterns, stats, tables
from .machine import Machine
from .results import Conditions, Measured, Results, Row
from .tables import CLAIM, FLOOR, OURS, QUIET, RAW

_LAST_TICK = 7  # columns: `|100 µs`
_BAR, _RAW_MARK, _FLOOR_MARK, _CLAIM_MARK = "━", "◆", "┃", "░"


def report(results: Results, console: Console) -> RenderableType:
    """The whole of it, for this console."""
    pattern = patterns.find(results.rows[0].pattern)
    title = pattern.title.format(size=stats.size(results.conditions.sizes[0]))
    latency = tables.latency(results, title, claimed=pattern.claimed, names=True)
    named = Measurement.get(console, console.options.update(width=1000), latency).maximum <= console.width
    parts: list[RenderableType] = [
        _heading(results),
        Text(),
        _chart(results, title, pattern.claimed, console.width),
        Text(),
        latency if named else tables.latency(results, title, claimed=pattern.claimed, names=False),
        Text("÷: our p50 in times theirs, from runs in turns; below 1 is faster", style=QUIET),
        Text(),
    ]
    for part in pattern.tables(results):
        parts += [part, Text()]
    parts.append(_notes(results, pattern.claimed, names=not named))
    failures = list(_failures(results))
    if failures:
        parts += [Text(), *failures]
    return Group(*parts)


# -- what it was measured on --------------------------------------------------------------------------------------


def _heading(results: Results) -> RenderableType:
    machine, conditions = results.machine, results.conditions
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=QUIET)
    grid.add_column()
    for name, value in facts(machine, conditions):
        grid.add_row(name, value)
    patterns = ", ".join(sorted({row.pattern for row in results.rows}))
    title = Text.assemble(("ipckit bench", OURS), f"  {patterns}", (" --quick" if conditions.quick else "", QUIET))
    return Group(title, grid)


def facts(machine: Machine, conditions: Conditions) -> Iterator[tuple[str, str]]:
    """(what, value) of all that the figures depend on."""
    many = "core" if machine.cores == 1 else "cores"
    kind = f", {machine.virtual}" if machine.virtual else ""
    yield "machine", f"{machine.processor}, {machine.cores} {many}, {machine.memory / 2**30:.0f} GiB{kind}"
    yield "system", f"{machine.system} · {machine.python} · ipckit {machine.ipckit}"
    if machine.libraries:
        yield "libraries", " · ".join(f"{name} {version}" for name, version in machine.libraries.items())
    if machine.servers:
        yield "servers", " · ".join(machine.servers.values()) + ", on any core"
    if conditions.one_cpu:
        yield "workers", f"both pinned to CPU {conditions.cpus[0]}: there is no second one, so nothing can spin"
    else:
        yield "workers", f"pinned: the driving end to CPU {conditions.cpus[0]}, the echo to CPU {conditions.cpus[1]}"
    yield (
        "load",
        f"{machine.load:.2f} when the run began" + (": BUSY, do not quote these figures" if machine.busy else ""),
    )


# -- the bars -----------------------------------------------------------------------------------------------------


def _chart(results: Results, title: str, claims: bool, width: int) -> RenderableType:
    rows = sorted(results.rows, key=lambda row: row.ours.trips.p50 if row.ours.trips else float("inf"))
    labels = max((len(row.label) for row in rows), default=0)
    axis = _Axis(rows, claims, max(width - labels - 13 - _LAST_TICK, 30))
    key = Text.assemble(
        (title, "bold"),
        (", p50, logarithmic   ", QUIET),
        (f"{_BAR} ipckit", OURS),
        (f"   {_RAW_MARK} raw client", RAW),
    )
    if any(row.floor for row in rows):
        key.append(f"   {_FLOOR_MARK} {tables.beside(results)}", FLOOR)
    if claims:
        key.append(f"   {_CLAIM_MARK} claimed", CLAIM)
    lines = [
        key,
        Text(" " * (labels + 13) + axis.ticks(), style=QUIET),
    ]
    for row in rows:
        value = stats.duration(row.ours.trips.p50) if row.ours.trips else "–"
        line = Text.assemble((f"{row.label:<{labels}}  ", ""), (f"{value:>9}", OURS if row.ours.trips else QUIET), "  ")
        line.append_text(axis.line(row) if row.ours.trips else Text(_why(row.ours), style=QUIET))
        line.no_wrap = True
        line.overflow = "ellipsis"
        lines.append(line)
    return Group(*lines)


class _Axis:
    """A logarithmic axis over everything that is drawn, from a full decade to a full decade."""

    def __init__(self, rows: Iterable[Row], claims: bool, width: int) -> None:
        self._claims: Callable[[Row], tuple[claimed.Claim, ...]] = (
            (lambda row: claimed.claims(row.scheme)[:1]) if claims else (lambda row: ())
        )
        values = [each.trips.p50 for row in rows for each in row.contenders() if each.trips]
        values += [bound for row in rows for claim in self._claims(row) for bound in (claim.low, claim.high)]
        values = [value for value in values if value > 0] or [1e3]
        self._first = round_down(log10(min(values)))
        self._decades = max(round_down(log10(max(values)) - 1e-9) + 1 - self._first, 1)
        self._width = width

    def _at(self, value: float) -> int:
        part = (log10(max(value, 10.0**self._first)) - self._first) / self._decades
        return min(max(round(part * (self._width - 1)), 0), self._width - 1)

    def ticks(self) -> str:
        line = [" "] * (self._width + _LAST_TICK)
        for decade in range(self._first, self._first + self._decades + 1):
            at = self._at(10.0**decade)
            line[at : at + _LAST_TICK] = f"|{_decade(decade)}".ljust(_LAST_TICK)
        return "".join(line).rstrip()

    def line(self, row: Row) -> Text:
        cells = [(" ", "")] * self._width
        for claim in self._claims(row):
            for at in range(self._at(claim.low), self._at(claim.high) + 1):
                cells[at] = (_CLAIM_MARK, CLAIM)
        assert row.ours.trips is not None
        for at in range(self._at(row.ours.trips.p50) + 1):
            cells[at] = (_BAR, OURS)
        for other, mark, style in ((row.floor, _FLOOR_MARK, FLOOR), (row.raw, _RAW_MARK, RAW)):
            if other is not None and other.trips:
                cells[self._at(other.trips.p50)] = (mark, style)
        return Text.assemble(*cells)


def _decade(exponent: int) -> str:
    value = 10 ** (exponent % 3)
    return f"{value} {('ns', 'µs', 'ms', 's')[min(exponent // 3, 3)]}" if exponent >= 0 else "0"


def _why(measured: Measured) -> str:
    return f"{measured.hint or measured.failed}" if measured.absent else f"failed: {measured.failed or 'no figure'}"


# -- the small print ----------------------------------------------------------------------------------------------


def _notes(results: Results, claims: bool, *, names: bool) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(style=QUIET)

    def note(name: str, text: str, style: str = QUIET) -> None:
        grid.add_row(Text(name, style=style), Text(text))

    if names:
        raw: dict[str, list[str]] = {}
        for row in results.rows:
            if row.raw is not None:
                raw.setdefault(row.raw.name, []).append(row.scheme + (" · aio" if row.shell == "aio" else ""))
        note("raw clients", "; ".join(f"{', '.join(dict.fromkeys(users))}: {name}" for name, users in raw.items()), RAW)
    others = [
        f"{row.label}: {each.name} {stats.duration(each.trips.p50)}"
        for row in results.rows
        for each in row.floors[1:]
        if each.trips
    ]
    if others:
        note("C floors, other" if tables.beside(results) == "C floor" else "others", "; ".join(others), FLOOR)
    quoted = dict.fromkeys(claim for row in results.rows if claims for claim in claimed.claims(row.scheme))
    if quoted:
        note("claimed", claimed.NOT_ALIKE, CLAIM)
        sources: dict[str, list[str]] = {}
        for claim in quoted:
            sources.setdefault(claim.source, []).append(f"{claim.what} {claim.text}")
        for source, figures in sources.items():
            note("", f"{source}: {'; '.join(figures)}")
    lossy = [row.label for row in results.rows if any(flow.lost >= 0.005 for flow in row.ours.flows.values())]
    if lossy:
        note("−N%", f"the part of the messages that did not arrive: {', '.join(lossy)} is best effort")
    few = f"a p99.9 asks for {stats.needed(0.999):,} samples"
    note("–", f"the mechanism does not carry this, or the run was too short to tell: {few}")
    conditions = results.conditions
    turns = [len(row.ours.trips.runs) for row in results.rows if row.ours.trips]
    least, most = min(turns, default=0), max(turns, default=0)
    runs = f"{most} runs" if least == most else f"{least} to {most} runs (the time was up)"
    note(
        "method",
        f"medians of {runs} in turns, {conditions.seconds:g} s in all; the clock's own "
        f"{results.machine.timer} ns are taken off. docs/reference/bench.md says how",
    )
    return grid


def _failures(results: Results) -> Iterator[RenderableType]:
    seen: set[tuple[str, str]] = set()
    for row in results.rows:
        for each in row.contenders():
            if each.failed is None or (each.name, each.failed) in seen:
                continue
            seen.add((each.name, each.failed))
            style, word = ("yellow", "not here") if each.absent else ("red", "FAILED")
            line = Text.assemble((word, f"bold {style}"), f"  {row.label}, {each.name}: {each.failed}")
            if each.hint:
                line.append(f" ({each.hint})", style=QUIET)
            yield line


def console(*, record: bool = False) -> Console:
    """Standard output; a pipe gets 120 columns, as it has no width of its own."""
    found = Console(record=record, highlight=False)
    if not found.is_terminal and "COLUMNS" not in found._environ:
        found.width = 120
    return found
