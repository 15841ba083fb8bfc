"""Kill a subscriber, or the publisher, of shm:// topics at a random instant, many times, and see what the others make of it.

    python tests/crash/shm_topics_kill.py --role publisher --count 1000 --seed 1

    a subscriber dies     another one misses nothing, the publisher drops the dead one, and its memory is free again
    the publisher dies    both subscribers receive whatever its journal has, whole and in order, and then find the next publisher
    either                nothing is left: descriptors, mappings; the next start takes the same name

The seed fixes sizes, policies and instants as planned; the scheduler adds what it likes.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shm_kill import Journal, message

import ipckit
from ipckit import errors
from ipckit.message import UNKNOWN

URL = "shm://killed?size=256KiB&backlog=40"
HANG = 20.0


@dataclass(frozen=True)
class Plan:
    """One round."""

    on_full: Any
    sizes: tuple[int, ...]
    delay: float  # seconds between the first message and the kill

    @classmethod
    def draw(cls, chance: random.Random) -> Plan:
        largest = chance.choice([0, 64, 1000, 30_000])
        return cls(
            on_full=chance.choice(["block", "drop_old", "drop_new"]),
            sizes=tuple(chance.randrange(largest + 1) for _ in range(64)),
            delay=chance.choice([0, 100e-6, 1e-3, 5e-3, 2e-2]) * chance.random(),
        )

    def frame(self, number: int) -> bytes:
        return message(number, self.sizes[number % len(self.sizes)])


@dataclass
class Counted:
    """What a subscriber saw: whole messages upwards, and as many missing as it was told."""

    plan: Plan
    next: int | None = None  # whose first message may be any
    faults: list[str] = field(default_factory=list)

    def note(self, received: ipckit.Message[bytes]) -> None:
        number = int.from_bytes(received.value[:8], sys.byteorder)
        if received.value != self.plan.frame(number):
            self.faults.append(f"torn: {len(received.value)} bytes, number {number}")
        elif self.next is not None and number != self.next + received.gap:
            self.faults.append(f"number {number} after {self.next - 1}, and told of {received.gap}")
        self.next = number + 1


def child(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(30)  # its default action ends a victim whose harness is gone
    try:
        body()
    except BaseException as error:
        print(f"victim: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(99)


def reaped(pid: int) -> list[str]:
    os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [] if status == -signal.SIGKILL else [f"the victim ended by itself ({status})"]


def a_subscriber_dies(plan: Plan, journal: Journal) -> list[str]:
    def receive() -> None:
        with ipckit.subscriber(URL, timeout=HANG) as subscriber:
            counted = Counted(plan)
            while True:
                counted.note(subscriber.recv(HANG))
                journal.words[0] += 1
                journal.words[1] = len(counted.faults)

    pid = child(receive)
    faults: list[str] = []
    with ipckit.publisher(URL, on_full=plan.on_full) as publisher, ipckit.subscriber(URL, timeout=5) as other:
        publisher.wait_for_subscribers(2, HANG)
        counted = Counted(plan, 0)
        number, due, after = 0, time.monotonic() + plan.delay, 0
        while after < 100:
            publisher.publish(plan.frame(number), "t", HANG)  # a dead one does not hold it for ever
            number += 1
            counted.note(other.recv(HANG))
            if not after and time.monotonic() >= due:
                faults += reaped(pid)
                after = 1
            after += after > 0
        deadline = time.monotonic() + HANG
        while publisher.stats()["subscribers"] > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        stats = publisher.stats()
        if (stats["subscribers"], stats["queued"]) != (1, 0):
            faults.append(f"after the death: {stats}")
        if counted.next != number or other.stats()["dropped"]:
            faults.append(f"the other one received up to {counted.next} of {number}")
    return faults + counted.faults + ([f"{journal.faults} faults at the victim"] if journal.faults else [])


def the_publisher_dies(plan: Plan, journal: Journal) -> list[str]:
    def publish() -> None:
        with ipckit.publisher(URL) as publisher:
            publisher.wait_for_subscribers(2, HANG)
            number = 0
            while True:
                publisher.publish(plan.frame(number), "t", HANG)
                number += 1
                journal.words[0] = number

    pid = child(publish)
    faults: list[str] = []
    with ipckit.subscriber(URL, timeout=HANG) as one, ipckit.subscriber(URL, timeout=HANG) as two:
        counts = {one: Counted(plan, 0), two: Counted(plan, 0)}
        due = time.monotonic() + plan.delay
        while time.monotonic() < due:
            for subscriber, counted in counts.items():
                counted.note(subscriber.recv(HANG))
        faults += reaped(pid)
        with ipckit.publisher(URL) as following:
            for subscriber, counted in counts.items():
                before = subscriber.stats()["reconnects"]
                while subscriber.stats()["reconnects"] == before:
                    try:
                        counted.note(subscriber.recv(0.02))
                    except errors.Timeout:
                        continue
                if counted.next < journal.done:
                    faults.append(f"lost: {journal.done - counted.next} of {journal.done} published messages")
            following.wait_for_subscribers(2, HANG)
            following.publish(b"next", "t", HANG)
            for subscriber, counted in counts.items():
                received = subscriber.recv(HANG)
                if (received.value, received.gap) != (b"next", UNKNOWN):
                    faults.append(f"of the next publisher: {received!r}, gap {received.gap}")
                faults += counted.faults
    return faults


def left(before: str | None) -> str:
    """What is there when everything is closed, as it was before if it becomes so: the keeper's thread takes a moment."""
    deadline = time.monotonic() + 5
    while True:
        with open("/proc/self/maps") as maps:
            mapped = "ipckit-topics" in (text := maps.read()) or "ipckit-queue" in text
        found = f"{len(os.listdir('/proc/self/fd'))} descriptors, mapped: {mapped}"
        if found == before or time.monotonic() > deadline:
            return found
        time.sleep(0.005)


def run(role: str, count: int, seed: int) -> list[str]:
    """The faults. IPCKIT_RUNTIME_DIR must be a directory of its own."""
    chance, journal = random.Random(seed), Journal()
    one_round = {"subscriber": a_subscriber_dies, "publisher": the_publisher_dies}[role]
    faults: list[str] = []
    with ipckit.publisher(URL), ipckit.subscriber(URL):  # once before counting: modules that are imported, threads
        pass
    before = left(None)
    for n in range(count):
        plan = Plan.draw(chance)
        journal.clear()
        found = one_round(plan, journal)
        if (rest := left(before)) != before:
            found.append(f"left: {rest}, before: {before}")
        faults += [f"round {n} of seed {seed}: {fault} ({plan.on_full}, {plan.delay})" for fault in found]
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=["subscriber", "publisher"], required=True, help="who is killed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # each kill is worth a warning
    with tempfile.TemporaryDirectory(prefix="ipckit-crash-") as runtime_dir:
        os.environ["IPCKIT_RUNTIME_DIR"] = runtime_dir
        begin = time.monotonic()
        faults = run(options.role, options.count, options.seed)
    print(f"seed {options.seed}: {options.count} kills of a {options.role}, {len(faults)} faults")
    print(f"{time.monotonic() - begin:.0f} s")
    for fault in faults[:20]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
