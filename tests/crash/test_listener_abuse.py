"""A little of what `listener_abuse.py` does at length, without its stop-watch."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("listener_abuse", Path(__file__).with_name("listener_abuse.py"))
listener_abuse = importlib.util.module_from_spec(_spec)
sys.modules["listener_abuse"] = listener_abuse
_spec.loader.exec_module(listener_abuse)


@pytest.mark.timeout(180)
def test_a_listener_outlives_its_strangers(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
    report = listener_abuse.run({"malformed": 300, "idle": 100, "flood": 3000}, random.randrange(1 << 32), timeout=0.5)
    assert not report.faults, str(report)
    assert set(report.ratios) == {"malformed", "idle", "flood"}
    print(report)
