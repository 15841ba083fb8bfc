"""Every contender of the table does the work that it is timed for: echoes come back, flows arrive, nothing is left behind."""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ipckit import errors
from ipckit._registry import find, open_transport
from ipckit._url import parse
from ipckit.bench import certificate, patterns
from ipckit.bench.crew import ContenderFailed, Crew, Plan
from ipckit.bench.machine import choose_cpus
from ipckit.bench.measure import Job
from ipckit.bench.patterns.channel import CHANNEL
from ipckit.bench.scenarios import Case
from ipckit.testing.servers import nats_server, redis_server

OURS = [(case, shell) for case in CHANNEL for shell in ("sync", "aio") if shell == "sync" or case.awaited]
RAW = [(case, "sync") for case in CHANNEL if case.raw] + [(c, "aio") for c in CHANNEL if c.raw and c.raw.awaited]


def names(pair: tuple[Case, str]) -> str:
    return "-".join((pair[0].scheme, pair[1]))


@pytest.fixture(scope="module")
def servers():
    """The placeholders of the servers, each started when it is first asked for."""
    running = {}

    def start(which):
        if which not in running:
            context = {"redis": redis_server, "nats": nats_server}[which](private=True)
            try:
                running[which] = (context, context.__enter__().url)
            except errors.MissingDependency as missing:
                if os.environ.get("CI"):
                    raise
                pytest.skip(str(missing))
        return {which: running[which][1]}

    yield start
    for context, _ in running.values():
        context.__exit__(None, None, None)


@pytest.fixture
def places(tmp_path):
    certificate.write(tmp_path)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    return {"dir": str(tmp_path), "name": f"test{secrets.token_hex(4)}", "port": port}


def exercise(plan: Plan, directory: Path, *, lossy: bool = False, large: bool = True, batches: bool = False) -> None:
    with Crew(plan, choose_cpus(), {"IPCKIT_RUNTIME_DIR": str(directory / "run")}) as crew:
        crew.launch()
        crew.open()
        for count in (1, 20):
            taken = crew.do(Job("trips", 64, count), 20)
            assert len(taken["samples"]) == count
            assert min(taken["samples"]) > 0
        flows = [Job("flow", 64, 30, 1, lossy)]
        if large:
            flows.append(Job("flow", 1 << 20, 3, 1, lossy))
        if batches:
            flows.append(Job("flow", 64, 128, 64, lossy))
        for job in flows:
            taken = crew.do(job, 20)
            assert taken["received"] == job.count or lossy
            assert taken["ended"] > taken["started"]
        assert len(crew.do(Job("trips", 64, 5), 20)["samples"]) == 5  # the flows left nothing on the way


@pytest.mark.parametrize("pair", RAW, ids=names)
def test_raw(pair, places, servers, tmp_path):
    case, shell = pair
    for module in (*case.raw.needs, *find(parse(case.scheme + "://x")).requires):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    places |= servers(case.server) if case.server else {}
    exercise(case.rival(shell).at(**places), tmp_path, lossy=case.lossy, large=not case.lossy)


@pytest.mark.parametrize("pair", OURS, ids=names)
def test_ours(pair, places, servers, tmp_path):
    case, shell = pair
    try:
        largest = open_transport(parse(case.scheme + "://x")).capabilities.max_message
    except errors.MissingDependency as missing:
        pytest.skip(str(missing))
    places |= servers(case.server) if case.server else {}
    for variant in case.variants:
        large = largest is None or largest >= 1 << 20
        plan = case.ours(variant, shell).at(**places)
        exercise(plan, tmp_path, lossy=case.lossy, large=large, batches=not case.lossy)


def pairs(pattern, *, raw):
    """(pattern, case, shell) of each contender."""
    found = []
    for case in pattern.cases():
        for shell in ("sync", "aio"):
            there = case.rival(shell) is not None if raw else shell == "sync" or case.awaited
            if there:
                label = f"{pattern.name}-{case.scheme}{case.variants[0].label}-{shell}"
                found.append(pytest.param(pattern, case, shell, id=label))
    return found


PACED = [patterns.find("queue"), patterns.find("pubsub")]


def exercise_paced(plan: Plan, pattern, case: Case, directory: Path, *, batches: bool) -> None:
    """Every measurement of the pattern, small, of an audience where it has one."""
    audience = 1 if len(pattern.audiences) == 1 else 2
    plan = replace(plan, first=pattern.first, audience=audience, paced=True)
    with Crew(plan, choose_cpus(), {"IPCKIT_RUNTIME_DIR": str(directory / "run")}) as crew:
        crew.launch()
        crew.open()
        if "turns" in pattern.latency:
            assert len(crew.do(Job("turns", 64, 10), 20)["samples"]) == 10
        if audience == 1:
            samples = crew.do(Job("hops", 64, 10, 1, case.lossy), 20)["samples"]
            assert len(samples) == 10
            assert min(samples) > 0
        for batch in (1, 64) if batches else (1,):
            taken = crew.do(Job("stream", 64, 128, batch, case.lossy), 20)
            assert taken["received"] == 128 * audience or case.lossy
            assert taken["ended"] > taken["started"]
        if pattern.bursts:
            taken = crew.do(Job("burst", 64, 16, 8, case.lossy), 20)
            assert min(taken["samples"]) > 0
            assert taken["cpu"] > 0


@pytest.mark.parametrize(("pattern", "case", "shell"), [each for p in PACED for each in pairs(p, raw=True)])
def test_raw_one_way(pattern, case, shell, places, servers, tmp_path):
    for module in (*case.raw.needs, *find(parse(case.scheme + "://x")).requires):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    places |= servers(case.server) if case.server else {}
    exercise_paced(case.rival(shell).at(**places), pattern, case, tmp_path, batches=case.raw.batches)


@pytest.mark.parametrize(("pattern", "case", "shell"), [each for p in PACED for each in pairs(p, raw=False)])
def test_ours_one_way(pattern, case, shell, places, servers, tmp_path):
    try:
        open_transport(parse(case.scheme + "://x"))
    except errors.MissingDependency as missing:
        pytest.skip(str(missing))
    places |= servers(case.server) if case.server else {}
    for number, variant in enumerate(case.variants_in(shell)):
        plan = case.ours(variant, shell).at(**{**places, "name": f"{places['name']}v{number}"})
        exercise_paced(plan, pattern, case, tmp_path, batches=pattern.batches)


def test_references(places, tmp_path):
    """What is known of multiprocessing, once each."""
    case = next(case for case in patterns.find("queue").cases() if case.scheme == "unix")
    for reference in case.references:
        exercise_paced(case.known(reference).at(**places), patterns.find("queue"), case, tmp_path, batches=False)


@pytest.mark.parametrize("mechanism", sorted({f for case in CHANNEL for v in case.variants for f in v.floors}))
def test_floors(mechanism, tmp_path):
    with Crew(Plan(f"floor:{mechanism}"), choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        assert len(crew.do(Job("trips", 64, 50), 20)["samples"]) == 50
        taken = crew.do(Job("flow", 64, 50), 20)
        assert taken["ended"] > taken["started"]


def test_a_floor_that_cannot_carry_a_size_says_so_and_goes_on():
    with Crew(Plan("floor:udp"), choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        with pytest.raises(ContenderFailed, match="1048576"):
            crew.do(Job("flow", 1 << 20, 5), 20)
        assert len(crew.do(Job("trips", 64, 5), 20)["samples"]) == 5
