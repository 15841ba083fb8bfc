"""Everybody stands still once, for a moment; the script has the long pauses."""

import random

import pytest
from tests.crash import pauses

SCHEMES = [scheme for scheme in pauses.SCHEMES if pauses.patterns(scheme)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_lost_and_nobody_declared_dead(scheme, tmp_path):
    seed = random.randrange(1 << 32)
    report = pauses.run(scheme, 1, 1.5, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.kills >= 2
