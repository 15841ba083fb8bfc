"""Every example of README.md and docs/ works.

Each fenced `python` and `console` block is an example, and is executed: a `python` block as a program of its own, a `console`
block as commands (with or without `$`), in an empty directory, warnings being errors. A comment on the line above a block says
otherwise:

    <!-- continues -->                 it goes on from the python block before it on the page
    <!-- server: redis -->             (nats, or both) one is started; the block says redis://localhost, nats://localhost
    <!-- file: NAME -->                it is the file NAME, or its next part; the examples of the page find it
    <!-- run by: PATH -->              it takes another setting; PATH is the test or script that runs it, and names the page
    <!-- parsed only: REASON -->       console: the commands are too long for a test; only their options are read
    <!-- first-command --> and <!-- second-command -->    README's two commands: run by .ci/run

A page with a `pyproject.toml` among its files makes a package: its entry points are there as if it were installed. Blocks in
other languages (`text`, `toml`, `c`) are not run.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ipckit.testing.servers import nats_server, redis_server

ROOT = Path(__file__).parents[2]
SERVERS = {"redis": redis_server, "nats": nats_server}
ADD_A_TRANSPORT = ROOT / "docs" / "howto" / "add-a-transport.md"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ABOVE = re.compile(r"<!-- *([a-z -]+?)(?:: *(.*?))? *-->\n\Z")
_MARKS = {"", "server", "file", "run by", "parsed only", "first-command", "second-command"}


@dataclass(frozen=True)
class Example:
    page: Path
    line: int
    language: str
    code: str
    mark: str
    value: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Example]:
    text = page.read_text()
    for block in _FENCE.finditer(text):
        above = _ABOVE.search(text, 0, block.start())
        mark, value = (above[1], above[2] or "") if above else ("", "")
        yield Example(page, text.count("\n", 0, block.start()) + 1, block[1], block[2], mark, value)


def files(page: Path) -> dict[str, str]:
    """The files that a page writes, their parts put together."""
    made: dict[str, str] = {}
    for block in blocks(page):
        if block.mark == "file":
            made[block.value] = f"{made[block.value]}\n\n{block.code}" if block.value in made else block.code
    return made


def examples(page: Path) -> list[Example]:
    """What is to be run; what continues another is joined to it."""
    found: list[Example] = []
    for block in blocks(page):
        if block.language in ("python", "console") and block.mark != "file":
            if block.mark == "continues":
                before = found.pop()
                block = Example(page, before.line, "python", before.code + block.code, before.mark, before.value)
            found.append(block)
    return found


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [example for page in PAGES for example in examples(page)]


@pytest.fixture
def environ() -> Iterator[dict[str, str]]:
    """What an example runs in: a runtime directory of its own, our programs on PATH, no trace of this test run."""
    with tempfile.TemporaryDirectory(prefix="ipckit-") as runtime:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_", "IPCKIT_"))
        }
        path = os.pathsep.join((sysconfig.get_path("scripts"), os.path.dirname(sys.executable), clean.get("PATH", "")))
        yield clean | {"IPCKIT_RUNTIME_DIR": runtime, "PATH": path, "PYTHONWARNINGS": "error"}


def run(command: list[str], directory: Path, environ: dict[str, str], timeout: float = 50) -> str:
    path = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        cwd=directory,
        env=environ | {"PYTHONPATH": path},
        timeout=timeout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def build(page: Path, directory: Path) -> None:
    """The files of a page, and what `pip install` would make of its pyproject.toml."""
    for name, text in files(page).items():
        (directory / name).write_text(text)
    if (directory / "pyproject.toml").exists():
        project = tomllib.loads((directory / "pyproject.toml").read_text())["project"]
        info = directory / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        with open(info / "entry_points.txt", "w") as points:
            for group, entries in project["entry-points"].items():
                print(f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()), sep="\n", file=points)


def commands(example: Example) -> list[str]:
    """The lines of a console block; where there are prompts, the other lines are what was printed."""
    lines = [line for line in example.code.split("\n") if line.strip()]
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    return prompted or lines


@pytest.mark.timeout(240)  # one of them runs the whole conformance suite
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example(example: Example, tmp_path: Path, environ: dict[str, str]) -> None:
    assert example.mark in _MARKS, f"{example.name}: no such comment: {example.mark!r}"
    match example.mark:
        case "run by":
            assert example.page.name in (ROOT / example.value).read_text(), f"{example.value} does not name the page"
        case "first-command" | "second-command":
            assert f"command_of {example.mark}" in (ROOT / ".ci" / "run").read_text()
        case "parsed only":
            assert example.value, "the comment does not say why"
            for command in commands(example):
                check_options(shlex.split(command, comments=True))
        case _:
            build(example.page, tmp_path)
            with ExitStack() as stack:
                code = example.code
                for name in filter(None, re.split("[, ]+", example.value)):
                    code = code.replace(f"{name}://localhost", stack.enter_context(SERVERS[name]()).url.rstrip("/"))
                if example.language == "python":
                    (tmp_path / "example.py").write_text(code)
                    run([sys.executable, "-X", "dev", "example.py"], tmp_path, environ)
                else:
                    run(["sh", "-ec", "\n".join(commands(example))], tmp_path, environ, 230)


class _Read(Exception):
    """The options were understood."""


def check_options(command: list[str]) -> None:
    from ipckit import cli

    assert command[0] == "ipckit", f"only ipckit's own commands can be parsed only: {command}"
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: Any, **named: Any) -> Any:
        parse(self, *args, **named)
        raise _Read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(_Read):
            cli.main(command[1:])


def test_add_a_transport_runs_the_whole_suite(tmp_path: Path, environ: dict[str, str]) -> None:
    """The page's last command is in order only if it finds the contracts, none of which is skipped for want of a peer."""
    assert [example.code for example in examples(ADD_A_TRANSPORT) if example.language == "console"] == [
        "$ python -m pytest -q test_packet.py\n"
    ]
    build(ADD_A_TRANSPORT, tmp_path)
    told = run([sys.executable, "-m", "pytest", "--collect-only", "-q", "test_packet.py"], tmp_path, environ)
    assert int(re.findall(r"(\d+) tests collected", told)[0]) > 200


def test_the_code_of_add_a_transport_is_in_order(tmp_path: Path, environ: dict[str, str]) -> None:
    """Others start from it."""
    pytest.importorskip("mypy", exc_type=ImportError)
    build(ADD_A_TRANSPORT, tmp_path)
    run([sys.executable, "-m", "mypy", "--strict", "packet_transport.py"], tmp_path, environ)
