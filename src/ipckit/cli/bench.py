"""`ipckit bench`: measure every transport on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadOption

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.session import Progress


_LONG = 20.0  # seconds of a run from which one is told before


def add(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure the transports on this machine",
        description="Measure what each transport costs, in fresh pinned processes, beside the C floor of the same "
        "mechanism, the raw client library and the figure that was claimed for it.",
        epilog="Starts the Redis and NATS servers that it measures, unless IPCKIT_REDIS_URL and IPCKIT_NATS_URL name running "
        "ones. Ends with status 1 if anything failed; what is not installed, or what this machine's limits have no room "
        "for, is no failure.",
    )
    parser.add_argument(
        "--transport",
        "-t",
        action="append",
        default=[],
        metavar="NAME|URL",
        help="a scheme (unix), a family (zmq) or a whole URL (redis://host:6379/0/bench); may be repeated; default: all",
    )
    parser.add_argument(
        "--size",
        "-s",
        action="append",
        default=[],
        metavar="SIZE",
        help="bytes of a message; the first is that of the latencies, all are sent one way; default: 64 and "
        "1MiB, of queues and calls 64KiB, of topics 16KiB",
    )
    parser.add_argument(
        "--pattern",
        default="channel",
        metavar="NAME",
        help="what to measure: channel, queue, pubsub or rpc; default: channel",
    )
    parser.add_argument("--shell", choices=("sync", "aio", "both"), default="both", help="ipckit, ipckit.aio, or both")
    parser.add_argument(
        "--quick", action="store_true", help="the whole table in less than a minute, with less certainty"
    )
    parser.add_argument("--cpus", metavar="A,B", help="where the driving end and the echo run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="print the change since that --json")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the table there as a picture as well")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from . import need_rich

    need_rich()
    from .. import _options
    from ..bench import machine, patterns, report, results, scenarios, session
    from ..bench.compare import compare

    pattern = patterns.find(args.pattern)
    try:
        sizes = [_options.size(text) for text in args.size] or list(pattern.sizes)
    except ValueError as error:
        raise BadOption(f"--size must be {error}") from None
    if min(sizes) < 1:
        raise BadOption("--size must be 1 or more")
    for name, path in (("--json", args.json), ("--svg", args.svg)):
        if path is not None:
            _check_writable(name, path)
    cases = patterns.select(args.pattern, args.transport)
    before = results.load(args.compare) if args.compare else None
    if before is not None and args.pattern not in (measured := {row.pattern for row in before.rows}):
        raise BadOption(
            f"--compare: {args.compare} has nothing of --pattern {args.pattern}",
            hint=f"it has: {', '.join(sorted(measured))}",
        )
    shells: tuple[scenarios.Shell, ...] = ("sync", "aio") if args.shell == "both" else (args.shell,)
    budget = session.QUICK if args.quick else session.FULL
    cpus = machine.choose_cpus(args.cpus)
    console = report.console(record=args.svg is not None)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: what was started is ended, what was made is removed
        signal.signal(number, signal.default_int_handler)
    with _Watching(console) as progress:
        planned = session.Session(args.pattern, cases, shells, sizes, budget, cpus, machine.facts(), progress)
        seconds = planned.estimate()
        if seconds >= _LONG:
            print(f"ipckit bench: about {_minutes(seconds)}", file=sys.stderr, flush=True)
        found = planned.run()
    try:
        if args.json:
            found.save(args.json)
    finally:
        console.print(report.report(found, console))
    if before is not None:
        console.print()
        console.print(compare(before, found))
    if args.svg:
        console.save_svg(str(args.svg), title="ipckit bench")
    return 1 if found.failures() else 0


def _check_writable(name: str, path: Path) -> None:
    """Before all is measured, not after. Raises BadOption."""
    if path.is_dir():
        raise BadOption(f"{name}: {path} is a directory")
    place = path if path.exists() else path.parent
    if not place.exists():
        raise BadOption(f"{name}: there is no directory {place}")
    if not os.access(place, os.W_OK):
        raise BadOption(f"{name}: {place} cannot be written")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


class _Watching:
    """A progress bar on standard error, drawn between the measurements only: a thread that draws would be measured too."""

    def __init__(self, console: Console) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("[progress.description]{task.description:<44}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self._show

    def _show(self, what: str, part: float) -> None:
        self._bar.update(self._task, description=what, completed=part)
        self._bar.refresh()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
