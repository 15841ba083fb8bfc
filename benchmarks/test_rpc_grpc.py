"""Calls over gRPC beside raw grpcio over the same kind of socket, whose messages are bare bytes: unary of 64 bytes, and server
streams. What is above 1 is the price of protobuf, validation, limits and `current()`."""

from __future__ import annotations

import pytest

from ipckit.bench import patterns
from ipckit.bench.measure import Job

pytest.importorskip("grpc")

JOBS = {"unary": Job("trips", 64, 300), "server stream": Job("flow", 64, 6400)}


def contenders():
    cases = {case.scheme: case for case in patterns.find("rpc").cases()}
    for scheme in ("grpc", "grpc+unix"):
        case = cases[scheme]
        for shell in ("sync", "aio"):
            group = f"{scheme}, {shell}"
            yield pytest.param(group, case.ours(case.variants[0], shell), id=f"ipckit {group}")
            yield pytest.param(group, case.rival(shell), id=f"{case.raw.name_in(shell)}, {scheme}")


@pytest.mark.parametrize("what", JOBS)
@pytest.mark.parametrize(("group", "plan"), [*contenders()])
def test_64_bytes(measured, group, plan, what):
    measured(plan, JOBS[what], f"{group}: 64 B, {what}")
