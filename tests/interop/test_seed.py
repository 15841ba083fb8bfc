"""The clients that the seed prints, byte for byte: only the path of the socket is set."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec
import pytest

import ipckit

SEED = Path(__file__).parent / "seeds" / "002_53d96627208b9f67.txt"
PRINTED = "/tmp/acton.sock"


class AddRequest(msgspec.Struct):
    a: int
    b: int


class AddResult(msgspec.Struct):
    sum: int


class Calculator(ipckit.Service):
    def add(self, req: AddRequest) -> AddResult:
        return AddResult(req.a + req.b)


def printed(language: str) -> str:
    """The one program of this language that connects to something."""
    blocks = re.findall(rf"```{language}\n(.*?)```", SEED.read_text(), re.DOTALL)
    (program,) = (block for block in blocks if PRINTED in block)
    return program


@pytest.fixture
def path(runtime_dir):
    with ipckit.Server("unix://calc", Calculator()) as server:
        yield f"{runtime_dir}/calc.sock"
        stats = server.stats()
        assert (stats["messages_processed"], stats["errors"]) == (1, 0)


def test_the_python_client(run, path):
    program = run(sys.executable, "-c", printed("python").replace(PRINTED, path))
    assert program.line() == "Result: 8"
    assert program.process.wait(30) == 0


def test_the_node_client(run, node, path):
    program = run(node, "-e", printed("javascript").replace(PRINTED, path))
    assert program.line() == "Result: 8"
    assert program.process.wait(30) == 0
