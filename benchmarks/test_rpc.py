"""Calls beside what people call with: unary of 64 bytes, server streams, a hundred callers at once, and what a call costs above
the bare channel that carries it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipckit.bench import patterns
from ipckit.bench.measure import Job

SCHEMES = ("shm", "unix", "tcp", "pipe")
JOBS = {"unary": Job("trips", 64, 300), "server stream": Job("flow", 64, 6400)}


def contenders():
    cases = {case.scheme: case for case in patterns.find("rpc").cases()}
    for scheme in SCHEMES:
        yield pytest.param(cases[scheme].ours(cases[scheme].variants[0], "sync"), id=f"ipckit {scheme}")
        yield pytest.param(cases[scheme].known(cases[scheme].references[0]), id=f"bare channel, {scheme}")
    for shell in ("sync", "aio"):
        yield pytest.param(cases["unix"].rival(shell), id=cases["unix"].raw.name_in(shell))
    yield pytest.param(cases["unix"].ours(cases["unix"].variants[0], "aio"), id="ipckit unix, aio")


@pytest.mark.parametrize("what", JOBS)
@pytest.mark.parametrize("plan", [*contenders()])
def test_64_bytes(measured, plan, what):
    measured(plan, JOBS[what], f"rpc: 64 B, {what}")


@pytest.mark.parametrize("whose", ["ipckit", "grpc.aio"])
def test_a_hundred_callers_at_once(measured, whose):
    """One round is a hundred calls of 64 bytes, of as many tasks."""
    case = next(case for case in patterns.find("rpc").cases() if case.scheme == "unix")
    ours, theirs = case.ours(case.variants[0], "aio"), case.rival("aio")
    plan = replace(ours, opener="ipckit.bench.ours_rpc:crowd")
    if whose != "ipckit":
        plan = replace(theirs, opener="ipckit.bench.raw_rpc:agrpc_crowd")
    measured(plan, Job("trips", 64, 20), "rpc: 64 B, 100 calls at once, unix")


def test_nats_request(measured):
    """Its own row, because it needs the server."""
    from ipckit.bench.patterns.channel import CHANNEL
    from ipckit.bench.patterns.rpc import NATS

    case = replace(next(case for case in CHANNEL if case.scheme == "nats"), raw=NATS)
    measured(case.rival("aio"), JOBS["unary"], "rpc: 64 B, unary, nats", "nats")
