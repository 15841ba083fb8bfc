"""A few kills of the server, of a cluster's leader and of consumers; the script has the full number."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("nats")
pytest.importorskip("redis")  # the harness is shared


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("role", "kills", "messages"), [("server", 5, 1500), ("consumer", 5, 1500), ("leader", 1, 300)]
)
def test_a_few_kills(role, kills, messages, tmp_path):
    seed = random.randrange(1 << 32)
    report = load("nats_kill").run(role, kills, messages, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.kills == kills
    assert report.verdict.acknowledged >= messages
