"""The workers: they end when they should, whatever happens, and say why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ipckit.bench.crew import ContenderFailed, Crew, Plan
from ipckit.bench.machine import choose_cpus
from ipckit.bench.measure import Job

INPROC = Plan("ipckit.bench.ours:sync", "inproc://x", together=True)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def pids(crew: Crew) -> list[int]:
    return [worker._process.pid for worker in crew._workers]


def test_the_ends_are_pinned_once_they_are_open(tmp_path):
    cpus = choose_cpus()
    plan = Plan("ipckit.bench.raw:unix", str(tmp_path / "s"))
    with Crew(plan, cpus, {}) as crew:
        crew.launch()
        crew.open()
        echo, drive = pids(crew)
        assert os.sched_getaffinity(drive) == {cpus[0]}
        assert os.sched_getaffinity(echo) == {cpus[1]}


def test_a_closed_crew_has_ended():
    with Crew(INPROC, choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        workers = pids(crew)
        crew.do(Job("trips", 64, 5), 20)
    assert gone(workers, 0.5)


def test_what_an_opener_raises_is_what_one_is_told():
    with Crew(Plan("ipckit.bench.ours:sync", "inproc://x?nosuch=1", together=True), choose_cpus(), {}) as crew:
        crew.launch()
        with pytest.raises(ContenderFailed, match="BadOption: there is no option 'nosuch'") as caught:
            crew.open()
        assert "inproc takes" in caught.value.hint


def test_a_worker_that_is_killed_is_told_and_the_other_is_ended(tmp_path):
    with Crew(Plan("ipckit.bench.raw:unix", str(tmp_path / "s")), choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        workers = pids(crew)
        os.kill(workers[0], signal.SIGKILL)
        with pytest.raises(ContenderFailed):
            crew.do(Job("trips", 64, 10), 20)
    assert gone(workers, 0.5)


def test_one_that_never_answers_is_ended(tmp_path):
    with Crew(Plan("ipckit.bench.raw:unix", str(tmp_path / "s")), choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        workers = pids(crew)
        os.kill(workers[0], signal.SIGSTOP)
        with pytest.raises(ContenderFailed, match="no answer in time"):
            crew.do(Job("trips", 64, 10), 0.3)
    assert gone(workers, 0.5)


def crowd(directory) -> Plan:
    return Plan("ipckit.bench.raw_topics:unix", str(directory / "s"), first="drive", audience=3, paced=True)


def members(crew: Crew) -> list[int]:
    """Of the audience, and the process that forked them."""
    parent = pids(crew)[0]
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return [parent, *map(int, file.read().split())]


def test_an_audience_is_processes_that_end_together(tmp_path):
    with Crew(crowd(tmp_path), choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        audience = members(crew)
        assert len(audience) == 4
        assert crew.do(Job("stream", 64, 10), 20)["received"] == 30
        workers = pids(crew)
    assert gone([*workers, *audience], 0.5)


def test_one_of_an_audience_that_is_killed_is_told_and_all_are_ended(tmp_path):
    with Crew(crowd(tmp_path), choose_cpus(), {}) as crew:
        crew.launch()
        crew.open()
        audience = members(crew)
        os.kill(audience[2], signal.SIGKILL)
        with pytest.raises(ContenderFailed):
            crew.do(Job("stream", 64, 10), 20)
    assert gone(audience)


PARENT = """
import sys, time
from ipckit.bench.crew import Crew, Plan
from ipckit.bench.machine import choose_cpus
crew = Crew(Plan("ipckit.bench.raw:unix", sys.argv[1]), choose_cpus(), {})
crew.launch()
crew.open()
print(*[worker._process.pid for worker in crew._workers], flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    command = [sys.executable, "-c", PARENT, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        parent.kill()
    assert gone(workers)
