"""How a run looks: the bars, the two tables, the notes. Everything fits into 100 columns, and says the same without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import floor as round_down
from math import log10

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from . import claims as claimed
from . import stats
from .machine import Machine
from .results import Conditions, Measured, Results, Row

OURS, RAW, FLOOR, CLAIM, QUIET = "bold cyan", "yellow", "green", "magenta", "dim"
_LAST_TICK = 7  # columns: `|100 µs`
_BAR, _RAW_MARK, _FLOOR_MARK, _CLAIM_MARK = "━", "◆", "┃", "░"


def report(results: Results, console: Console) -> RenderableType:
    """The whole of it, for this console."""
    trips = _round_trips(results, names=True)
    named = Measurement.get(console, console.options.update(width=1000), trips).maximum <= console.width
    parts: list[RenderableType] = [
        _heading(results),
        Text(),
        _chart(results, console.width),
        Text(),
        trips if named else _round_trips(results, names=False),
        Text("÷: our p50 in times theirs, from runs in turns; below 1 is faster", style=QUIET),
        Text(),
        _one_way(results),
        Text(
            "÷: our rate in times theirs; above 1 is faster. batched: send_many, recv_many. MB: 10⁶ bytes", style=QUIET
        ),
        Text(),
        _notes(results, names=not named),
    ]
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


def _chart(results: Results, width: int) -> RenderableType:
    size = stats.size(results.conditions.sizes[0])
    rows = sorted(results.rows, key=lambda row: row.ours.trips.p50 if row.ours.trips else float("inf"))
    labels = max((len(row.label) for row in rows), default=0)
    axis = _Axis(rows, max(width - labels - 13 - _LAST_TICK, 30))
    lines = [
        Text.assemble(
            (f"Round trip of {size}", "bold"),
            (", p50, logarithmic   ", QUIET),
            (f"{_BAR} ipckit", OURS),
            (f"   {_RAW_MARK} raw client", RAW),
            (f"   {_FLOOR_MARK} C floor", FLOOR),
            (f"   {_CLAIM_MARK} claimed", CLAIM),
        ),
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

    def __init__(self, rows: Iterable[Row], width: int) -> None:
        values = [each.trips.p50 for row in rows for each in row.contenders() if each.trips]
        values += [
            bound for row in rows for claim in claimed.claims(row.scheme)[:1] for bound in (claim.low, claim.high)
        ]
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
        for claim in claimed.claims(row.scheme)[:1]:
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


# -- the tables ---------------------------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Text]]) -> Table:
    """Without the columns that nobody has anything to say in."""
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        header_style="",
        expand=False,
    )
    kept = [number for number in range(len(columns)) if any(len(row[number]) for row in rows)]
    for name, style in (columns[number] for number in kept):
        left = name in ("", "raw client", "claimed")
        table.add_column(Text(name), style=style, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[number] for number in kept))
    return table


def _round_trips(results: Results, *, names: bool) -> RenderableType:
    size = stats.size(results.conditions.sizes[0])
    columns = [("", ""), ("p50", OURS), ("p99", ""), ("p99.9", "")]
    columns += [("raw client", RAW)] if names else []
    columns += [("raw p50", RAW), ("÷ raw", ""), ("C floor", FLOOR), ("÷ floor", ""), ("claimed", CLAIM)]
    rows = []
    for row in results.rows:
        if row.ours.trips is None:
            continue
        trips, raw, bottom = row.ours.trips, row.raw, row.floor
        claim = claimed.claims(row.scheme)[:1]
        cells: list[str | Text] = [row.label, *map(stats.duration, (trips.p50, trips.p99, trips.p999))]
        cells += [raw.name if raw else ""] if names else []
        cells += [_p50(raw), _judged(row.trips_ratio(raw), 1.0, 1.1), _p50(bottom)]
        cells += [_judged(row.trips_ratio(bottom), 1.25, 2.0), claim[0].text if claim else ""]
        rows.append(cells)
    return _table(f"Round trip of {size}", columns, rows)


def _p50(measured: Measured | None) -> str:
    if measured is None:
        return ""
    return stats.duration(measured.trips.p50) if measured.trips else "–"


def _judged(value: float | None, good: float, fair: float, *, more_is_better: bool = False) -> Text:
    if value is None:
        return Text("")
    cost = 1 / value if more_is_better and value > 0 else value
    return Text(stats.times(value), style="green" if cost <= good else "" if cost <= fair else "red")


def _one_way(results: Results) -> RenderableType:
    sizes = results.conditions.sizes
    columns = [("", "")]
    for number, size in enumerate(sizes):
        columns += [(f"{stats.size(size)} {'msg/s' if number == 0 else 'MB/s'}", OURS)]
        columns += [("batched", OURS)] if number == 0 else []
        columns += [("raw", RAW), ("÷ raw", ""), ("floor", FLOOR)]
    rows = []
    for row in results.rows:
        if not row.ours.flows:
            continue
        cells: list[str | Text] = [row.label]
        for number, size in enumerate(sizes):
            cells.append(_rate(row.ours, size, number == 0))
            if number == 0:
                cells.append(stats.count(row.ours.batched.rate) if row.ours.batched else "")
            cells += [_rate(row.raw, size, number == 0)]
            cells += [_judged(row.flow_ratio(row.raw, size), 1.0, 1.1, more_is_better=True)]
            cells += [_rate(row.floor, size, number == 0)]
        rows.append(cells)
    return _table("One way", columns, rows)


def _rate(measured: Measured | None, size: int, messages: bool) -> str:
    if measured is None:
        return ""
    flow = measured.flows.get(size)
    if flow is None:
        return "–"
    text = stats.count(flow.rate) if messages else stats.digits(flow.megabytes)
    return f"{text} −{flow.lost:.0%}" if flow.lost >= 0.005 else text


# -- the small print ----------------------------------------------------------------------------------------------


def _notes(results: Results, *, names: bool) -> RenderableType:
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
        note("C floors, other", "; ".join(others), FLOOR)
    quoted = dict.fromkeys(claim for row in results.rows for claim in claimed.claims(row.scheme))
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
            style, word = ("yellow", "not installed") if each.absent else ("red", "FAILED")
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
