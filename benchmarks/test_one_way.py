"""The ring one way: small messages one by one and batched, large ones against pyzmq PUSH/PULL, and in place."""

from __future__ import annotations

import pytest

import ipckit
from ipckit.bench.crew import Plan
from ipckit.bench.measure import Job

OURS = Plan("ipckit.bench.ours:sync", "shm://{name}")
TODAY = Plan("ipckit.bench.raw:shm", "/{name}")
PUSH_PULL = Plan("ipckit.bench.raw:zmq_push_pull", "ipc://{dir}/{name}")


@pytest.mark.parametrize(
    ("plan", "batch"),
    [
        pytest.param(OURS, 1, id="ipckit send"),
        pytest.param(OURS, 64, id="ipckit send_many"),
        pytest.param(Plan("floor:shm-spin"), 1, id="C shm-spin"),
        pytest.param(TODAY, 1, id="raw shared_memory"),
    ],
)
def test_64_bytes_one_way(measured, plan, batch):
    if plan is TODAY:
        pytest.importorskip("posix_ipc")
    measured(plan, Job("flow", 64, 19_200, batch), "shm: 64 B one way")


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(OURS, id="ipckit"),
        pytest.param(TODAY, id="raw shared_memory"),
        pytest.param(PUSH_PULL, id="pyzmq PUSH PULL"),
    ],
)
def test_1_mib_one_way(measured, plan):
    pytest.importorskip({TODAY: "posix_ipc", PUSH_PULL: "zmq"}.get(plan, "ipckit"))
    measured(plan, Job("flow", 1 << 20, 100), "shm: 1 MiB one way")


@pytest.mark.benchmark(group="shm: in place, loan and borrow of the same ring")
@pytest.mark.parametrize("size", [64, 1 << 14, 1 << 20, 4 << 20])
def test_loan_and_borrow(benchmark, size):
    left, right = ipckit.pair("shm://?size=16MiB")

    def once() -> None:
        with left.loan(size):
            pass
        with right.borrow():
            pass

    with left, right:
        benchmark(once)
