"""Kill a process that uses a lock at a random instant, many times, and see what it does to the others.

    python tests/crash/sync_kill.py --kind mutex --count 500 --seed 1

Each round forks a victim and a survivor; this process is the second survivor. All three take turns at one object without a pause;
the victim is killed a random number of microseconds after its first turn. What must hold:

    nobody is let in twice      whoever is inside alone writes its pid into shared memory, and finds it there when it leaves
    everybody is told           a survivor hears OwnerDied (BrokenBarrier) or is let in, within 50 ms where it has a processor
    nobody is stuck             every turn ends, and some more after the kill
    nothing is left             descriptors

The seed fixes kinds of turns and instants as planned; the scheduler adds what it likes. What is killed at each numbered step of the
native code is in tests/native/test_lock.c.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ipckit import errors, sync

BOUND = 0.05  # seconds from the kill until everybody knows
STUCK = 10.0  # seconds that no turn may take
AFTER = 3  # turns of each survivor after the kill

INSIDE, KILLED, FAULTS, TURNS, STOP = range(5)  # words of the journal


class Journal:
    """Words in memory that a killed process leaves behind."""

    def __init__(self) -> None:
        self.words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def clear(self) -> None:
        for i in range(8):
            self.words[i] = 0

    def enter(self) -> None:
        before = self.words[INSIDE]
        if before and before != self.words[KILLED]:
            self.words[FAULTS] += 1  # alone: so plain arithmetic will do
        self.words[INSIDE] = os.getpid()

    def leave(self) -> None:
        if self.words[INSIDE] != os.getpid():
            self.words[FAULTS] += 1
        self.words[INSIDE] = 0

    def alone(self, chance: random.Random) -> None:
        self.enter()
        linger(chance)
        self.leave()


def linger(chance: random.Random) -> None:
    end = time.perf_counter() + chance.choice([0, 5e-6, 50e-6]) * chance.random()
    while time.perf_counter() < end:
        pass


class Stuck(Exception):
    pass


def got(true: bool) -> None:
    if not true:
        raise Stuck


# -- one turn at each kind: returns normally, whatever state the dead left ----------------------------------------------


def mutex_turn(lock: sync.Lock, journal: Journal, chance: random.Random) -> None:
    try:
        got(lock.acquire(timeout=STUCK))
    except errors.OwnerDied:
        with lock.recover(timeout=STUCK):
            journal.alone(chance)
        return
    journal.alone(chance)
    lock.release()


def rwlock_turn(lock: sync.RWLock, journal: Journal, chance: random.Random) -> None:
    reads = chance.random() < 0.5
    side = lock.read if reads else lock.write
    try:
        got(side.acquire(timeout=STUCK))
    except errors.OwnerDied:
        with lock.recover(timeout=STUCK):
            journal.alone(chance)
        return
    if reads:
        if journal.words[INSIDE] not in (0, journal.words[KILLED]):
            journal.words[FAULTS] += 1
        linger(chance)
    else:
        journal.alone(chance)
    side.release()


def condition_turn(condition: sync.Condition, journal: Journal, chance: random.Random) -> None:
    try:
        with condition:
            journal.alone(chance)
            condition.notify()
            condition.wait(chance.random() * 0.002)
            journal.alone(chance)
    except errors.OwnerDied:
        with condition.recover(timeout=STUCK):
            journal.alone(chance)


def leased_turn(semaphore: sync.Semaphore, journal: Journal, chance: random.Random) -> None:
    got(semaphore.acquire(timeout=STUCK))
    journal.alone(chance)
    semaphore.release()


def barrier_turn(barrier: sync.Barrier, journal: Journal, chance: random.Random) -> None:
    linger(chance)
    barrier.wait(0.5)  # of one that died before it came nobody can know


KINDS: dict[str, tuple[Callable[[], object], Callable[..., None]]] = {
    "mutex": (sync.Lock, mutex_turn),
    "rwlock": (sync.RWLock, rwlock_turn),
    "condition": (sync.Condition, condition_turn),
    "barrier": (lambda: sync.Barrier(3), barrier_turn),
    "leased": (lambda: sync.Semaphore(1, leased=True), leased_turn),
}


def child(thing: object, turn: Callable[..., None], journal: Journal, chance: random.Random, victim: bool) -> None:
    """In the forked child; never returns. 0: stopped; 3: a turn did not end; 4: something else."""
    signal.alarm(60)
    code = 4
    try:
        while victim or not journal.words[STOP]:
            turn(thing, journal, chance)
            if victim:
                journal.words[TURNS] += 1
        code = 0
    except errors.BrokenBarrier:
        code = 0
    except (Stuck, errors.Timeout):
        code = 3
    except BaseException as error:
        print(f"{'victim' if victim else 'survivor'}: {error!r}", file=sys.stderr, flush=True)
    finally:
        if victim:
            signal.pause()  # its barrier was broken under load: it waits to be killed
        os._exit(code)


# -- the harness --------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    kind: str
    rounds: int = 0
    held: int = 0  # kills of one that was inside
    latencies: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def late(self) -> int:
        return sum(latency > BOUND for latency in self.latencies)

    def __str__(self) -> str:
        worst = sorted(self.latencies) or [0.0]
        return (
            f"{self.kind}: {self.rounds} kills, {self.held} of one that was inside; the other told, or in, after median "
            f"{statistics.median(worst) * 1e3:.2f} ms, worst {worst[-1] * 1e3:.2f} ms, {self.late} later than {BOUND * 1e3:.0f} ms; "
            f"faults: {len(self.faults)}"
        )


def one_round(kind: str, journal: Journal, chance: random.Random, report: Report) -> list[str]:
    make, turn = KINDS[kind]
    thing = make()
    journal.clear()
    pids = []
    for victim in (True, False):
        seed = chance.random()
        pids.append(os.fork())
        if pids[-1] == 0:
            child(thing, turn, journal, random.Random(seed), victim)
    delay = chance.choice([0, 50e-6, 500e-6, 5e-3]) * chance.random()
    faults, told = [], 0
    killed_at = due = None
    try:
        while told < AFTER:
            if killed_at is None and journal.words[TURNS]:
                due = due or time.perf_counter() + delay
                if time.perf_counter() >= due:
                    journal.words[KILLED] = pids[0]
                    os.kill(pids[0], signal.SIGKILL)
                    report.held += journal.words[INSIDE] == pids[0]
                    killed_at = time.perf_counter()
            turn(thing, journal, chance)
            if killed_at is not None:
                if told == 0 and kind != "condition":
                    report.latencies.append(time.perf_counter() - killed_at)
                told += 1
    except errors.BrokenBarrier:
        if killed_at is not None:
            report.latencies.append(time.perf_counter() - killed_at)
    except (Stuck, errors.Timeout):
        faults.append("this survivor was stuck")
    if killed_at is None:
        os.kill(pids[0], signal.SIGKILL)
    journal.words[STOP] = 1
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if codes[0] != -signal.SIGKILL:
        faults.append(f"the victim ended by itself ({codes[0]})")
    if codes[1]:
        faults.append(f"the other survivor ended with {codes[1]}" + (", stuck" if codes[1] == 3 else ""))
    if journal.words[FAULTS]:
        faults.append(f"let in twice, {journal.words[FAULTS]} times")
    report.rounds += 1
    return faults


def run(kind: str, count: int, seed: int) -> Report:
    chance = random.Random(seed)
    report, journal = Report(kind), Journal()
    before = len(os.listdir("/proc/self/fd"))
    for n in range(count):
        report.faults += [f"round {n} of seed {seed}: {fault}" for fault in one_round(kind, journal, chance, report)]
    if len(os.listdir("/proc/self/fd")) != before:
        report.faults.append("descriptors are left")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    reports = [run(kind, options.count, options.seed) for kind in KINDS if options.kind in (kind, "all")]
    for report in reports:
        print(report)
        for fault in report.faults[:20]:
            print(fault)
    return 1 if any(report.faults or report.late for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
