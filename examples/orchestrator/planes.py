"""What all parties share: three URLs from one file, and what is said on each of them."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

import ipckit


@dataclass(frozen=True)
class Planes:
    control: str
    events: str
    tools: str


def configuration() -> tuple[Planes, dict]:
    """The file that the command line names."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {Path(sys.argv[0]).name} planes.toml")
    read = tomllib.loads(Path(sys.argv[1]).read_text())
    return Planes(**read["planes"]), read["run"]


# -- control: what agents ask of the orchestrator ------------------------------------------------------------------


class Task(msgspec.Struct):
    number: int
    text: str


class Control(ipckit.Service):
    def next(self, agent: str) -> Task | None:
        """Something to do; None when there is nothing left."""

    def done(self, agent: str, number: int, result: str) -> None: ...


# -- events: topics are run.*, task.*, tool.* ----------------------------------------------------------------------


class Event(msgspec.Struct):
    who: str
    about: str


# -- tools: calls that are shorter than the telling ----------------------------------------------------------------


class Tools(ipckit.Service):
    def count(self, text: str) -> int: ...

    def shout(self, text: str) -> str: ...
