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
    read = tomllib.loads(Path(sys.argv[1]).read_text())
    return Planes(**read["planes"]), read["run"]


# -- control: one question, one answer -----------------------------------------------------------------------------


class Task(msgspec.Struct, tag=True):
    number: int
    text: str


class Done(msgspec.Struct, tag=True):
    number: int
    result: str


Control = Task | Done


def ask(agent: ipckit.Channel[Control], task: Task) -> Done:
    """The seam for RPC: with `ipckit.client` this is a method of the agent, and `Task` and `Done` are its types."""
    agent.send(task, timeout=10)
    return agent.recv(timeout=10)


# -- events: topics are run.*, task.*, tool.* ----------------------------------------------------------------------


class Event(msgspec.Struct):
    who: str
    about: str


# -- tools: the answer is the call, filled in ----------------------------------------------------------------------


class Call(msgspec.Struct):
    tool: str
    text: str
    answer: str = ""
