"""examples/orchestrator/ runs end to end: three planes, against a real Redis. docs/howto/three-planes.md explains it."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ipckit
from ipckit.testing.conformance import broker, free_port
from ipckit.testing.servers import redis_server

pytest.importorskip("grpc")
pytest.importorskip("redis")
EXAMPLE = Path(__file__).parents[2] / "examples" / "orchestrator"


def python(script, directory, environ):
    done = subprocess.run(
        [sys.executable, "-X", "dev", script, "planes.toml"],
        cwd=directory,
        env=environ,
        timeout=150,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.timeout(200)
def test_the_three_planes(tmp_path):
    directory = tmp_path / "orchestrator"
    shutil.copytree(EXAMPLE, directory, ignore=shutil.ignore_patterns("__pycache__"))
    with broker(redis_server(private=True)) as server:
        file = directory / "planes.toml"
        changed = file.read_text().replace("redis://localhost:6379", server.url).replace("50051", str(free_port()))
        file.write_text(changed)
        environ = os.environ | {"IPCKIT_RUNTIME_DIR": str(tmp_path / "run"), "PYTHONWARNINGS": "error"}
        (tmp_path / "run").mkdir(mode=0o700)
        lines = python("run.py", directory, environ)
        assert sorted(line for line in lines if line.startswith("task")) == [
            "task 0: 4 words",
            "task 1: 2 words",
            "task 2: 3 words",
        ]
        assert "metrics: run.ended 1, task.assigned 3, task.done 3, tool.used 3" in lines
        log = [line for line in lines if line.startswith("audit")]
        happened = [line.split(maxsplit=3)[1:] for line in log]
        assert happened[-1] == ["run.ended", "orchestrator", "all done"]
        for text, result in (
            ("the quick brown fox", "4 words"),
            ("jumps over", "2 words"),
            ("the lazy dog", "3 words"),
        ):
            assigned = happened.index(["task.assigned", "orchestrator", text])
            assert assigned < happened.index(["task.done", "agent", result])
        events = tomllib.loads(changed)["planes"]["events"]
        with ipckit.publisher(events, codec="msgpack", on_full="drop_old", timeout=20) as another_run:
            another_run.publish({"who": "orchestrator", "about": "again"}, "run.ended", 20)
        once_more = python("audit.py", directory, environ)
        assert once_more[:-1] == log, "the log is there for whoever asks next"
        assert once_more[-1].split()[1:] == ["run.ended", "orchestrator", "again"], (
            "all of it, and not only the first run"
        )


def test_every_party_says_how_it_is_used():
    for script in EXAMPLE.glob("*.py"):
        if script.name != "planes.py":
            done = subprocess.run([sys.executable, script], timeout=60, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (1, f"usage: python {script.name} planes.toml\n")


def test_no_party_names_a_transport():
    for script in EXAMPLE.glob("*.py"):
        assert "://" not in script.read_text(), script.name
