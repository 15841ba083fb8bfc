"""A few kills of holders and of the broker; the script has the full number. First, that the judge sees what it is there for."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("redis")
pytest.importorskip("nats")


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_the_judge():
    lease_kill = load("lease_kill")
    hold = lease_kill.Hold
    assert lease_kill.judge([hold(1, 0, 10), hold(2, 10, 20), hold(5, 25, 30)]) == []
    assert len(lease_kill.judge([hold(1, 0, 11), hold(2, 10, 20)])) == 1
    assert len(lease_kill.judge([hold(2, 0, 10), hold(2, 10, 20)])) == 1
    assert lease_kill.judge([hold(1, 0, 11, lost=True), hold(2, 10, 20)]) == []


@pytest.mark.timeout(200)
@pytest.mark.parametrize("broker", ["redis", "nats"])
@pytest.mark.parametrize("role", ["holder", "server"])
def test_a_few_kills(broker, role, tmp_path):
    seed = random.randrange(1 << 32)
    report = load("lease_kill").run(broker, role, 4 if role == "holder" else 2, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.holds > 0
