"""Locks against `multiprocessing`'s and a C futex. The targets, within one run: uncontended 1.0, `with` 0.7, a handover 1.2 of the floor.

A handover: one process releases a lock, and the other, asleep on it, has it. Two locks go round, so that each release is awaited:
the first holds A and the second B; the first gives A and waits for B, the second takes A and gives B; then with the names swapped.
The floor is half a round trip of `shm-futex`: a store, a wake-up, a load, in C, with nothing of ours.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from ipckit import sync
from ipckit._native import floor
from ipckit.bench.machine import choose_cpus

HANDOVERS = 2000
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
        acquire, release = lock.acquire, lock.release
        for _ in range(100):
            acquire()
            release()

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


@pytest.mark.benchmark(group=f"lock: {HANDOVERS} handovers to one that sleeps")
@pytest.mark.parametrize("make", MAKERS)
def test_handover(benchmark, make):
    cpus, before = choose_cpus(), os.sched_getaffinity(0)
    first, second = make(), make()
    first.acquire()
    os.sched_setaffinity(0, {cpus[0]})
    pid = _partner(first, second, cpus[1])

    def rounds() -> None:
        ours, theirs = first, second
        for _ in range(HANDOVERS // 2):
            ours.release()
            theirs.acquire()
            ours, theirs = theirs, ours

    try:
        benchmark.pedantic(rounds, rounds=20, warmup_rounds=2)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.sched_setaffinity(0, before)


@pytest.mark.benchmark(group=f"lock: {HANDOVERS} handovers to one that sleeps")
def test_handover_floor(benchmark):
    cpus = choose_cpus()
    benchmark.pedantic(lambda: floor("shm-futex", 8, HANDOVERS // 2, cpus), rounds=20, warmup_rounds=2)
