"""A few kills of the server, of a cluster's leader and of consumers; the script has the full number."""

import random

import pytest

nats_kill = pytest.importorskip("tests.crash.nats_kill", reason="the client library is not installed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("role", "kills", "messages"), [("server", 5, 1500), ("consumer", 5, 1500), ("leader", 1, 300)]
)
def test_a_few_kills(role, kills, messages, tmp_path):
    seed = random.randrange(1 << 32)
    report = nats_kill.run(role, kills, messages, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.kills == kills
    assert report.verdict.acknowledged >= messages
