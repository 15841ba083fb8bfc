"""`ipckit gc`: remove what dead processes left, and nothing else.

Names of dead listeners, handshakes that nobody ends, kernel queues, and the locks and segments that nobody has open: in the
runtime directory and the memory directory that `IPCKIT_RUNTIME_DIR` chooses. Whether somebody lives is asked of the kernel, once
to find it and once more, with its lock in hand, to remove it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..transports._litter import Litter


def add(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "gc",
        help="remove what dead processes left",
        description="Remove what dead processes left in the runtime directory and in shared memory, and nothing else.",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument(
        "--abandoned", action="store_true", help="also locks whose owner died and that nobody has repaired since"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    removed = [each for each in _find(args.abandoned) if args.dry_run or each.remove()]
    if args.json:
        json.dump([{"path": each.path, "what": each.what} for each in removed], sys.stdout, indent=1)
        print()
        return 0
    verb = "would remove" if args.dry_run else "removed"
    for each in removed:
        print(f"{verb} {each.path}  ({each.what})")
    kept = [] if args.abandoned else _abandoned()
    for path in kept:
        print(f"kept {path}  (its owner died: open it and recover(), or --abandoned)")
    if not removed and not kept:
        print("nothing to remove")
    return 0


def _abandoned() -> list[str]:
    from ..sync._inventory import look
    from ..transports._runtime import memory_dir

    return [thing.path for thing in look(memory_dir()) if thing.abandoned and not thing.used]


def _find(abandoned: bool) -> Iterator[Litter]:
    from ..sync import _inventory
    from ..transports import _litter
    from ..transports._runtime import default_dir, memory_dir, runtime_dir

    seen = set()
    for finding in (
        _litter.find(runtime_dir(), default_dir()),
        _inventory.litter(memory_dir(), with_abandoned=abandoned),
    ):
        for each in finding:
            if each.path not in seen:  # the two directories may be one
                seen.add(each.path)
                yield each
