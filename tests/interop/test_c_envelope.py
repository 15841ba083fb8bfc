"""A third language in the envelope protocol: envelope.c, and the C library."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import ipckit

SOURCE = Path(__file__).with_name("envelope.c")


class AddRequest(msgspec.Struct):
    a: int
    b: int


class AddResult(msgspec.Struct):
    sum: int


class ListRequest(msgspec.Struct):
    count: int


class Note(msgspec.Struct):
    text: str


class Calculator(ipckit.Service):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.noted = threading.Event()

    def add(self, req: AddRequest) -> AddResult:
        return AddResult(req.a + req.b)

    def list(self, req: ListRequest) -> Iterator[int]:
        yield from range(req.count)

    def note(self, req: Note) -> None:
        self.notes.append(req.text)
        self.noted.set()


@pytest.fixture(scope="module")
def program(compiler, tmp_path_factory) -> str:
    built = str(tmp_path_factory.mktemp("c") / "envelope")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", built], check=True, timeout=60)
    return built


@pytest.mark.parametrize(("dialect", "frames"), [("seed", 5), ("v1", 6), ("v2", 6)])
def test_a_client_in_c(program, run, runtime_dir, dialect, frames):
    service = Calculator()
    with ipckit.Server("unix://calc", service) as server:
        client = run(program, f"{runtime_dir}/calc.sock", dialect)
        assert client.line() == "sum 8"
        assert client.line() == f"frames {frames} sum 10"
        if dialect != "seed":
            assert client.line() == "delivered"
            assert service.noted.wait(30)
            assert service.notes == ["from C"]
        assert client.process.wait(30) == 0
        assert server.stats()["errors"] == 0
