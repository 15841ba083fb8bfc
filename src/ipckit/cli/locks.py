"""`ipckit locks`: the named locks, segments and other objects of `ipckit.sync` that exist, who holds them and who waits.

It looks from outside, at the directory that `IPCKIT_RUNTIME_DIR` chooses, and disturbs nobody.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..bench.stats import size as write_size

if TYPE_CHECKING:
    from ..sync._inventory import Holder, Thing


def add(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "locks",
        help="named locks and segments: who holds, who waits",
        description="What exists of ipckit.sync by name: its state, who holds it since when, how many wait, who has it open.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..sync._inventory import look
    from ..transports._runtime import memory_dir

    directory = memory_dir()
    things = look(directory)
    if args.json:
        json.dump([asdict(thing) for thing in things], sys.stdout, indent=1, ensure_ascii=False)
        print()
    elif not things:
        print(f"nothing in {directory}")
    else:
        _show(things)
    return 0


def _show(things: list[Thing]) -> None:
    from . import need_rich

    need_rich()
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (
        ("name", "left"),
        ("kind", "left"),
        ("state", "left"),
        ("held by", "left"),
        ("wait", "right"),
        ("open in", "left"),
        ("age", "right"),
        ("size", "right"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for thing in things:
        open_in = ", ".join(map(str, thing.attached)) or ("others" if thing.used else "nobody: gc")
        cells = (
            thing.url,
            thing.kind,
            thing.state,
            "\n".join(map(_holder, thing.holders)),
            "" if thing.waiters is None else str(thing.waiters),
            open_in,
            span(thing.age),
            write_size(thing.bytes),
        )
        table.add_row(*map(Text, cells), style="red" if thing.abandoned else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)


def _holder(holder: Holder) -> str:
    since = "" if holder.since is None else f" for {span(max(time.time() - holder.since, 0))}"
    return f"{holder.pid} {holder.role}{since}"


def span(seconds: float) -> str:
    """`3.2 s`, `5 min`, `2 h`, `3 d`."""
    for limit, unit, length in ((60, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds:.1f} s" if unit == "s" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"
