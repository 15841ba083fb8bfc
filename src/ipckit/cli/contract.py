"""`ipckit contract`: what a service promises, for other languages, and for CI.

ipckit contract export --proto shop:Shop > shop.proto
ipckit contract export --json-schema shop:Shop > shop.json
ipckit contract check shop.json shop:Shop           # exit status 1 when callers of the old one would break
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from ..errors import BadOption, ConfigError


def add(subparsers: Any) -> None:
    what = "export what a service promises, and compare it with what it was"
    parser = subparsers.add_parser("contract", help=what, description=what.capitalize() + ".")
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    export = actions.add_parser(
        "export",
        help="write a contract as protocol buffers or JSON Schema",
        description="Write the contract of a service to standard output.",
    )
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--proto", action="store_true", help="a .proto file")
    form.add_argument("--json-schema", action="store_true", help="a JSON Schema document, which `check` reads")
    export.add_argument("--package", help="the protobuf package (default: the service's name in lower case)")
    export.add_argument("service", metavar="MODULE:CLASS", help="the service")
    export.set_defaults(run=run_export)

    check = actions.add_parser(
        "check",
        help="which changes break callers; exit status 1 when one does",
        description="Say which changes from OLD to NEW break callers of OLD. Exit status 1 when one does, 2 when OLD or NEW "
        "cannot be read.",
    )
    check.add_argument("--json", action="store_true", help="a list of what breaks, for machines")
    for name in ("old", "new"):
        check.add_argument(name, metavar=name.upper(), help="MODULE:CLASS, or a file that `export --json-schema` wrote")
    check.set_defaults(run=run_check)


def run_export(args: argparse.Namespace) -> int:
    from ..rpc.protobuf import json_schema, schema_of

    service = load(args.service)
    if args.proto:
        sys.stdout.write(schema_of(service, args.package).text())
    elif args.package is not None:
        raise BadOption("--package is for --proto")
    else:
        print(json.dumps(json_schema(service), indent=2, ensure_ascii=False))
    return 0


def run_check(args: argparse.Namespace) -> int:
    from ..rpc.compat import check

    broken = check(describe(args.old), describe(args.new))
    if args.json:
        print(json.dumps(broken, indent=2, ensure_ascii=False))
    else:
        for each in broken:
            print(each)
        print(f"{len(broken)} of the changes break callers" if broken else "callers of the old contract can go on")
    return 1 if broken else 0


def describe(what: str) -> dict[str, Any]:
    """The description behind MODULE:CLASS, or in a file. Raises ConfigError."""
    from ..rpc.contract import contract_of

    path = Path(what)
    if not path.is_file():
        return contract_of(load(what)).describe()
    from ..rpc._description import read

    try:
        return read(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{what} is no description of a contract: {error}", hint="`ipckit contract export --json-schema` writes one"
        ) from error


def load(what: str) -> Any:
    """The class behind MODULE:CLASS; modules are also found in the current directory. Raises ConfigError."""
    module, _, name = what.partition(":")
    if not module or not name:
        raise BadOption(f"{what!r} is neither MODULE:CLASS nor a file")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what} cannot be imported: {error}") from error
    except Exception as error:  # whatever the module's own code raises
        raise ConfigError(f"{what} cannot be imported: {_told(error)}") from error
    return found


def _told(error: Exception) -> str:
    """With the place: the module is the user's."""
    text = "".join(traceback.format_exception_only(error)).strip()
    at = traceback.extract_tb(error.__traceback__)[-1]
    return text if isinstance(error, SyntaxError) else f"{text} ({at.filename}, line {at.lineno})"
