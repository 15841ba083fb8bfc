"""Kill a process that uses a lock, many times, and see what it does to the others.

    python tests/crash/sync_kill.py --kind mutex --count 500 --seed 1

Each round forks a victim and two survivors, who take turns at one object without a pause; this process kills the victim: `count`
times while it holds (is inside, or waits at the barrier), and a quarter as often blindly, at any instant of taking turns.
What must hold:

    nobody is let in twice      whoever is inside alone writes its pid into shared memory, and finds it there when it leaves
    everybody is told           each survivor hears OwnerDied (BrokenBarrier) or is let in, within 50 ms where it has a processor
    nobody is stuck             every turn ends, and some more after the kill
    nothing is left             descriptors

The seed fixes kinds of turns and instants as planned; the scheduler adds what it likes. Kills at each numbered step of the native
code are in tests/native/test_lock.c.
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
STUCK = 20.0  # seconds that no turn may take
PATIENCE = 0.3  # seconds in a wait whose end may have died with the victim before it held anything
AFTER = 3  # turns of each survivor after the kill

INSIDE, READING, VICTIM, KILLED_AT, FAULTS, TURNS, HOLD, STOP = range(8)  # words of the journal
TOLD, DONE = range(2)  # and of each survivor


class Journal:
    """Words in memory that a killed process leaves behind."""

    def __init__(self) -> None:
        self.words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    def clear(self) -> None:
        for i in range(32):
            self.words[i] = 0

    def alone(self, chance: random.Random) -> None:
        before = self.words[INSIDE]
        if before and not (before == self.words[VICTIM] and self.words[KILLED_AT]):
            self.words[FAULTS] += 1  # alone: so plain arithmetic will do
        self.words[INSIDE] = os.getpid()
        self.linger(chance)
        if self.words[INSIDE] != os.getpid():
            self.words[FAULTS] += 1
        self.words[INSIDE] = 0

    def linger(self, chance: random.Random) -> None:
        end = time.perf_counter() + chance.choice([0, 20e-6, 200e-6]) * chance.random()
        while time.perf_counter() < end or (self.words[HOLD] and os.getpid() == self.words[VICTIM]):
            os.sched_yield()

    def survivor(self, which: int) -> memoryview:
        return self.words[16 + 4 * which :]


class Stuck(Exception):
    pass


def got(true: bool) -> None:
    if not true:
        raise Stuck


# -- one turn at each kind: whether it says something of the victim; whatever state the dead left ----------------------


def mutex_turn(lock: sync.Lock, journal: Journal, chance: random.Random) -> bool:
    try:
        got(lock.acquire(timeout=STUCK))
    except errors.OwnerDied:
        with lock.recover(timeout=STUCK):
            journal.alone(chance)
        return True
    journal.alone(chance)
    lock.release()
    return True


def rwlock_turn(lock: sync.RWLock, journal: Journal, chance: random.Random) -> bool:
    reads = chance.random() < 0.5
    side = lock.read if reads else lock.write
    try:
        got(side.acquire(timeout=STUCK))
    except errors.OwnerDied:
        with lock.recover(timeout=STUCK):
            journal.alone(chance)
        return True
    if reads:
        before = journal.words[INSIDE]
        if before and not (before == journal.words[VICTIM] and journal.words[KILLED_AT]):
            journal.words[FAULTS] += 1
        victim = os.getpid() == journal.words[VICTIM]
        journal.words[READING] |= victim
        journal.linger(chance)
        if victim:
            journal.words[READING] = 0
    else:
        journal.alone(chance)
    side.release()
    return True


def condition_turn(condition: sync.Condition, journal: Journal, chance: random.Random) -> bool:
    try:
        with condition:
            journal.alone(chance)
            condition.notify()
            notified = condition.wait(PATIENCE)
            journal.alone(chance)
            return notified
    except errors.OwnerDied:
        with condition.recover(timeout=STUCK):
            journal.alone(chance)
        return True


def leased_turn(semaphore: sync.Semaphore, journal: Journal, chance: random.Random) -> bool:
    got(semaphore.acquire(timeout=STUCK))
    journal.alone(chance)
    semaphore.release()
    return True


def barrier_turn(barrier: sync.Barrier, journal: Journal, chance: random.Random) -> bool:
    patience = STUCK if journal.words[HOLD] else PATIENCE
    begin = time.perf_counter()
    try:
        barrier.wait(patience)
    except errors.BrokenBarrier:
        if time.perf_counter() - begin < patience:
            raise
        return False  # of one that died before it came nobody can know
    return True


KINDS: dict[str, tuple[Callable[[], object], Callable[..., bool]]] = {
    "mutex": (sync.Lock, mutex_turn),
    "rwlock": (sync.RWLock, rwlock_turn),
    "condition": (sync.Condition, condition_turn),
    "barrier": (lambda: sync.Barrier(3), barrier_turn),
    "leased": (lambda: sync.Semaphore(1, leased=True), leased_turn),
}


def child(thing: object, turn: Callable[..., bool], journal: Journal, chance: random.Random, which: int) -> None:
    """In the forked child, which -1: the victim; never returns. 0: stopped; 3: a turn did not end; 4: something else."""
    signal.alarm(60)
    code = 4
    words, mine = journal.words, journal.survivor(max(which, 0))
    try:
        while which < 0 or not words[STOP]:
            while which == 1 and words[HOLD] and not words[KILLED_AT]:
                os.sched_yield()  # so that the barrier stays closed
            try:
                spoke = turn(thing, journal, chance)
                broken = False
            except errors.BrokenBarrier:
                spoke = broken = True
            if which < 0:
                words[TURNS] += 1
            elif words[KILLED_AT]:
                if spoke and not mine[TOLD]:
                    mine[TOLD] = max(1, time.monotonic_ns() - words[KILLED_AT])
                mine[DONE] += 1
            if broken or (isinstance(thing, sync.Barrier) and words[KILLED_AT]):
                mine[DONE] = AFTER
                break
        if isinstance(thing, sync.Condition):
            with thing:
                thing.notify_all()
        code = 0
    except (Stuck, errors.Timeout):
        code = 3
    except BaseException as error:
        print(f"{'victim' if which < 0 else 'survivor'}: {error!r}", file=sys.stderr, flush=True)
    finally:
        if which < 0:
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
            f"{self.kind}: {self.rounds} kills, {self.held} of a holder; {len(self.latencies)} survivors told, or in, "
            f"after median {statistics.median(worst) * 1e3:.2f} ms, worst {worst[-1] * 1e3:.2f} ms, "
            f"{self.late} later than {BOUND * 1e3:.0f} ms; "
            f"faults: {len(self.faults)}"
        )


def holds(thing: object, journal: Journal, victim: int) -> bool:
    if isinstance(thing, sync.Barrier):
        return any(waits and owner[0] == victim for _, _, waits, owner in thing._people())
    return journal.words[INSIDE] == victim or bool(journal.words[READING])


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (so := true()) and time.monotonic() < end:
        os.sched_yield()
    return so


def one_round(kind: str, journal: Journal, chance: random.Random, report: Report, aimed: bool) -> list[str]:
    make, turn = KINDS[kind]
    thing = make()
    journal.clear()
    words, pids, faults = journal.words, [], []
    words[HOLD] = aimed and kind == "barrier"
    for which in (-1, 0, 1):
        seed = chance.random()
        pids.append(os.fork())
        if pids[-1] == 0:
            if which < 0:
                words[VICTIM] = os.getpid()
            child(thing, turn, journal, random.Random(seed), which)
    victim = pids[0]
    delay = chance.choice([0, 50e-6, 500e-6, 3e-3]) * chance.random()
    until(lambda: words[TURNS] > 0 or kind == "barrier", STUCK)
    words[HOLD] = aimed
    if aimed and not until(lambda: holds(thing, journal, victim), STUCK):
        faults.append("the victim was stuck")
    until(lambda: False, delay)
    words[KILLED_AT] = time.monotonic_ns()  # before: who comes in after it finds the victim's pid
    os.kill(victim, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
    survivors = [journal.survivor(0), journal.survivor(1)]
    report.held += aimed
    if code != -signal.SIGKILL:
        faults.append(f"the victim ended by itself ({code})")
    if not until(lambda: all(one[DONE] >= AFTER for one in survivors), STUCK):
        faults.append("a survivor was stuck")
    words[STOP] = 1
    for pid in pids[1:]:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            faults.append(f"a survivor ended with {code}" + (", stuck" if code == 3 else ""))
    if aimed or kind != "barrier":  # one that died before it came breaks nothing: the first to lose its patience does
        report.latencies += [one[TOLD] / 1e9 for one in survivors if one[TOLD]]
    if words[FAULTS]:
        faults.append(f"let in twice, {words[FAULTS]} times")
    report.rounds += 1
    return faults


def run(kind: str, count: int, seed: int) -> Report:
    chance = random.Random(seed)
    report, journal = Report(kind), Journal()
    before = len(os.listdir("/proc/self/fd"))
    for n in range(count + count // 4):
        faults = one_round(kind, journal, chance, report, n % 5 != 4)
        report.faults += [f"round {n} of seed {seed}: {fault}" for fault in faults]
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
