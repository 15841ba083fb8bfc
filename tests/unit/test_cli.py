"""The command line, as a user meets it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

import ipckit
from ipckit import _registry
from ipckit.bench import patterns
from ipckit.cli import main


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ipckit", *arguments]
    inherited = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**inherited, **environment}, check=False
    )


def test_version():
    done = call("--version")
    assert done.stdout == f"ipckit {ipckit.__version__}\n"


def test_transports_as_json(capsys):
    assert main(["transports", "--json"]) == 0
    entries = {entry["scheme"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["unix"]["capabilities"]["peer_credentials"]
    assert entries["shm"]["claims"][0]["text"] == "~100 ns"
    assert ("limit", "16MiB") in [(option["name"], option["default"]) for option in entries["unix"]["options"]]


def test_transports_in_a_pipe_is_plain_and_whole():
    done = call("transports")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    for row in ("Communication model", "Synchronization", "Speed (claimed)", "Data structure", "Typical use case"):
        assert row in done.stdout
    for scheme in ("inproc", "unix", "tcp", "shm"):
        assert f"\n{scheme} " in done.stdout


@pytest.mark.parametrize("arguments", [["transports", "--json"], ["transports"], ["locks"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(arguments, tmp_path):
    """Also where the text is so short that it is written at the end only."""
    environment = {**os.environ, "IPCKIT_RUNTIME_DIR": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ipckit", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [["transports", "--json"], ["locks"], ["--help"]])
def test_a_full_disk_is_told(arguments, tmp_path):
    environment = {**os.environ, "IPCKIT_RUNTIME_DIR": str(tmp_path)}
    environment.pop("PYTHONUNBUFFERED", None)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ipckit", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (2, b"ipckit: No space left on device\n")


def test_the_help_of_bench_names_every_pattern(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    *others, last = sorted(patterns.names(), key=["channel", "queue", "pubsub", "rpc"].index)
    assert f"what to measure: {', '.join(others)} or {last}" in text


def test_what_is_not_installed_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(
        "ipckit._registry.missing", lambda transport: transport.requires[0] if transport.requires else None
    )
    assert main(["transports"]) == 0
    text = capsys.readouterr().out
    assert 'mq:// is not installed; from the checkout: pip install ".[mq]"' in text


def test_a_transport_that_cannot_be_loaded_hides_none_of_the_others(capsys, monkeypatch):
    monkeypatch.setitem(_registry._table, "broken", "nosuch.module:TRANSPORT")
    assert main(["transports", "--json"]) == 0
    told = capsys.readouterr()
    assert "nosuch" in told.err
    schemes = [entry["scheme"] for entry in json.loads(told.out)]
    assert "unix" in schemes
    assert "broken" not in schemes


def test_without_rich_one_is_told(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    for command in ("bench", "transports"):
        assert main([command]) == 2
        assert 'pip install ".[cli]"' in capsys.readouterr().err
    assert main(["transports", "--markdown"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--transport", "unux"], "did you mean 'unix'"),
        (["--pattern", "chanel"], "known: channel, pubsub, queue, rpc"),
        (["--size", "64 parsecs"], "--size must be a size"),
        (["--size", "0"], "--size must be 1 or more"),
        (["--cpus", "0"], "--cpus takes two numbers"),
        (["--cpus", "0,4095"], "there is no CPU 4095"),
        (["--compare", "/nonexistent"], "cannot be read"),
        (["--json", "/nonexistent/results.json"], "--json: there is no directory /nonexistent"),
        (["--svg", "/"], "--svg: / is a directory"),
    ],
)
def test_bench_refuses_what_it_does_not_understand(capsys, arguments, text):
    assert main(["bench", *arguments]) == 2
    assert text in capsys.readouterr().err


def test_bench_measures_writes_and_compares(tmp_path, capsys):
    first = tmp_path / "first.json"
    arguments = ("bench", "--quick", "--transport", "inproc", "--shell", "sync", "--size", "64")
    done = call(*arguments, "--json", str(first), "--svg", str(tmp_path / "table.svg"))
    assert done.returncode == 0, done.stderr
    assert "inproc" in done.stdout
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    found = json.loads(first.read_text())
    assert found["rows"][0]["ours"]["trips"]["p50"] > 0
    assert "<svg" in (tmp_path / "table.svg").read_text()
    done = call(*arguments, "--compare", str(first))
    assert "Change since" in done.stdout
    assert main(["bench", "--pattern", "queue", "--compare", str(first)]) == 2
    assert "has nothing of --pattern queue (it has: channel)" in capsys.readouterr().err


def test_bench_of_a_queue(tmp_path):
    file = tmp_path / "queue.json"
    arguments = (
        "--pattern",
        "queue",
        "--quick",
        "-t",
        "inproc",
        "--shell",
        "sync",
        "--size",
        "64",
        "--json",
        str(file),
    )
    done = call("bench", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sent, received, acknowledged" in done.stdout
    row = json.loads(file.read_text())["rows"][0]
    assert row["pattern"] == "queue"
    assert row["ours"]["hops"]["p50"] > 0


def test_bench_ends_with_1_when_something_failed():
    done = call("bench", "--quick", "--shell", "sync", "--transport", "inproc://x?nosuch=1", "--size", "64")
    assert done.returncode == 1
    assert "FAILED" in done.stdout


def test_a_limit_of_this_machine_is_no_failure():
    pytest.importorskip("posix_ipc")
    limit = (4000, resource.getrlimit(resource.RLIMIT_MSGQUEUE)[1])  # bytes, for all queues of a user
    done = subprocess.run(
        [sys.executable, "-m", "ipckit", "bench", "--pattern", "pubsub", "--quick", "-t", "mq", "--shell", "sync"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_MSGQUEUE, limit),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not here  mq, ipckit: ResourceLimit" in done.stdout
    assert "RLIMIT_MSGQUEUE" in done.stdout


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_every_process(tmp_path, number):
    command = [sys.executable, "-m", "ipckit", "bench", "--transport", "unix"]
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as bench:
        deadline = time.monotonic() + 30
        while len(workers := children(bench.pid)) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        os.killpg(bench.pid, number)  # as the terminal does
        assert bench.wait(20) == 130
        assert bench.stderr.read().endswith("ipckit: interrupted\n")
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    assert list(tmp_path.iterdir()) == []
