"""Queues over links beside the queues of the standard library: 64 bytes, one at a time in one thread, from process to process,
one by one as fast as they go, and in batches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipckit.bench import patterns
from ipckit.bench.measure import Job
from ipckit.bench.patterns.queue import MP_QUEUE, MP_SIMPLE_QUEUE

SCHEMES = ("inproc", "unix", "tcp", "shm")
JOBS = {
    "send, receive, acknowledge": Job("turns", 64, 300),
    "from process to process": Job("hops", 64, 300),
    "one way": Job("stream", 64, 6400),
}


def contenders():
    cases = {case.scheme: case for case in patterns.find("queue").cases()}
    for scheme in SCHEMES:
        yield pytest.param(cases[scheme].ours(cases[scheme].variants[0], "sync"), id=f"ipckit {scheme}")
        yield pytest.param(cases[scheme].rival("sync"), id=f"raw {cases[scheme].raw.name}, for {scheme}")
    for known in (MP_QUEUE, MP_SIMPLE_QUEUE):
        yield pytest.param(cases["unix"].known(known), id=known.name)


@pytest.mark.parametrize("what", JOBS)
@pytest.mark.parametrize("plan", [*contenders()])
def test_64_bytes(measured, plan, what):
    measured(replace(plan, paced=True), JOBS[what], f"queue: 64 B, {what}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_64_bytes_in_batches(measured, scheme):
    case = next(case for case in patterns.find("queue").cases() if case.scheme == scheme)
    plan = replace(case.ours(case.variants[0], "sync"), paced=True)
    measured(plan, Job("stream", 64, 6400, 64), "queue: 64 B, one way, send_many of 64")
