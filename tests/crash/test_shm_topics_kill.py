"""Twenty-five kills of each, and the checker held to faults that were planted."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


if "shm_kill" not in sys.modules:
    load("shm_kill")
shm_topics_kill = load("shm_topics_kill")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread
@pytest.mark.timeout(180)
@pytest.mark.parametrize("role", ["subscriber", "publisher"])
def test_kills(role, tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))
    faults = shm_topics_kill.run(role, 25, random.randrange(1 << 32))
    assert not faults, "\n".join(faults)


class Received:
    def __init__(self, value, gap=0):
        self.value, self.gap = value, gap


def test_planted_faults_are_found():
    plan = shm_topics_kill.Plan.draw(random.Random(1))
    good = [Received(plan.frame(0)), Received(plan.frame(3), gap=2), Received(plan.frame(4))]
    for planted, expected in [
        (good, 0),
        ([good[0], good[2]], 1),  # a gap that nobody told of
        ([good[0], good[1], good[1]], 1),  # twice
        ([Received(plan.frame(0), gap=1)], 1),
        ([Received(plan.frame(0)[:-1] + b"?")], 1),
    ]:
        counted = shm_topics_kill.Counted(plan, 0)
        for received in planted:
            counted.note(received)
        assert len(counted.faults) == expected, planted
