"""Two runs beside each other: what changed, in times.

Absolute figures compare runs of one machine only. The ratio to the raw client compares across machines as well, as far as
anything does; so both are printed, and a difference between the machines is told first.
"""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from . import stats
from .results import Results, Row

#: Below this a change of a median is what two runs of the same code show.
NOISE = 0.10


def compare(before: Results, now: Results) -> RenderableType:
    """A table of the rows that both runs have."""
    parts: list[RenderableType] = []
    differences = now.machine.same_as(before.machine)
    if differences:
        text = "the machines differ, so only “÷ raw” can be compared: " + "; ".join(differences)
        parts.append(Text.assemble(("WARNING ", "bold yellow"), text))
    if before.conditions.sizes[0] != now.conditions.sizes[0]:
        parts.append(Text.assemble(("WARNING ", "bold yellow"), "the two runs measured different sizes"))
    if before.conditions.quick or now.conditions.quick:
        parts.append(Text("a --quick run moves by some tenths from one time to the next", style="dim"))
    table = Table(
        title=Text(f"Change since {before.conditions.started}", style="bold"),
        title_justify="left",
        caption=Text("now ÷ before; a round trip below 1 is faster, a rate above 1", style="dim"),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        collapse_padding=True,
        pad_edge=False,
        header_style="",
    )
    table.add_column("")
    for name in ("p50 before", "now", "÷", "÷ raw before", "now", "rate ÷", *map(stats.size, now.conditions.sizes[1:])):
        table.add_column(name, justify="right", no_wrap=True)
    earlier = {_key(row): row for row in before.rows}
    for row in now.rows:
        old = earlier.get(_key(row))
        if old is None or old.ours.trips is None or row.ours.trips is None:
            continue
        cells: list[str | Text] = [row.label, stats.duration(old.ours.trips.p50), stats.duration(row.ours.trips.p50)]
        cells.append(change(row.ours.trips.p50 / old.ours.trips.p50))
        cells += [stats.times(each.trips_ratio(each.raw)) for each in (old, row)]
        for size in now.conditions.sizes:
            flows = old.ours.flows.get(size), row.ours.flows.get(size)
            known = flows[0] is not None and flows[1] is not None and flows[0].rate > 0
            cells.append(change(flows[1].rate / flows[0].rate, more_is_better=True) if known else "–")  # type: ignore[union-attr]
        table.add_row(*cells)
    parts.append(table)
    missing = [row.label for row in before.rows if _key(row) not in {_key(each) for each in now.rows}]
    if missing:
        parts.append(Text(f"not in this run: {', '.join(missing)}", style="dim"))
    return Group(*parts)


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.pattern, row.scheme, row.options, row.shell


def change(ratio: float, *, more_is_better: bool = False) -> Text:
    """A ratio, coloured where it is more than noise."""
    cost = 1 / ratio if more_is_better else ratio
    style = "green" if cost < 1 - NOISE else "red" if cost > 1 + NOISE else ""
    return Text(stats.times(ratio), style=style)
