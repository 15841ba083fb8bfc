"""`ipckit contract`, as CI uses it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipckit.cli import main

OLD = """
from collections.abc import Iterator
import msgspec
import ipckit

class Order(msgspec.Struct):
    item: str
    qty: int = 1

class Shop(ipckit.Service):
    def price(self, item: str) -> int: ...
    def order(self, order: Order) -> int: ...
    def watch(self, item: str) -> Iterator[int]: ...
"""
GROWN = OLD.replace("qty: int = 1", 'qty: int = 1\n    note: str = ""').replace(
    "price(self, item: str)", "price(self, item: str, day: int = 0)"
)
BROKEN = OLD.replace("qty: int = 1", "qty: str = '1'").replace("-> Iterator[int]", "-> int")


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, source in (("old_shop", OLD), ("grown_shop", GROWN), ("broken_shop", BROKEN)):
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("old_shop", "grown_shop", "broken_shop"):
        sys.modules.pop(name, None)


def test_a_contract_that_only_grows_breaks_nobody(capsys):
    assert main(["contract", "export", "--json-schema", "old_shop:Shop"]) == 0
    Path("old.json").write_text(capsys.readouterr().out)
    assert json.loads(Path("old.json").read_text())["$schema"].startswith("https://json-schema.org/")
    assert main(["contract", "check", "old.json", "grown_shop:Shop"]) == 0


def test_what_breaks_is_named_and_is_the_exit_status(capsys):
    assert main(["contract", "check", "old_shop:Shop", "broken_shop:Shop"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "order.order.qty: integer is written, string is read",
        "watch: was server stream, is unary",
        "2 of the changes break callers",
    ]
    assert main(["contract", "check", "--json", "old_shop:Shop", "broken_shop:Shop"]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_proto_is_what_protoc_reads(capsys):
    assert main(["contract", "export", "--proto", "--package", "my.shop", "old_shop:Shop"]) == 0
    text = capsys.readouterr().out
    assert "package my.shop;" in text
    assert "rpc Watch(WatchRequest) returns (stream WatchResponse);" in text
    assert "optional int64 qty = 2;" in text


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("nothing", "neither MODULE:CLASS nor a file"),
        ("old_shop:Nothing", "cannot be imported"),
        ("no_such_module:Shop", "cannot be imported"),
        ("fails:Shop", "cannot be imported: ValueError: not today ("),
        ("fails:Shop", "fails.py, line 2)"),
        ("torn:Shop", "torn.py"),
        ("other.json", "no description of a contract"),
        ("list.json", "no description of a contract"),
        ("half.json", "missing required field `shape`"),
    ],
)
def test_what_is_no_contract_is_said(capsys, what, text):
    Path("fails.py").write_text('"""A module."""\nraise ValueError("not today")\n')
    Path("torn.py").write_text("def (\n")
    Path("other.json").write_text('{"methods": 3}')
    Path("list.json").write_text("[]")
    Path("half.json").write_text('{"methods": {"price": {}}, "$defs": {}}')
    assert main(["contract", "check", what, "old_shop:Shop"]) == 2
    assert text in capsys.readouterr().err
