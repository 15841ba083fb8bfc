"""One run: open the contenders of a case, find out how long they take, measure them in turns, collect.

Time is planned, not hoped for: each measurement is first tried small, and grown until it lasts long enough to tell how many
rounds fit into its share of the budget. A contender that fails is a line of the table with its reason; the others go on.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from .. import _registry
from .._url import parse
from ..errors import IpcError, MissingDependency
from ..testing.servers import Server, nats_server, redis_server
from . import certificate, stats
from .crew import ContenderFailed, Crew, Plan
from .machine import Machine
from .measure import Job
from .results import Conditions, Measured, Results, Row
from .scenarios import Case, Shell


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds for each single measurement, and how many of each.

    Attributes:
        samples: single round trips of all repeats together, at least; what a 99.9th percentile asks for.
        total: of the whole table. A case whose share of it is used up is not repeated again.
    """

    repeats: int
    trips: float
    flow: float
    samples: int = 0
    total: float = inf


FULL = Budget(repeats=5, trips=0.25, flow=0.1, samples=stats.needed(0.999))
QUICK = Budget(repeats=3, trips=0.04, flow=0.02, total=40.0)

#: A round trip below this (ns) is timed in batches for its median: the clock is read once for many.
BRIEF = 10_000
_BATCH = 32
_MANY = 64  # messages in one send_many
_MOST_SAMPLES = 50_000  # of one repeat: they all come back to us
_PATIENCE = 15.0  # seconds beyond what a measurement should take


@dataclass(slots=True)
class _Contender:
    """One crew at work, and what is known of it so far."""

    crew: Crew
    found: Measured
    case: Case
    shell: Shell
    largest: int | None = None  # bytes; None: any
    trip: float = 0.0  # ns, as tried
    rates: dict[tuple[int, int], float] = field(default_factory=dict)  # (size, batch) → messages a second, as tried
    centres: list[float] = field(default_factory=list)
    singles: list[list[float]] = field(default_factory=list)
    flows: dict[tuple[int, int], list[tuple[int, int, int]]] = field(default_factory=dict)

    @property
    def batches(self) -> bool:
        """It has send_many, and costs little enough for that to matter."""
        return self.found.kind == "ours"

    def carries(self, size: int) -> bool:
        return self.largest is None or size <= self.largest


#: Told what is being measured, and the part (0 to 1) of the whole run that is done.
Progress = Callable[[str, float], None]


class Session:
    """A run over some cases.

    Args:
        sizes: bytes; the first for round trips and flows, the others for flows.
        cpus: of the driving end and of the echo.
    """

    def __init__(
        self,
        pattern: str,
        cases: Sequence[Case],
        shells: Sequence[Shell],
        sizes: Sequence[int],
        budget: Budget,
        cpus: tuple[int, int],
        machine: Machine,
        progress: Progress = lambda what, part: None,
    ) -> None:
        self._pattern = pattern
        self._work: list[tuple[Case, Shell]] = [
            (case, shell) for case in cases for shell in shells if shell == "sync" or case.awaited or len(shells) == 1
        ]
        self._sizes = tuple(sizes)
        self._budget = budget
        self._cpus = cpus
        self._machine = machine
        self._progress = progress
        self._part = 0.0  # of the run that is done
        self._share = 0.0  # of the run that the case at hand is
        self._due = inf  # when the case at hand should be done

    def run(self) -> Results:
        """Measure it all. Ctrl-C ends every process that was started, and raises KeyboardInterrupt."""
        started, began = datetime.datetime.now(datetime.UTC), time.monotonic()
        rows: list[Row] = []
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipckit-bench-")))
            certificate.write(directory)
            servers = _Servers(stack)
            weights = [_weight(case, shell) for case, shell in self._work]
            for done, (case, shell) in enumerate(self._work):
                self._part, self._share = sum(weights[:done]) / sum(weights), weights[done] / sum(weights)
                left = began + self._budget.total - time.monotonic()
                self._due = time.monotonic() + left * weights[done] / sum(weights[done:])
                self._say(case.scheme + (" · aio" if shell == "aio" else ""), 0)
                rows += self._case(case, shell, directory, servers)
            self._part = 1.0
            self._say("done", 0)
        conditions = Conditions(
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - began, 1),
            quick=self._budget is QUICK,
            repeats=self._budget.repeats,
            cpus=self._cpus,
            sizes=self._sizes,
        )
        return Results(replace(self._machine, servers=servers.versions), conditions, rows)

    def _say(self, what: str, within: float) -> None:
        self._progress(what, self._part + within * self._share)

    # -- one case: all its variants, its raw client and its floors, side by side --------------------------------------

    def _case(self, case: Case, shell: Shell, directory: Path, servers: _Servers) -> list[Row]:
        raw = _raw(case, shell)  # measured once, for all variants
        rows = [
            Row(self._pattern, case.scheme, variant.options, shell, Measured("ours", "ipckit"), raw)
            for variant in case.variants
        ]
        try:
            transport = _registry.open_transport(parse(case.scheme + "://x"))
            largest = transport.capabilities.max_message
            places = {"dir": str(directory), **servers.start(case.server)}
        except (IpcError, ImportError) as error:
            for row in rows:
                row.ours.failed = error.message if isinstance(error, IpcError) else str(error)
                row.ours.hint = error.hint if isinstance(error, IpcError) else None
                row.ours.absent = isinstance(error, MissingDependency)
                row.raw, row.floors = None, []
            return rows
        environment = {"IPCKIT_RUNTIME_DIR": str(directory / "run")}
        with ExitStack() as stack:
            contenders = [
                stack.enter_context(_contender(plan, found, case, self._cpus, environment, largest))
                for plan, found in self._plans(case, shell, rows, places)
            ]
            for contender in contenders:  # all start side by side
                with _failing(contender):
                    contender.crew.launch()
            for contender in contenders:
                with _failing(contender):
                    contender.crew.open()
            self._measure([each for each in contenders if each.found.failed is None], rows[0].label)
        return rows

    def _plans(
        self, case: Case, shell: Shell, rows: Sequence[Row], places: dict[str, str]
    ) -> Iterator[tuple[Plan, Measured]]:
        """How each contender is opened. The rows share the raw client; each floor is measured once."""

        def fill(plan: Plan) -> Plan:
            return plan.at(name=f"bench{secrets.token_hex(4)}", **places)

        floors: dict[str, Measured] = {}
        for variant, row in zip(case.variants, rows, strict=True):
            yield fill(case.ours(variant, shell)), row.ours
            one_cpu = self._cpus[0] == self._cpus[1]  # where a floor that spins waits for the scheduler
            for mechanism in case.variants[-1].floors if one_cpu else variant.floors:
                if mechanism not in floors:
                    floors[mechanism] = Measured("floor", mechanism)
                    yield Plan(f"floor:{mechanism}"), floors[mechanism]
                row.floors.append(floors[mechanism])
        rival = case.rival(shell)
        if rival is not None and rows[0].raw is not None:
            yield fill(rival), rows[0].raw

    # -- calibrate, then in turns -------------------------------------------------------------------------------------

    def _measure(self, crews: list[_Contender], label: str) -> None:
        size = self._sizes[0]
        flows = [(each, 1) for each in self._sizes] + [(size, _MANY)]
        stages = 1 + self._budget.repeats * (1 + len(flows))
        stage = 0

        def each(what: str, step: Callable[[_Contender], None]) -> None:
            nonlocal stage
            self._say(f"{label.partition(' ')[0]} · {what}", stage / stages)
            stage += 1
            for contender in crews:
                if contender.found.failed is None:
                    with _failing(contender):
                        step(contender)

        each("warming up", lambda c: self._calibrate(c, flows))
        for turn in range(self._budget.repeats):
            if turn and time.monotonic() > self._due:
                break
            each(f"round trips, {turn + 1} of {self._budget.repeats}", self._trips)
            for flow in flows:
                what = f"one way, {stats.size(flow[0])}, {turn + 1} of {self._budget.repeats}"
                each(what, lambda c, flow=flow: self._flow(c, *flow))  # type: ignore[misc]
        for contender in crews:
            _summarise(contender, self._sizes)

    def _calibrate(self, contender: _Contender, flows: Sequence[tuple[int, int]]) -> None:
        count, enough = 8, self._budget.trips * 0.3e9
        while True:
            taken = self._do(contender, Job("trips", self._sizes[0], count), 1.0)
            contender.trip = stats.median(taken["samples"])
            took = sum(taken["samples"])
            if took >= enough or count >= _MOST_SAMPLES:
                break
            count = min(_larger(count, enough / took), _MOST_SAMPLES)
        for size, batch in flows:
            if not contender.carries(size) or (batch > 1 and not contender.batches):
                continue
            count = max(2 if size > 1 << 16 else 16, batch)
            while True:
                job = Job("flow", size, count, batch, contender.case.lossy)
                carried = self._attempt(contender, job)
                if carried is None:
                    break
                nanoseconds = max(carried["ended"] - carried["started"], 1)
                contender.rates[size, batch] = count / nanoseconds * 1e9
                room = self._count(contender, size, batch)
                enough = self._budget.flow * 0.3e9
                if nanoseconds >= enough or count >= room:
                    break
                count = min(_larger(count, enough / nanoseconds) // batch * batch, room)

    def _attempt(self, contender: _Contender, job: Job) -> dict[str, Any] | None:
        """A floor does not carry every size; then it has no figure for that one."""
        try:
            return self._do(contender, job, 1.0)
        except ContenderFailed:
            if contender.found.kind == "floor" and job.size > 1 << 12:
                contender.largest = job.size - 1
                return None
            raise

    def _count(self, contender: _Contender, size: int, batch: int) -> int:
        """Messages of one flow: what fits into its time, and into the broker."""
        count = int(contender.rates[size, batch] * self._budget.flow)
        return max(min(count, contender.case.flow_bytes // max(size, 1)) // batch, 1) * batch

    def _trips(self, contender: _Contender) -> None:
        size, budget = self._sizes[0], self._budget
        count = max(int(budget.trips * 1e9 / contender.trip), -(-budget.samples // budget.repeats), 10)
        if contender.trip < BRIEF and contender.found.kind != "floor" and contender.shell == "sync":
            rounds = max(count // 2 // _BATCH, 10) * _BATCH
            taken = self._do(contender, Job("trips", size, rounds, _BATCH), budget.trips)
            centre = stats.median(taken["samples"])
        else:
            centre = None
        singles = min(count, _MOST_SAMPLES)
        taken = self._do(contender, Job("trips", size, singles), singles * contender.trip / 1e9)
        contender.singles.append(taken["samples"])
        contender.centres.append(stats.median(taken["samples"]) if centre is None else centre)

    def _flow(self, contender: _Contender, size: int, batch: int) -> None:
        if (size, batch) not in contender.rates or not contender.carries(size):
            return
        count = self._count(contender, size, batch)
        taken = self._do(contender, Job("flow", size, count, batch, contender.case.lossy), self._budget.flow)
        took = taken["ended"] - taken["started"]
        if taken["received"] and took > 0:
            contender.flows.setdefault((size, batch), []).append((count, taken["received"], took))

    def _do(self, contender: _Contender, job: Job, seconds: float) -> dict[str, Any]:
        return contender.crew.do(job, _PATIENCE + 10 * seconds)


def _weight(case: Case, shell: Shell) -> int:
    """The number of contenders."""
    variants = case.variants
    return len(variants) + len({floor for each in variants for floor in each.floors}) + (_raw(case, shell) is not None)


def _larger(count: int, times: float) -> int:
    """For the next attempt: what should be enough, but no leap in the dark; the first few always take longer."""
    return int(count * min(max(1.2 * times, 2), 20)) + 1


@contextlib.contextmanager
def _contender(
    plan: Plan, found: Measured, case: Case, cpus: tuple[int, int], environment: dict[str, str], largest: int | None
) -> Iterator[_Contender]:
    with Crew(plan, cpus, environment) as crew:
        yield _Contender(crew, found, case, plan.shell, None if found.kind == "floor" else largest)


@contextlib.contextmanager
def _failing(contender: _Contender) -> Iterator[None]:
    """The one place where a contender's failure becomes a line of the table."""
    try:
        yield
    except (ContenderFailed, OSError) as error:
        contender.found.failed = str(error)
        contender.found.hint = error.hint if isinstance(error, ContenderFailed) else None
        contender.crew.close(0.2)


def _summarise(contender: _Contender, sizes: Sequence[int]) -> None:
    found = contender.found
    if contender.singles:
        found.trips = stats.trips(contender.singles, contender.centres)
    for (size, batch), runs in contender.flows.items():
        if batch > 1:
            found.batched = stats.flow(size, runs)
        else:
            found.flows[size] = stats.flow(size, runs)


def _raw(case: Case, shell: Shell) -> Measured | None:
    if case.raw is None or case.rival(shell) is None:
        return None
    return Measured("raw", case.raw.name_in(shell))


class _Servers:
    """Redis and NATS, started when the first case asks for them, ended with the run."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._running: dict[str, Server] = {}
        self.versions: dict[str, str] = {}

    def start(self, which: str | None) -> dict[str, str]:
        """The placeholder of this server. Raises MissingDependency where there is none to start."""
        if which is None:
            return {}
        if which not in self._running:
            start = redis_server if which == "redis" else nats_server
            server = self._running[which] = self._stack.enter_context(start())
            self.versions[which] = str(server) + ("" if server.binary else " (was running already)")
        return {which: self._running[which].url}
