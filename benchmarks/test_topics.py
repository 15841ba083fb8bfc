"""Publish/subscribe without a broker: what one publish of 64 bytes costs the publisher, and one message that reaches everybody,
with 1, 4 and 16 subscribers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipckit import errors
from ipckit._registry import open_transport
from ipckit._url import parse
from ipckit.bench import patterns
from ipckit.bench.measure import Job

PATTERN = patterns.find("pubsub")
JOBS = {"the publisher's cost": Job("burst", 64, 320, 32), "until everybody has it": Job("stream", 64, 1000)}


def contenders():
    for case in PATTERN.cases():
        if case.server is None and not case.lossy:
            yield pytest.param(case, case.ours(case.variants[0], "sync"), id=f"ipckit {case.scheme}")
            if case.raw is not None:
                yield pytest.param(case, case.rival("sync"), id=f"raw {case.raw.name}, for {case.scheme}")


@pytest.mark.parametrize("what", JOBS)
@pytest.mark.parametrize("subscribers", PATTERN.audiences)
@pytest.mark.parametrize(("case", "plan"), [*contenders()])
def test_64_bytes(measured, case, plan, subscribers, what):
    try:
        open_transport(parse(case.scheme + "://x"))
    except errors.MissingDependency as missing:
        pytest.skip(str(missing))
    plan = replace(plan, paced=True, first=PATTERN.first, audience=subscribers)
    measured(plan, JOBS[what], f"topics: 64 B to {subscribers}, {what}", rounds=10)
