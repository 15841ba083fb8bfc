"""A few kills of both sides of queues over links; the script has the full number."""

import random

import pytest
from tests.crash import link_kill


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", link_kill.SCHEMES)
@pytest.mark.parametrize("role", ["consumer", "sender"])
@pytest.mark.parametrize("listener", ["receiver", "sender"])
def test_a_few_kills(role, listener, scheme, tmp_path):
    seed = random.randrange(1 << 32)
    report = link_kill.run(role, 6, 1000, seed, tmp_path, scheme, listener)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.kills == 6
    assert report.verdict.acknowledged >= 1000
