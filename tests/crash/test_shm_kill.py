"""Fifty kills of each side, and the checker held to faults that were planted."""

import importlib.util
import random
import statistics
import sys
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("shm_kill", Path(__file__).with_name("shm_kill.py"))
shm_kill = importlib.util.module_from_spec(_spec)
sys.modules["shm_kill"] = shm_kill
_spec.loader.exec_module(shm_kill)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread
@pytest.mark.timeout(180)
@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_fifty_kills(role, tmp_path, monkeypatch):
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(runtime_dir))
    report = shm_kill.run(role, 50, random.randrange(1 << 32), str(runtime_dir))
    assert not report.faults, "\n".join(report.faults)
    assert report.rounds == 50
    assert report.messages > 0
    # One of them may be late on a busy machine; the script, for a quiet one, counts each.
    assert statistics.median(report.latencies) < shm_kill.BOUND
    print(report)


def ledger_of(frames, committed=0):
    ledger = shm_kill.Ledger()
    for frame in frames:
        ledger.note(frame)
    ledger.settle(committed)
    return ledger.faults


FRAMES = [shm_kill.message(number, number * 37 % 500) for number in range(20)]


def test_the_checker_passes_what_is_right():
    assert ledger_of(FRAMES, committed=20) == []
    assert ledger_of(FRAMES, committed=19) == [], "killed between the commit and the journal"


def changed(frame, at, by=1):
    return frame[:at] + bytes([frame[at] ^ by]) + frame[at + 1 :]


@pytest.mark.parametrize(
    ("fault", "frames", "committed"),
    [
        ("torn", [*FRAMES[:5], FRAMES[5][:-1], *FRAMES[6:]], 20),
        ("torn", [*FRAMES[:5], FRAMES[5] + b"\0", *FRAMES[6:]], 20),
        ("torn", [*FRAMES[:5], changed(FRAMES[5], -1 % len(FRAMES[5])), *FRAMES[6:]], 20),
        ("torn", [*FRAMES[:5], changed(FRAMES[5], 0), *FRAMES[6:]], 20),
        ("torn", [*FRAMES[:5], FRAMES[5][:20] + FRAMES[6][20:], *FRAMES[6:]], 20),
        ("torn", [b"", *FRAMES], 20),
        ("lost", [*FRAMES[:5], *FRAMES[6:]], 20),
        ("lost", FRAMES[1:], 20),
        ("lost", FRAMES[:-1], 20),
        ("duplicate", [*FRAMES[:6], *FRAMES[5:]], 20),
        ("reordered", [*FRAMES[:5], FRAMES[6], FRAMES[5], *FRAMES[7:]], 20),
        ("reordered", [*FRAMES, FRAMES[3]], 20),
    ],
)
def test_the_checker_finds_planted_faults(fault, frames, committed):
    faults = ledger_of(frames, committed)
    assert any(found.startswith(fault) for found in faults), faults


def test_the_leak_check_finds_what_is_left(tmp_path):
    leaks = shm_kill.Leaks(str(tmp_path))
    assert leaks.faults(listener_was_killed=False) == []
    (tmp_path / "killed.shm").touch()
    assert leaks.faults(listener_was_killed=True) == []
    assert leaks.faults(listener_was_killed=False)
    (tmp_path / "other").touch()
    assert leaks.faults(listener_was_killed=True)
    (tmp_path / "other").unlink()
    with open("/dev/null"):
        assert leaks.faults(listener_was_killed=True)


def test_a_plan_follows_from_its_seed():
    assert shm_kill.Plan.draw(random.Random(7)) == shm_kill.Plan.draw(random.Random(7))
