"""All ends of one contender, seen from the parent: one or two workers, told what to do, and ended whatever happens.

One end drives; the other is an echo, or an audience of many. Those are processes too, forked by their worker before it
has opened anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Literal

from .measure import Job
from .wires import Handed, Handover, Side

_START = 20.0  # seconds until both ends are open; a loaded machine may take some
_END = 3.0


class ContenderFailed(Exception):
    """One contender cannot be measured. The text is what a reader of the table is told.

    `absent`: this machine cannot do it, which is no failure of ours.
    """

    def __init__(self, text: str, hint: str | None = None, *, absent: bool = False) -> None:
        super().__init__(text)
        self.hint, self.absent = hint, absent


@dataclass(frozen=True, slots=True)
class Plan:
    """How the two ends of a contender are opened.

    Attributes:
        opener: `module:function`, an Opener or AsyncOpener; or `floor:MECHANISM`.
        address: where the echo listens.
        options: the URL options of the connecting side, where they differ.
        shell: what kind of opener it is.
        together: both ends in one process.
        handover: makes both ends here, where they cannot find each other by name.
        loop: where the driving side talks to itself; see `Wire.turn`.
        first: the side that has the name.
        audience: how many echoes.
        paced: the jobs are those of `paced`.
        preload: modules that an audience imports once.
    """

    opener: str
    address: str = ""
    options: str = ""
    shell: Literal["sync", "aio"] = "sync"
    together: bool = False
    handover: Handover | None = None
    loop: str = ""
    first: Side = "echo"
    audience: int = 1
    paced: bool = False
    preload: tuple[str, ...] = ()

    def at(self, **places: str) -> Plan:
        """With the placeholders of its addresses filled in."""
        return replace(
            self,
            address=self.address.format(**places),
            options=self.options.format(**places),
            loop=self.loop.format(**{**places, "name": places.get("name", "") + "loop"}),
        )


class Worker:
    """One process, and the lines to and from it."""

    def __init__(self, setup: Mapping[str, object], descriptors: Sequence[int], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `end`
        self._pending = b""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ipckit.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=tuple(descriptors),
            env={**os.environ, **environment},
            bufsize=0,
        )
        self.tell(setup)

    def tell(self, order: Mapping[str, object]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `reports` finds out why
            self._process.stdin.write(json.dumps(order).encode() + b"\n")

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def reports(self) -> list[dict[str, Any]]:
        """What has come; call it when the descriptor is readable. Raises ContenderFailed when it has ended."""
        data = os.read(self.fileno(), 1 << 20)
        if not data:
            raise ContenderFailed(self._last_words())
        *lines, self._pending = (self._pending + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _last_words(self) -> str:
        try:
            status = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            return "the worker closed its output"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the worker ended ({status})" + (f": {lines[-1]}" if lines else "")

    def end(self, patience: float) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdin.close()
            self._process.stdout.close()
            self._errors.close()


class Crew:
    """The two ends of one contender, connected, waiting for a Job.

    `launch` starts the processes and returns at once, so that several crews can start side by side; `open` waits until
    both ends are connected.
    """

    def __init__(self, plan: Plan, cpus: tuple[int, int], environment: Mapping[str, str]) -> None:
        self._plan = plan
        self._cpus = {"drive": cpus[0], "echo": cpus[1]}
        self._environment = environment
        self._workers: list[Worker] = []
        self._handing = contextlib.ExitStack()  # what is handed over is ours until they have it
        self._opened = False
        echoes = ("echo",) if plan.audience == 1 else tuple(f"echo.{i}" for i in range(plan.audience))
        self._sides: tuple[str, ...] = (*echoes, "drive")

    def launch(self) -> None:
        plan = self._plan
        kind, _, mechanism = plan.opener.partition(":")
        common: dict[str, object] = {
            "cpus": self._cpus,
            "shell": plan.shell,
            "opener": plan.opener,
            "options": plan.options,
            "loop": plan.loop,
            "first": plan.first,
            "audience": plan.audience,
            "preload": plan.preload,
        }
        common |= {"address": plan.address, "descriptors": [], "pace": []}
        if kind == "floor":
            self._sides = ("drive",)
            self._start({"floor": mechanism, **common}, ())
            return
        pace = _pipe(self._handing) if plan.paced else ()
        common["pace"] = pace
        if plan.together:
            self._start({"sides": self._sides, **common}, pace)
            return
        ends: tuple[Handed, Handed] = ((plan.address, ()), (plan.address, ()))
        if plan.handover is not None:
            ends = self._handing.enter_context(plan.handover(plan.address))
        for sides, (address, descriptors) in zip((self._sides[:-1], self._sides[-1:]), ends, strict=True):
            setup = {**common, "sides": sides, "address": address, "descriptors": list(descriptors)}
            self._start(setup, (*descriptors, *pace))

    def _start(self, setup: Mapping[str, object], descriptors: Sequence[int]) -> None:
        self._workers.append(Worker(setup, descriptors, self._environment))

    def open(self) -> None:
        waiting = set(self._sides)
        deadline = time.monotonic() + _START
        while waiting:
            for report in self._reports(deadline, "opening"):
                if "listening" in report:
                    other = "drive" if self._plan.first == "echo" else "echo"
                    self._tell({"to": other, "address": report["listening"]})
                elif "open" in report:
                    waiting.discard(report["side"])
        self._handing.close()
        self._opened = True

    def do(self, job: Job, patience: float) -> dict[str, Any]:
        """Run it, and return what all ends report of it together.

        Raises: ContenderFailed after `patience` seconds without a result.
        """
        self._tell({"to": None, "measure": asdict(job)})
        waiting = set(self._sides)
        deadline = time.monotonic() + patience
        result: dict[str, Any] = {}
        while waiting:
            for report in self._reports(deadline, f"measuring {job.kind} of {job.size} bytes"):
                waiting.discard(report["side"])
                _join(result, report["result"])
        if "sent" in result:
            result["samples"] = [max(got - sent, 1) for sent, got in zip(result["sent"], result["got"], strict=True)]
        return result

    def _tell(self, order: Mapping[str, object]) -> None:
        for worker in self._workers:
            worker.tell(order)

    def _reports(self, deadline: float, doing: str) -> list[dict[str, Any]]:
        ready, _, _ = select.select(self._workers, (), (), max(deadline - time.monotonic(), 0))
        if not ready:
            raise ContenderFailed(f"no answer in time while {doing}")
        reports = [report for worker in ready for report in worker.reports()]
        for report in reports:
            if "failed" in report:
                raise ContenderFailed(report["failed"], report["hint"], absent=report["absent"])
        return reports

    def close(self, patience: float = _END) -> None:
        """End the workers: in order, so that they remove what they made, and by force after `patience` seconds."""
        self._handing.close()
        self._tell({"to": None, "close": True})
        deadline = time.monotonic() + patience
        while self._workers:
            self._workers.pop().end(max(deadline - time.monotonic(), 0) if self._opened else 0)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(_END if kind is None else 0.2)


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe whose ends are the workers' once the stack is left."""
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _join(result: dict[str, Any], report: Mapping[str, Any]) -> None:
    """Of an audience: it has ended when the last one has, and received what all of them have."""
    for name, value in report.items():
        if name in result and name == "ended":
            result[name] = max(result[name], value)
        elif name in result and name == "received":
            result[name] += value
        else:
            result[name] = value
