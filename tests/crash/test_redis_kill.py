"""A few kills of the server and of consumers; the script has the full number. The checker is tested in `test_checker`."""

import random

import pytest

redis_kill = pytest.importorskip("tests.crash.redis_kill", reason="the client library is not installed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ["server", "consumer"])
def test_a_few_kills(role, tmp_path):
    seed = random.randrange(1 << 32)
    report = redis_kill.run(role, 5, 1500, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.kills == 5
    assert report.verdict.acknowledged >= 1500
