"""Kill one side of a shm:// channel at a random instant, many times, and see what the other side makes of it.

    python tests/crash/shm_kill.py --role sender --count 1000 --seed 1

Each round forks a victim that sends (or receives) without a pause, kills it a random number of microseconds after the first
message, and holds the survivor to five promises:

    nothing torn, reordered, lost in the middle or delivered twice      every message has a number and a checksum
    what was committed is delivered                                     the victim counts in shared memory after each send
    the survivor hears PeerDied, soon
    nothing is left: descriptors, mappings, /dev/shm, files but the name of a killed listener
    the next start works                                                the next round takes the same name

The seed fixes sizes, verbs and instants as planned; the scheduler adds what it likes.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import random
import signal
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import ipckit
from ipckit import aio, errors

URL = "shm://killed?size=64KiB"
BOUND = 0.1  # seconds from the kill to PeerDied, where the survivor is given a processor

# -- messages that show what happened to them -----------------------------------------------------------------------

_HEAD = struct.Struct("=QII")  # number, size of what follows, its checksum begun with the number
_NOISE = random.Random(0).randbytes(1 << 18)


def message(number: int, size: int) -> bytes:
    begin = number * 131 % (len(_NOISE) - size)
    body = _NOISE[begin : begin + size]
    return _HEAD.pack(number, size, zlib.crc32(body, number & 0xFFFFFFFF)) + body


@dataclass
class Ledger:
    """What a receiver saw: messages must come whole, each once, in the order of their numbers, without a gap."""

    received: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, frame: bytes | memoryview) -> None:
        if len(frame) < _HEAD.size:
            self.faults.append(f"torn: {len(frame)} bytes")
            return
        number, size, checksum = _HEAD.unpack_from(frame)
        body = frame[_HEAD.size :]
        if len(body) != size or zlib.crc32(body, number & 0xFFFFFFFF) != checksum:
            self.faults.append(f"torn: number {number}, {len(body)} bytes of {size}")
        elif number == self.received:
            self.received += 1
        elif number == self.received - 1:
            self.faults.append(f"duplicate: {number}")
        elif number < self.received:
            self.faults.append(f"reordered: {number} after {self.received - 1}")
        else:
            self.faults.append(f"lost: {self.received} to {number - 1}")
            self.received = number + 1

    def settle(self, committed: int) -> None:
        """At the end: everything that the sender's journal has must be here."""
        if self.received < committed:
            self.faults.append(f"lost: {committed - self.received} committed messages at the end")


class Journal:
    """Two counters in memory that a killed process leaves behind: messages done, and its own faults."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.words = memoryview(self._memory).cast("Q")

    @property
    def done(self) -> int:
        return int(self.words[0])

    @property
    def faults(self) -> int:
        return int(self.words[1])

    def clear(self) -> None:
        self.words[0] = self.words[1] = 0


# -- the two sides ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One round."""

    listens: bool  # the victim
    spin: str
    send_verb: str
    recv_verb: str
    sizes: tuple[int, ...]
    delay: float  # seconds between the first message and the kill

    @classmethod
    def draw(cls, chance: random.Random) -> Plan:
        largest = chance.choice([0, 64, 64, 1000, 16_000, 200_000])
        return cls(
            listens=chance.random() < 0.5,
            spin=chance.choice(["0", "auto", "20us"]),
            send_verb=chance.choice(["send", "send", "send_many", "loan"]) if largest < 60_000 else "send",
            recv_verb=chance.choice(["recv", "recv", "recv_many", "borrow", "aio"]),
            sizes=tuple(chance.randrange(largest + 1) for _ in range(64)),
            delay=chance.choice([0, 10e-6, 100e-6, 1e-3, 3e-3]) * chance.random(),
        )


@contextmanager
def opened(plan: Plan, listens: bool) -> Iterator[ipckit.Channel[bytes]]:
    url = f"{URL}&spin={plan.spin}"
    if listens:
        with ipckit.listen(url) as listener, listener.accept(timeout=20) as channel:
            yield channel
    else:
        with ipckit.connect(url, timeout=20) as channel:
            yield channel


def send_for_ever(channel: ipckit.Channel[bytes], plan: Plan, committed: Callable[[int], None]) -> None:
    """`committed` is told how many are out, after each call."""
    number = 0
    while True:
        size = plan.sizes[number % len(plan.sizes)]
        if plan.send_verb == "send":
            channel.send(message(number, size))
            number += 1
        elif plan.send_verb == "loan":
            data = message(number, size)
            with channel.loan(len(data)) as view:
                view[:] = data
            number += 1
        else:
            number += channel.send_many([message(number + i, plan.sizes[(number + i) % 64]) for i in range(8)])
        committed(number)


def receive_for_ever(channel: ipckit.Channel[bytes], plan: Plan, ledger: Ledger, received: Callable[[], None]) -> None:
    while True:
        if plan.recv_verb == "recv_many":
            for frame in channel.recv_many(16, timeout=20):
                ledger.note(frame)
        elif plan.recv_verb == "borrow":
            with channel.borrow(timeout=20) as view:
                ledger.note(view)
        else:
            ledger.note(channel.recv(timeout=20))
        received()


async def receive_in_a_loop(plan: Plan, listens: bool, ledger: Ledger, received: Callable[[], None]) -> None:
    url = f"{URL}&spin={plan.spin}"
    if listens:
        async with await aio.listen(url) as listener, await listener.accept(timeout=20) as channel:
            while True:
                ledger.note(await channel.recv(timeout=20))
                received()
    async with await aio.connect(url, timeout=20) as channel:
        while True:
            ledger.note(await channel.recv(timeout=20))
            received()


def victim(plan: Plan, role: str, journal: Journal) -> None:
    """In the forked child; never returns."""
    signal.alarm(30)  # its default action ends a victim whose harness is gone
    try:
        if role == "sender":

            def commit(number: int) -> None:
                journal.words[0] = number

            with opened(plan, plan.listens) as channel:
                send_for_ever(channel, plan, commit)
        ledger = Ledger()

        def note() -> None:
            journal.words[0] = ledger.received
            journal.words[1] = len(ledger.faults)

        if plan.recv_verb == "aio":
            asyncio.run(receive_in_a_loop(plan, plan.listens, ledger, note))
        with opened(plan, plan.listens) as channel:
            receive_for_ever(channel, plan, ledger, note)
    except BaseException as error:
        print(f"victim: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(99)


# -- the harness -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    rounds: int = 0
    messages: int = 0
    cut: int = 0  # kills inside a message
    unjournalled: int = 0  # kills between a commit and its entry in the journal
    latencies: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def late(self) -> int:
        return sum(latency > BOUND for latency in self.latencies)

    def __str__(self) -> str:
        worst = sorted(self.latencies)
        spread = (
            f"median {statistics.median(worst) * 1e3:.2f} ms, p99 {worst[len(worst) * 99 // 100] * 1e3:.2f} ms, "
            f"worst {worst[-1] * 1e3:.2f} ms"
            if worst
            else "none"
        )
        return (
            f"{self.rounds} kills, {self.messages} messages; {self.cut} inside a message, {self.unjournalled} between a commit "
            f"and its journal entry\nPeerDied heard after: {spread}; {self.late} later than {BOUND * 1e3:.0f} ms\n"
            f"faults: {len(self.faults)}"
        )


class Leaks:
    """What this process and the system had before, to compare with."""

    def __init__(self, runtime_dir: str) -> None:
        self._runtime_dir = runtime_dir
        self._before = self._look()

    @staticmethod
    def _look() -> tuple[int, tuple[str, ...]]:
        # Other tests' semaphores and directories come and go beside us.
        files = (
            entry.name for entry in os.scandir("/dev/shm") if entry.is_file() and not entry.name.startswith("sem.")
        )
        return len(os.listdir("/proc/self/fd")), tuple(sorted(files))

    def faults(self, listener_was_killed: bool) -> list[str]:
        faults = []
        fds, segments = self._look()
        if fds != self._before[0]:
            faults.append(f"left: {fds - self._before[0]} descriptors")
        if set(segments) - set(self._before[1]):
            faults.append(f"left: {set(segments) - set(self._before[1])} in /dev/shm")
        with open("/proc/self/maps") as maps:
            if "ipckit-ring" in maps.read():
                faults.append("left: a mapped ring")
        allowed = {"killed.shm", "killed.shm.lock"} if listener_was_killed else set()
        found = set(os.listdir(self._runtime_dir))
        if found - allowed:
            faults.append(f"left: {found - allowed} in the runtime directory")
        return faults


class Killer:
    """Called for each message of the survivor: kills the victim when its time has come."""

    def __init__(self, pid: int, delay: float) -> None:
        self.pid = pid
        self.killed_at: float | None = None
        self._delay = delay
        self._due: float | None = None

    def __call__(self, *_: object) -> None:
        if self.killed_at is not None:
            return
        now = time.perf_counter()
        if self._due is None:
            self._due = now + self._delay
        if now >= self._due:
            self.killed_at = time.perf_counter()
            os.kill(self.pid, signal.SIGKILL)


def survive(plan: Plan, role: str, ledger: Ledger, killer: Killer) -> None:
    """Until the end of the peer, which is raised."""
    if role == "sender" and plan.recv_verb == "aio":
        asyncio.run(receive_in_a_loop(plan, not plan.listens, ledger, killer))
    with opened(plan, not plan.listens) as channel:
        if role == "sender":
            receive_for_ever(channel, plan, ledger, killer)
        else:
            send_for_ever(channel, plan, killer)


def one_round(plan: Plan, role: str, journal: Journal, leaks: Leaks, report: Report) -> list[str]:
    journal.clear()
    pid = os.fork()
    if pid == 0:
        victim(plan, role, journal)
    ledger, killer = Ledger(), Killer(pid, plan.delay)
    faults = []
    try:
        survive(plan, role, ledger, killer)
        faults.append("the survivor ended without an error")
    except errors.PeerDied as died:
        if killer.killed_at is not None:
            report.latencies.append(time.perf_counter() - killer.killed_at)
        report.cut += "inside a message" in str(died)
        if died.pid != pid:
            faults.append(f"PeerDied names process {died.pid}, not {pid}")
    except errors.IpcError as error:
        faults.append(f"the survivor got {error!r}")
    finally:
        if killer.killed_at is None:
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != -signal.SIGKILL:
        faults.append(f"the victim ended by itself ({status})")
    if role == "sender":
        ledger.settle(journal.done)
        report.unjournalled += ledger.received > journal.done
        faults += ledger.faults
    elif journal.faults:
        faults.append(f"{journal.faults} faults at the receiving victim")
    report.messages += ledger.received or journal.done
    report.rounds += 1
    return faults + leaks.faults(plan.listens)


def run(role: str, count: int, seed: int, runtime_dir: str) -> Report:
    """`runtime_dir` must be what IPCKIT_RUNTIME_DIR says, and empty."""
    chance = random.Random(seed)
    report, journal = Report(), Journal()
    for url in (URL, URL):  # once before counting: modules, the first import of asyncio
        with ipckit.listen(url):
            pass
    leaks = Leaks(runtime_dir)
    for n in range(count):
        plan = Plan.draw(chance)
        report.faults += [
            f"round {n} of seed {seed}: {fault} ({plan})" for fault in one_round(plan, role, journal, leaks, report)
        ]
    with ipckit.listen(URL):
        pass
    report.faults += leaks.faults(listener_was_killed=False)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=["sender", "receiver"], required=True, help="who is killed")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ipckit-crash-") as runtime_dir:
        os.environ["IPCKIT_RUNTIME_DIR"] = runtime_dir
        begin = time.monotonic()
        report = run(options.role, options.count, options.seed, runtime_dir)
    print(f"seed {options.seed}, killing the {options.role}: {report}\n{time.monotonic() - begin:.0f} s")
    for fault in report.faults[:20]:
        print(fault)
    return 1 if report.faults or report.late else 0


if __name__ == "__main__":
    sys.exit(main())
