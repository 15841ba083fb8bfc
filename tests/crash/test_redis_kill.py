"""A few kills of the server and of consumers; the script has the full number. The checker is tested in `test_checker`."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("redis")


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("role", ["server", "consumer"])
def test_a_few_kills(role, tmp_path):
    redis_kill = load("redis_kill")
    seed = random.randrange(1 << 32)
    report = redis_kill.run(role, 5, 1500, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.kills == 5
    assert report.verdict.acknowledged >= 1500
