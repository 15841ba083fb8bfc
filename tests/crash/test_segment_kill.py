"""Thirty kills of those who use segments, and the checks held to faults that were planted; the script has the full number."""

import importlib.util
import os
import random
import sys
from pathlib import Path

import pytest

from ipckit.sync import Latest, _tenancy

_spec = importlib.util.spec_from_file_location("segment_kill", Path(__file__).with_name("segment_kill.py"))
segment_kill = importlib.util.module_from_spec(_spec)
sys.modules["segment_kill"] = segment_kill
_spec.loader.exec_module(segment_kill)

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread


@pytest.fixture
def directory(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(path))
    return path


def test_thirty_kills(directory):
    seed = random.randrange(1 << 32)
    report = segment_kill.run(30, seed, directory)
    assert not report.faults, f"seed {seed}: {report.faults}"
    assert report.kills == 30
    print(report)


def test_what_is_left_behind_is_found(directory, monkeypatch):
    monkeypatch.setattr(_tenancy, "sweep", lambda *_: [])  # so a half made generation stays
    monkeypatch.setattr(segment_kill, "OPERATIONS", {"litter": lambda: lambda: litter(directory)})
    report = segment_kill.Report()
    faults = segment_kill.one_round("litter", 0, 1.0, False, directory, report)
    assert any(fault.startswith("left behind") for fault in faults), faults
    assert list(directory.iterdir()) == []


def litter(directory):
    (directory / f"{os.getpid()}.1.1.tmp").touch()


def test_a_name_that_stays_taken_is_found(directory, monkeypatch):
    monkeypatch.setattr(_tenancy._Changing, "alone", lambda _: False)  # the dead count as the living
    monkeypatch.setattr(segment_kill, "OPERATIONS", {"create": segment_kill.create})
    faults = segment_kill.one_round("create", 0, 1.0, False, directory, segment_kill.Report())
    assert any(fault.startswith("a new start failed") for fault in faults), faults


def test_a_torn_value_is_found(directory):
    with Latest("shm://newest", 4096) as newest:
        newest.write(b"a" * 4095 + b"b")
        assert segment_kill.torn(newest)
        newest.write(b"a" * 100)
        assert segment_kill.torn(newest)
        newest.write(b"a" * 4096)
        assert segment_kill.torn(newest) == []
