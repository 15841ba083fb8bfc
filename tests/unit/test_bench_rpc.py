"""Every contender of calls does the work that it is timed for: calls come back, streams are whole, nothing is left behind."""

from __future__ import annotations

import secrets
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ipckit import errors
from ipckit.bench import certificate, patterns
from ipckit.bench.crew import Crew, Plan
from ipckit.bench.machine import choose_cpus
from ipckit.bench.measure import Job
from ipckit.bench.patterns.channel import CHANNEL
from ipckit.bench.patterns.rpc import GRPC, GRPC_TCP, NATS
from ipckit.bench.raw_rpc import Asked, Tally
from ipckit.testing.servers import nats_server

CASES = [case for case in patterns.find("rpc").cases() if case.server is None]
UNIX = next(case for case in CASES if case.scheme == "unix")


def exercise(plan: Plan, directory: Path, *, flows: bool = True, **places: str) -> None:
    certificate.write(directory)
    placed = plan.at(dir=str(directory), name=f"test{secrets.token_hex(4)}", port="0", **places)
    with Crew(placed, choose_cpus(), {"IPCKIT_RUNTIME_DIR": str(directory / "run")}) as crew:
        crew.launch()
        crew.open()
        assert len(crew.do(Job("trips", 64, 20), 20)["samples"]) == 20
        for size in (64, 1 << 16) if flows else ():
            taken = crew.do(Job("flow", size, 100), 20)
            assert taken["received"] == 100
            assert taken["ended"] > taken["started"]
        assert len(crew.do(Job("trips", 64, 5), 20)["samples"]) == 5  # the flows left nothing on the way


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scheme)
def test_ours(case, tmp_path):
    exercise(case.ours(case.variants[0], "sync"), tmp_path)


def test_ours_awaited_and_in_a_crowd(tmp_path):
    awaited = UNIX.ours(UNIX.variants[0], "aio")
    exercise(awaited, tmp_path)
    exercise(replace(awaited, opener="ipckit.bench.ours_rpc:crowd"), tmp_path, flows=False)


@pytest.mark.parametrize("raw", [GRPC, GRPC_TCP])
def test_grpcio(raw, tmp_path):
    if find_spec("grpc") is None:
        pytest.skip("grpcio is not installed")
    case = replace(UNIX, raw=raw)
    for shell in ("sync", "aio"):
        exercise(case.rival(shell), tmp_path)
    exercise(replace(case.rival("aio"), opener="ipckit.bench.raw_rpc:agrpc_crowd"), tmp_path, flows=False)


def test_pyzmq(tmp_path):
    case = next(case for case in CASES if case.scheme == "zmq+ipc")
    if find_spec("zmq") is None:
        pytest.skip("pyzmq is not installed")
    exercise(case.rival("sync"), tmp_path)


def test_nats_request(tmp_path):
    case = replace(next(case for case in CHANNEL if case.scheme == "nats"), raw=NATS)
    try:
        with nats_server(private=True) as server:
            for shell in ("sync", "aio"):
                exercise(case.rival(shell), tmp_path, nats=server.url)
    except errors.MissingDependency as missing:
        pytest.skip(str(missing))


def test_each_link_stands_beside_its_bare_channel():
    assert {case.scheme for case in CASES if case.references} >= {"unix", "shm", "tcp", "pipe", "fifo", "mq"}
    for case in CASES:
        for bare in case.references:
            assert case.known(bare).opener.startswith("ipckit.bench.ours:")


def test_what_was_sent_is_called_with():
    asked, tally = Asked(), Tally()
    asked.put(b"ab")
    assert asked.take() == b"ab"
    for _ in range(3):
        asked.put(b"abc")
    assert asked.all() == (3, 3)
    assert asked.all() == (0, 3)
    tally.count()
    tally.wait(1)
    tally.complete()
    assert tally.wait_complete(1) > 0
