"""The tables of a run, and what they have in common; a pattern chooses among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import claims, stats
from .results import Measured, Results

OURS, RAW, FLOOR, CLAIM, QUIET = "bold cyan", "yellow", "green", "magenta", "dim"


def table(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str | Text]]) -> RenderableType:
    """Without the columns that nobody has anything to say in."""
    table = Table(
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
    return Group(Text(title, style="bold"), table)  # a title of the table would be cut to its width


def latency(results: Results, title: str, *, claimed: bool, names: bool) -> RenderableType:
    """The first table: one message at a time, and what it is compared with."""
    other = beside(results)
    columns = [("", ""), ("p50", OURS), ("p99", ""), ("p99.9", "")]
    columns += [("raw client", RAW)] if names else []
    columns += [
        ("raw p50", RAW),
        ("÷ raw", ""),
        (other, FLOOR),
        (f"÷ {other.removeprefix('C ')}", ""),
        ("claimed", CLAIM),
    ]
    rows = []
    for row in results.rows:
        if row.ours.trips is None:
            continue
        trips, raw, bottom = row.ours.trips, row.raw, row.floor
        claim = claims.claims(row.scheme)[:1] if claimed else ()
        cells: list[str | Text] = [row.label, *map(stats.duration, (trips.p50, trips.p99, trips.p999))]
        cells += [raw.name if raw else ""] if names else []
        cells += [p50(raw), judged(row.trips_ratio(raw), 1.0, 1.1), p50(bottom)]
        cells += [judged(row.trips_ratio(bottom), 1.25, 2.0), claim[0].text if claim else ""]
        rows.append(cells)
    return table(title, columns, rows)


def beside(results: Results) -> str:
    """What stands where a mechanism has a floor."""
    names = dict.fromkeys(row.floor.name for row in results.rows if row.floor and row.floor.kind == "reference")
    return next(iter(names), "C floor").replace("multiprocessing.", "mp.")


def hops(results: Results) -> RenderableType:
    """From process to process."""
    columns = [("", ""), ("p50", OURS), ("p99", ""), ("p99.9", ""), ("raw p50", RAW), ("÷ raw", "")]
    columns += [(beside(results), FLOOR), (f"÷ {beside(results)}", "")]
    rows = []
    for row in results.rows:
        found, raw, known = row.ours.hops, row.raw, row.floor
        if found is None:
            continue
        cells: list[str | Text] = [row.label, *map(stats.duration, (found.p50, found.p99, found.p999))]
        cells += [stats.duration(raw.hops.p50) if raw and raw.hops else ""]
        cells += [judged(row.hops_ratio(raw), 1.0, 1.1)]
        cells += [stats.duration(known.hops.p50) if known and known.hops else ""]
        cells += [judged(row.hops_ratio(known), 1.0, 1.1)]
        rows.append(cells)
    size = stats.size(results.conditions.sizes[0])
    return table(f"From process to process, {size}: from before the send until it is received", columns, rows)


def p50(measured: Measured | None) -> str:
    if measured is None:
        return ""
    return stats.duration(measured.trips.p50) if measured.trips else "–"


def judged(value: float | None, good: float, fair: float, *, more_is_better: bool = False) -> Text:
    if value is None:
        return Text("")
    cost = 1 / value if more_is_better and value > 0 else value
    return Text(stats.times(value), style="green" if cost <= good else "" if cost <= fair else "red")


def batches(results: Results) -> RenderableType:
    """Many messages in one call, beside one by one."""
    columns = [("", ""), ("msg/s", OURS), ("raw", RAW), ("÷ raw", ""), ("÷ one by one", ""), ("÷ one at a time", "")]
    size = results.conditions.sizes[0]
    rows = []
    for row in results.rows:
        many, single, trips = row.ours.batched, row.ours.flows.get(size), row.ours.trips
        if many is None:
            continue
        raw = row.raw.batched if row.raw else None
        cells: list[str | Text] = [row.label, stats.count(many.rate), stats.count(raw.rate) if raw else ""]
        cells += [judged(row.batched_ratio(row.raw), 1.0, 1.1, more_is_better=True)]
        cells += [stats.times(stats.ratio(many.runs, single.runs)) if single else ""]
        cells += [stats.times(many.rate * trips.p50 / 1e9) if trips else ""]
        rows.append(cells)
    legend = "send_many of 64, recv_many. One by one: as fast as it goes; one at a time: as in the first table"
    title = f"In batches, {stats.size(size)}"
    return Group(table(title, columns, rows), Text(legend, style=QUIET))


def one_way(results: Results, *, batched: bool = True, title: str = "One way") -> RenderableType:
    """As fast as it goes, one by one; with what goes in batches, where that has no table of its own."""
    sizes = results.conditions.sizes
    columns = [("", "")]
    other = beside(results).removeprefix("C ")
    for number, size in enumerate(sizes):
        columns += [(f"{stats.size(size)} {'msg/s' if number == 0 else 'MB/s'}", OURS)]
        columns += [("batched", OURS)] if number == 0 else []
        columns += [("raw", RAW), ("÷ raw", ""), (other, FLOOR)]
    rows = []
    for row in results.rows:
        if not row.ours.flows:
            continue
        cells: list[str | Text] = [row.label]
        for number, size in enumerate(sizes):
            cells.append(_rate(row.ours, size, number == 0))
            if number == 0:
                cells.append(stats.count(row.ours.batched.rate) if batched and row.ours.batched else "")
            cells += [_rate(row.raw, size, number == 0)]
            cells += [judged(row.flow_ratio(row.raw, size), 1.0, 1.1, more_is_better=True)]
            cells += [_rate(row.floor, size, number == 0)]
        rows.append(cells)
    legend = "÷: our rate in times theirs; above 1 is faster. " + ("batched: send_many, recv_many. " if batched else "")
    return Group(table(title, columns, rows), Text(f"{legend}MB: 10⁶ bytes", style=QUIET))


def fans(results: Results) -> Iterator[RenderableType]:
    """What a message costs its publisher, and how many reach everybody, by the number of subscribers."""
    crowds = sorted({fan.subscribers for row in results.rows for fan in row.ours.fans})
    if not crowds:
        return
    last = crowds[-1]
    for size in results.conditions.sizes:
        columns = [("", ""), *((f"to {n}", OURS) for n in crowds), (f"{last} ÷ {crowds[0]}", ""), ("CPU", "")]
        columns += [
            *((f"raw to {n}" if n == crowds[0] else f"to {n}", RAW) for n in crowds),
            (f"{last} ÷ {crowds[0]}", ""),
            ("÷ raw", ""),
        ]
        costs: list[list[str | Text]] = []
        rates: list[list[str | Text]] = []
        for row in results.rows:
            ours = [row.ours.fan(n, size) for n in crowds]
            raw = [row.raw.fan(n, size) if row.raw else None for n in crowds]
            if not any(ours):
                continue
            both = [(a, b) for a, b in zip(ours, raw, strict=True) if a and b]
            cost = stats.ratio(both[-1][0].runs, both[-1][1].runs) if both else None
            flows = (both[-1][0].flow, both[-1][1].flow) if both else (None, None)
            faster = stats.ratio(flows[0].runs, flows[1].runs) if flows[0] and flows[1] else None
            cpu = next((stats.duration(fan.cpu) for fan in reversed(ours) if fan), "")
            growth = [_growth(each) for each in (ours, raw)]
            cells: list[str | Text] = [row.label, *map(_cost, ours), judged(growth[0], 1.5, 4.0), cpu]
            cells += [*map(_cost, raw), stats.times(growth[1]) if growth[1] else "", judged(cost, 1.0, 1.1)]
            costs.append(cells)
            cells = [row.label, *map(_delivered, ours), "", "", *map(_delivered, raw), ""]
            rates.append([*cells, judged(faster, 1.0, 1.1, more_is_better=True)])
        cost_legend = (
            "÷ raw: to as many; below 1 is cheaper. CPU: of the publishing process and its threads, for one message, "
            "with the most subscribers"
        )
        cost_title = f"What publishing {stats.size(size)} costs the publisher, by subscribers"
        yield Group(table(cost_title, columns, costs), Text(cost_legend, style=QUIET))
        rate_title = f"Messages a second of {stats.size(size)} that reach every subscriber"
        yield Group(table(rate_title, columns, rates), Text("÷ raw: to as many; above 1 is faster", style=QUIET))


def _growth(fans: Sequence[stats.Fan | None]) -> float | None:
    first, last = fans[0], fans[-1]
    return last.cost / first.cost if first and last and first is not last else None


def _cost(fan: stats.Fan | None) -> str:
    return stats.duration(fan.cost) if fan else ""


def _delivered(fan: stats.Fan | None) -> str:
    if fan is None or fan.flow is None:
        return ""
    return stats.count(fan.flow.rate) + (f" −{fan.flow.lost:.0%}" if fan.flow.lost >= 0.005 else "")


def _rate(measured: Measured | None, size: int, messages: bool) -> str:
    if measured is None:
        return ""
    flow = measured.flows.get(size)
    if flow is None:
        return "–"
    text = stats.count(flow.rate) if messages else stats.digits(flow.megabytes)
    return f"{text} −{flow.lost:.0%}" if flow.lost >= 0.005 else text
