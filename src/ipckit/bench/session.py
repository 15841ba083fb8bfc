"""One run: open the contenders of a case, find out how long they take, measure them in turns, collect.

Time is planned, not hoped for: each measurement is first tried small, and grown until it lasts long enough to tell how many
rounds fit into its share of the budget. A contender that fails is a line of the table with its reason; the others go on.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import secrets
import socket
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
from . import certificate, patterns, stats
from .crew import ContenderFailed, Crew, Plan
from .machine import Machine
from .measure import Job, Kind
from .raw_queue_brokers import forget
from .results import Conditions, Measured, Results, Row
from .scenarios import Case, Shell


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds for each single measurement, and how many of each.

    Attributes:
        samples: single round trips of all repeats together, at least; what a 99.9th percentile asks for.
        total: of the whole table. A case whose share of it is used up is not repeated again.
        start: what it takes to start a contender and to warm it up; for the estimate.
    """

    repeats: int
    trips: float
    flow: float
    samples: int = 0
    total: float = inf
    start: float = 1.0


FULL = Budget(repeats=5, trips=0.25, flow=0.1, samples=stats.needed(0.999), start=1.2)
QUICK = Budget(repeats=3, trips=0.04, flow=0.02, total=40.0, start=0.6)

_NAMES: dict[Kind, str] = {"trips": "round trips", "turns": "one at a time", "hops": "from process to process"}
#: A round trip below this (ns) is timed in batches for its median: the clock is read once for many.
BRIEF = 10_000
_BATCH = 32
_MANY = 64  # messages in one send_many
_MOST_SAMPLES = 50_000  # of one repeat: they all come back to us
_PATIENCE = 15.0  # seconds beyond what a measurement should take
_BURST = 32, 1 << 18  # messages, and bytes, that fit into everybody's buffers


@dataclass(slots=True)
class _Contender:
    """One crew at work, and what is known of it so far."""

    crew: Crew
    found: Measured
    case: Case
    shell: Shell
    batches: bool  # it has send_many, and costs little enough for that to matter
    audience: int
    largest: int | None = None  # bytes; None: any
    trip: dict[Kind, float] = field(default_factory=dict)  # ns, as tried
    rates: dict[tuple[int, int], float] = field(default_factory=dict)  # (size, batch) → messages a second, as tried
    centres: dict[Kind, list[float]] = field(default_factory=dict)
    singles: dict[Kind, list[list[float]]] = field(default_factory=dict)
    flows: dict[tuple[int, int], list[tuple[int, int, int]]] = field(default_factory=dict)
    bursts: dict[int, list[tuple[float, float]]] = field(default_factory=dict)  # size → (ns, CPU ns) of one message

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
        self._pattern = patterns.find(pattern)
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
            weights = [self._weight(case, shell) for case, shell in self._work]
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
            Row(self._pattern.name, case.scheme, variant.label, shell, Measured("ours", "ipckit"), raw)
            for variant in case.variants_in(shell)
        ]
        try:
            url = parse(case.scheme + "://x")
            transport = _registry.open_transport(url)
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
        known: dict[str, Measured] = {}  # floors and references, each measured once
        name = f"bench{secrets.token_hex(4)}"
        audiences = self._audiences(shell)
        for number, audience in enumerate(audiences):
            with ExitStack() as stack:
                server = case.theirs if case.server is None else places[case.server]
                if server:
                    stack.callback(_forget, server, name)
                contenders = [
                    stack.enter_context(self._contender(plan, found, case, audience, environment, largest))
                    for plan, found in self._plans(case, shell, rows, known, {**places, "name": f"{name}a{audience}"})
                    if found.failed is None
                ]
                for contender in contenders:  # all start side by side
                    with _failing(contender):
                        contender.crew.launch()
                for contender in contenders:
                    with _failing(contender):
                        contender.crew.open()
                self._measure([c for c in contenders if c.found.failed is None], rows[0].label, number, len(audiences))
        return rows

    def _audiences(self, shell: Shell) -> tuple[int, ...]:
        """What a crowd costs is asked in the sync shell; in a hurry, of the smallest and the largest."""
        audiences = self._pattern.audiences if shell == "sync" else self._pattern.audiences[:1]
        return audiences if self._budget.total == inf else tuple(dict.fromkeys((audiences[0], audiences[-1])))

    def _plans(
        self, case: Case, shell: Shell, rows: Sequence[Row], known: dict[str, Measured], places: dict[str, str]
    ) -> Iterator[tuple[Plan, Measured]]:
        """How each contender is opened. The rows share the raw client; each floor and reference is measured once."""
        numbers = itertools.count()

        def fill(plan: Plan) -> Plan:
            return plan.at(**{**places, "name": f"{places['name']}n{next(numbers)}", "port": str(_free_port())})

        told: set[str] = set()
        for variant, row in zip(case.variants_in(shell), rows, strict=True):
            yield fill(case.ours(variant, shell)), row.ours
            one_cpu = self._cpus[0] == self._cpus[1]  # where a floor that spins waits for the scheduler
            floors = case.variants[-1].floors if one_cpu else variant.floors
            others = {mechanism: ("floor", Plan(f"floor:{mechanism}")) for mechanism in floors}
            if shell == "sync":
                others |= {each.name: ("reference", fill(case.known(each))) for each in case.references}
            for what, (kind, plan) in others.items():
                found = known.setdefault(what, Measured(kind, what))  # type: ignore[arg-type]
                if found not in row.floors:
                    row.floors.append(found)
                if what not in told:
                    told.add(what)
                    yield plan, found
        rival = case.rival(shell)
        if rival is not None and rows[0].raw is not None:
            yield fill(rival), rows[0].raw

    @contextlib.contextmanager
    def _contender(
        self, plan: Plan, found: Measured, case: Case, audience: int, environment: dict[str, str], largest: int | None
    ) -> Iterator[_Contender]:
        pattern = self._pattern
        modules = _registry.find(parse(case.scheme + "://x")).requires
        plan = replace(plan, first=pattern.first, audience=audience, paced=pattern.paced, preload=modules)
        batches = found.kind == "ours" or (found.kind == "raw" and case.raw is not None and case.raw.batches)
        with Crew(plan, self._cpus, environment) as crew:
            bound = None if found.kind == "floor" else largest
            yield _Contender(crew, found, case, plan.shell, batches, audience, bound)

    # -- calibrate, then in turns -------------------------------------------------------------------------------------

    def _measure(self, crews: list[_Contender], label: str, number: int, of: int) -> None:
        pattern, size = self._pattern, self._sizes[0]
        latency = pattern.latency if number == 0 else ()
        flows = [(each, 1) for each in self._sizes] + ([(size, _MANY)] if pattern.batches else [])
        stages = 1 + self._budget.repeats * (len(latency) + len(flows) + (len(self._sizes) if pattern.bursts else 0))
        stage = 0
        name = label.partition(" ")[0] + (f", crowd {number + 1} of {of}" if of > 1 else "")

        def each(what: str, step: Callable[[_Contender], None]) -> None:
            nonlocal stage
            self._say(f"{name} · {what}", (number + stage / stages) / of)
            stage += 1
            for contender in crews:
                if contender.found.failed is None:
                    with _failing(contender):
                        step(contender)

        each("warming up", lambda c: self._calibrate(c, latency, flows))
        due = self._due - (of - 1 - number) / of * max(self._due - time.monotonic(), 0) if of > 1 else self._due
        for turn in range(self._budget.repeats):
            if turn and time.monotonic() > due:
                break
            for kind in latency:
                what = f"{_NAMES[kind]}, {turn + 1} of {self._budget.repeats}"
                each(what, lambda c, kind=kind: self._trips(c, kind))  # type: ignore[misc]
            for burst in self._sizes if pattern.bursts else ():
                what = f"cost, {stats.size(burst)}, {turn + 1} of {self._budget.repeats}"
                each(what, lambda c, burst=burst: self._burst(c, burst))  # type: ignore[misc]
            for flow in flows:
                what = f"one way, {stats.size(flow[0])}, {turn + 1} of {self._budget.repeats}"
                each(what, lambda c, flow=flow: self._flow(c, *flow))  # type: ignore[misc]
        for contender in crews:
            self._summarise(contender)

    def _calibrate(self, contender: _Contender, latency: Sequence[Kind], flows: Sequence[tuple[int, int]]) -> None:
        for kind in latency:
            count, enough = 8, self._budget.trips * 0.3e9
            while True:
                taken = self._do(contender, Job(kind, self._sizes[0], count, lossy=contender.case.lossy), 1.0)
                contender.trip[kind] = stats.median(taken["samples"])
                took = sum(taken["samples"])
                if took >= enough or count >= _MOST_SAMPLES:
                    break
                count = min(_larger(count, enough / took), _MOST_SAMPLES)
        for size, batch in flows:
            if not contender.carries(size) or (batch > 1 and not contender.batches):
                continue
            count = max(2 if size > 1 << 16 else 16, batch)
            while True:
                job = Job(self._pattern.flow, size, count, batch, contender.case.lossy)
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
        room = contender.case.flow_bytes // (max(size, 1) * contender.audience)
        return max(min(count, room) // batch, 1) * batch

    def _trips(self, contender: _Contender, kind: Kind) -> None:
        size, budget, trip = self._sizes[0], self._budget, contender.trip[kind]
        count = max(int(budget.trips * 1e9 / trip), -(-budget.samples // budget.repeats), 10)
        if trip < BRIEF and kind == "trips" and contender.found.kind != "floor" and contender.shell == "sync":
            rounds = max(count // 2 // _BATCH, 10) * _BATCH
            taken = self._do(contender, Job(kind, size, rounds, _BATCH), budget.trips)
            centre = stats.median(taken["samples"])
        else:
            centre = None
        singles = min(count, _MOST_SAMPLES)
        taken = self._do(contender, Job(kind, size, singles, lossy=contender.case.lossy), singles * trip / 1e9)
        contender.singles.setdefault(kind, []).append(taken["samples"])
        found = stats.median(taken["samples"]) if centre is None else centre
        contender.centres.setdefault(kind, []).append(found)

    def _flow(self, contender: _Contender, size: int, batch: int) -> None:
        if (size, batch) not in contender.rates or not contender.carries(size):
            return
        count = self._count(contender, size, batch)
        job = Job(self._pattern.flow, size, count, batch, contender.case.lossy)
        taken = self._do(contender, job, self._budget.flow)
        took = taken["ended"] - taken["started"]
        if taken["received"] and took > 0:
            received = taken["received"] // contender.audience
            contender.flows.setdefault((size, batch), []).append((count, received, took))

    def _burst(self, contender: _Contender, size: int) -> None:
        if not contender.carries(size):
            return
        burst = max(min(_BURST[0], _BURST[1] // size), 1)
        rounds = max(int(contender.rates[size, 1] * self._budget.flow) // burst, 4)
        rounds = max(min(rounds, contender.case.flow_bytes // (size * burst * contender.audience)), 1)
        taken = self._do(contender, Job("burst", size, rounds * burst, burst, contender.case.lossy), self._budget.flow)
        contender.bursts.setdefault(size, []).append((stats.median(taken["samples"]), taken["cpu"]))

    def _do(self, contender: _Contender, job: Job, seconds: float) -> dict[str, Any]:
        return contender.crew.do(job, _PATIENCE + 10 * seconds)

    def _summarise(self, contender: _Contender) -> None:
        found, first = contender.found, self._pattern.latency[0]
        for kind, singles in contender.singles.items():
            trips = stats.trips(singles, contender.centres[kind])
            if kind == first:
                found.trips = trips
            else:
                found.hops = trips
        flows = {key: stats.flow(key[0], runs) for key, runs in contender.flows.items()}
        for size, runs in contender.bursts.items():
            costs = tuple(cost for cost, _ in runs)
            cpu = stats.median(cpu for _, cpu in runs)
            fan = stats.Fan(contender.audience, size, stats.median(costs), cpu, costs, flows.get((size, 1)))
            found.fans.append(fan)
        if contender.audience != self._pattern.audiences[0]:
            return
        for (size, batch), flow in flows.items():
            if batch > 1:
                found.batched = flow
            else:
                found.flows[size] = flow

    # -- how long it takes --------------------------------------------------------------------------------------------

    def estimate(self) -> float:
        """Seconds that the run will take, roughly: from the number of contenders, and of what is measured of each."""
        pattern, budget = self._pattern, self._budget
        flows = len(self._sizes) * (2 if pattern.bursts else 1) + (1 if pattern.batches else 0)
        seconds = 0.0
        for case, shell in self._work:
            for number, audience in enumerate(self._audiences(shell)):
                kinds = len(pattern.latency) if number == 0 else 0
                each = budget.start * (1 + audience / 16) + budget.repeats * (
                    kinds * 1.4 * budget.trips + flows * 1.8 * budget.flow
                )
                seconds += self._contenders(case, shell) * each
        return min(seconds, budget.total * 1.25)

    def _weight(self, case: Case, shell: Shell) -> int:
        return self._contenders(case, shell) * len(self._audiences(shell))

    def _contenders(self, case: Case, shell: Shell) -> int:
        variants = case.variants_in(shell)
        floors = len({floor for each in variants for floor in each.floors})
        references = len(case.references) if shell == "sync" else 0
        return len(variants) + floors + references + (_raw(case, shell) is not None)


def _larger(count: int, times: float) -> int:
    """For the next attempt: what should be enough, but no leap in the dark; the first few always take longer."""
    return int(count * min(max(1.2 * times, 2), 20)) + 1


@contextlib.contextmanager
def _failing(contender: _Contender) -> Iterator[None]:
    """The one place where a contender's failure becomes a line of the table."""
    try:
        yield
    except (ContenderFailed, OSError) as error:
        contender.found.failed = str(error)
        if isinstance(error, ContenderFailed):
            contender.found.hint, contender.found.absent = error.hint, error.absent
        contender.crew.close(0.2)


def _raw(case: Case, shell: Shell) -> Measured | None:
    if case.raw is None or case.rival(shell) is None:
        return None
    return Measured("raw", case.raw.name_in(shell))


def _forget(server: str, name: str) -> None:
    """What stays in a server is removed; one that has gone has nothing."""
    with contextlib.suppress(Exception):
        forget(server, name)


def _free_port() -> int:
    """Nobody's at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


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
