"""Programs in other languages, and a runtime directory for each test."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Program:
    """A running program of another language. It is gone when the test is."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self.process.pid
        self._seen = b""

    def line(self, seconds: float = 30) -> str:
        """The next line that it prints."""
        deadline = time.monotonic() + seconds
        assert self.process.stdout
        while b"\n" not in self._seen:
            ready, _, _ = select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"printed nothing in {seconds} s, after {self._seen!r}"
            more = os.read(self.process.stdout.fileno(), 1 << 16)
            assert more, f"ended with {self.process.wait(10)}, after {self._seen!r}"
            self._seen += more
        line, _, self._seen = self._seen.partition(b"\n")
        return line.decode()

    def say(self, text: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def finish(self) -> None:
        """Close its input."""
        assert self.process.stdin
        self.process.stdin.close()

    def stop(self) -> None:
        self.process.kill()
        if self.process.stdin:
            self.process.stdin.close()
        if self.process.stdout:
            self.process.stdout.close()
        self.process.wait(10)


@pytest.fixture
def run() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def start(*command: str) -> Program:
        programs.append(Program(*command))
        return programs[-1]

    yield start
    for program in programs:
        program.stop()


def tool(name: str) -> str:
    """Where a program is. Without it a laptop skips, and CI fails: there it would be a test that nobody ever runs."""
    found = shutil.which(name)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI has to have it")
        pytest.skip(f"{name} is not installed")
    return found


@pytest.fixture(scope="session")
def node() -> str:
    return tool("node")


@pytest.fixture(scope="session")
def npm() -> str:
    return tool("npm")


@pytest.fixture(scope="session")
def packages(npm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Installs packages of npm; where they are."""
    directories: list[Path] = []

    def install(*names: str) -> Path:
        directories.append(tmp_path_factory.mktemp("npm"))
        command = [npm, "install", "--no-audit", "--no-fund", "--no-save", "--loglevel=error", *names]
        subprocess.run(command, cwd=directories[-1], check=True, timeout=50, stdout=subprocess.DEVNULL)
        return directories[-1] / "node_modules"

    yield install
    for each in directories:
        shutil.rmtree(each, ignore_errors=True)


@pytest.fixture(scope="session")
def compiler() -> str:
    return tool("gcc")


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Its path is short, because the path of a Unix socket has to be."""
    path = tempfile.mkdtemp(prefix="ipckit-")
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", path)
    yield path
    shutil.rmtree(path, ignore_errors=True)
