"""A few kills of senders and receivers; the script has the full number. The checker is tested in `test_checker`."""

import importlib.util
import random
import sys
from pathlib import Path

import pytest


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scheme", ["mq", "fifo"])
def test_a_few_kills(scheme, tmp_path, monkeypatch):
    if scheme == "mq":
        pytest.importorskip("posix_ipc")
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))  # set again, and by this put back
    seed = random.randrange(1 << 32)
    report = load("kernel_kill").run(scheme, 6, seed, tmp_path)
    assert not report.faults, f"seed {seed}: {report}"
    assert report.verdict.acknowledged > 100
