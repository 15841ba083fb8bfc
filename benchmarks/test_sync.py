"""Locks against `multiprocessing`'s and a C futex. Targets in one run: uncontended 1.0, `with` 0.7, a handover 1.2 of the floor.

A handover: one process releases a lock, and the other, asleep on it, has it. Two locks go round: the first process holds A and
the second B; the first gives A and waits for B, the second takes A and gives B; then with the names swapped. What is told is half
of the median of such round trips. The floor is half a round trip of `shm-futex`: a store, a wake-up, a load, in C, and no more.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

from ipckit import sync
from ipckit._native import floor
from ipckit.bench.machine import choose_cpus

HANDOVERS = 400  # round trips in a round; an even number
MAKERS: list[Any] = [
    pytest.param(sync.Lock, id="ipckit"),
    pytest.param(multiprocessing.get_context("fork").Lock, id="multiprocessing"),
]
RECURSIVE: list[Any] = [
    pytest.param(sync.RLock, id="ipckit"),
    pytest.param(multiprocessing.get_context("fork").RLock, id="multiprocessing"),
]

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def _taken(lock: Any) -> Callable[[], None]:
    def hundred() -> None:
        for _ in range(100):
            lock.acquire()
            lock.release()

    return hundred


def _entered(lock: Any) -> Callable[[], None]:
    def hundred() -> None:
        for _ in range(100):
            with lock:
                pass

    return hundred


@pytest.mark.benchmark(group="lock: 100 acquire and release, uncontended")
@pytest.mark.parametrize("make", MAKERS)
def test_acquire_release(benchmark, make):
    benchmark(_taken(make()))


@pytest.mark.benchmark(group="lock: 100 with, uncontended")
@pytest.mark.parametrize("make", MAKERS)
def test_with(benchmark, make):
    benchmark(_entered(make()))


@pytest.mark.benchmark(group="rlock: 100 acquire and release, uncontended")
@pytest.mark.parametrize("make", RECURSIVE)
def test_recursive(benchmark, make):
    benchmark(_taken(make()))


def _partner(given: Any, kept: Any, cpu: int) -> int:
    """The second process: takes one, gives the other, in turns, until it is killed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(120)
        os.sched_setaffinity(0, {cpu})
        kept.acquire()
        os.write(tell, b"x")
        while True:
            given.acquire()
            kept.release()
            given, kept = kept, given
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    return pid


_elapsed = 0.0


def _clock() -> float:
    return _elapsed


def _one_handover(round_trips: list[int]) -> None:
    global _elapsed
    _elapsed += statistics.median(round_trips) / 2 / 1e9


handover = pytest.mark.benchmark(group="lock: a handover to one that sleeps", timer=_clock)


def _asleep() -> None:
    """Long enough for the other to fall asleep."""
    end = time.perf_counter_ns() + 50_000
    while time.perf_counter_ns() < end:
        pass


@handover
@pytest.mark.parametrize("make", MAKERS)
def test_handover(benchmark, make):
    cpus, before = choose_cpus(), os.sched_getaffinity(0)
    first, second = make(), make()
    first.acquire()
    os.sched_setaffinity(0, {cpus[0]})
    pid = _partner(first, second, cpus[1])

    def rounds() -> None:
        ours, theirs, taken = first, second, []
        for _ in range(HANDOVERS):
            _asleep()
            begin = time.perf_counter_ns()
            ours.release()
            theirs.acquire()
            taken.append(time.perf_counter_ns() - begin)
            ours, theirs = theirs, ours
        _one_handover(taken)

    try:
        benchmark.pedantic(rounds, rounds=20, warmup_rounds=2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.sched_setaffinity(0, before)


@handover
def test_handover_floor(benchmark):
    cpus = choose_cpus()
    benchmark.pedantic(lambda: _one_handover(floor("shm-futex", 8, HANDOVERS, cpus)), rounds=20, warmup_rounds=2)
