"""Imports run one way (DESIGN 8), read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipckit

ROOT = Path(ipckit.__file__).parent
PACKAGE = "ipckit"

#: From the ground up; what stands in one row may import what stands in the rows above it, and its own.
LAYERS = [
    {"errors"},
    {"_url", "_capabilities"},
    {"_options", "message"},
    {"_spi", "_linkwire"},
    {"spi", "_leasing", "_exchange"},
    {"_wait", "_registry", "_native", "codecs", "transports", "_linkkeeper", "_linkwatch", "_linkdialer"},
    {"_endpoint", "_taking", "observe"},
    {"_linkcrowd", "_linkintake", "_linkoutlet", "_linkpublisher", "_linksubscriber"},
    {"_linkqueue", "_linkhub"},
    {"_frames", "channel", "opening", "queue", "pubsub", "rpc", "sync"},
    {"", "aio"},
    {"agents", "bench", "testing", "cli"},
    {"__main__"},
]


def layer_of(module: str) -> int:
    top = module.removeprefix(PACKAGE).lstrip(".").partition(".")[0]
    for level, names in enumerate(LAYERS):
        if top in names:
            return level
    raise AssertionError(f"{module} stands in no layer: put it into LAYERS, and into DESIGN 8")


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join((PACKAGE, *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def imports(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """The ipckit modules that this one imports when it runs, wherever in its source."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.partition(".")[0] == PACKAGE:
                    yield name.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package
            for _ in range(node.level - 1):
                base = base.rpartition(".")[0]
            source = node.module or ""
            if node.level:
                source = f"{base}.{source}" if source else base
            if source.partition(".")[0] == PACKAGE:
                for name in node.names:
                    inner = f"{source}.{name.name}"
                    yield (inner if is_module(inner) else source), node.lineno


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All of a tree but what stands under `if TYPE_CHECKING`."""
    yield node
    if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from running(child)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path.is_dir() and any(path.glob("*.py")))


ALL = list(modules())


@pytest.mark.parametrize(("module", "path"), ALL, ids=[name for name, _ in ALL])
def test_imports_run_one_way(module: str, path: Path) -> None:
    wrong = [
        f"{path.name}:{line} imports {target}"
        for target, line in imports(module, path)
        if layer_of(target) > layer_of(module)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "path"),
    [pair for pair in ALL if ".transports." in pair[0]],
    ids=lambda value: getattr(value, "stem", None),
)
def test_a_transport_imports_no_other(module: str, path: Path) -> None:
    """No pattern either: only what is below, and the shared modules beside it."""
    shared = module.rpartition(".")[2].startswith("_")
    wrong = []
    for target, line in imports(module, path):
        inside = target.removeprefix(f"{PACKAGE}.transports.")
        if inside != target and not inside.startswith("_"):
            wrong.append(f"{path.name}:{line} imports the transport {inside}")
        if shared and inside == target and layer_of(target) > layer_of("ipckit.transports"):
            wrong.append(f"{path.name}:{line} imports {target}")
    assert wrong == []


def test_every_module_opens_with_its_idea() -> None:
    bare = [name for name, path in ALL if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]
    assert bare == []


def test_a_planted_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is worth something only if it sees each way to write an import."""
    source = """
import ipckit.channel
from ipckit import channel
from . import unix
from .. import channel
def f():
    from ..channel import Channel
if TYPE_CHECKING:
    from .. import queue
"""
    path = tmp_path / "toy.py"
    path.write_text(source)
    found = [target for target, _ in imports("ipckit.transports.toy", path)]
    assert found == ["ipckit.channel", "ipckit.channel", "ipckit.transports.unix", "ipckit.channel", "ipckit.channel"]
    assert layer_of("ipckit.channel") > layer_of("ipckit.transports.toy")
