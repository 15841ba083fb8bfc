"""The command line: `ipckit COMMAND`, one module for each command.

A command is a module with `add(subparsers)`, which declares its arguments and names its function, and that function,
`(args) -> int`, which imports what it needs when it is called. `COMMANDS` lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import IpcError, MissingDependency
from . import bench, contract, gc, locks, transports

COMMANDS = (bench, contract, gc, locks, transports)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status.

    0: done. 1: something was found wrong, or nobody reads any more. 2: not understood, or not possible. 130: Ctrl-C.

    What it prints is flushed here, where it can be told that nobody takes it; at the interpreter's end it would be too late.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `ipckit transports | head`
        _discard_output()
        return 1
    except OSError as error:
        print(f"ipckit: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
        _discard_output()
        return 2


def _run(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ipckit", description="Every inter-process transport behind one interface.")
    parser.add_argument("--version", action="version", version=f"ipckit {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except IpcError as error:
        print(f"ipckit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ipckit: interrupted", file=sys.stderr)
        return 130
    return status


def _discard_output() -> None:
    """What is left in the buffer, and could not be written: the interpreter would try once more, and fail aloud."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def need_rich() -> None:
    """Raise MissingDependency unless tables can be drawn."""
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "tables need the module 'rich', which is not installed", hint='from the checkout: pip install ".[cli]"'
        ) from error
