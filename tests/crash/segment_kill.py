"""Kill a process that creates, attaches, resizes, unlinks or closes a segment, or writes a Latest, and see what it leaves.

    python tests/crash/segment_kill.py --count 1000 --seed 1

Half of the kills come at a random instant, while the victim does one thing after another; the other half at a chosen line of the
Python code that does it (counted by a trace function, so every line comes by in time). In half of the rounds somebody else is
attached, who must not be harmed. What must hold after each kill:

    nothing blocks a new start     the name can be opened at once, or created where nobody else is attached
    nothing is half made           what is opened is whole, and begins with the bytes that were there
    nothing leaks                  when all have closed, the directory is empty, and so is our table of descriptors
    nobody is harmed               views stay, the newest generation can be seen and resized; no value of a Latest is torn

The seed fixes what is done and where; the scheduler adds what it likes. Kills at the numbered steps of a Latest's write are in
tests/native/test_latest.c.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ipckit import errors
from ipckit.sync import Latest, Segment, _files, _tenancy, latest, segment

URL = "shm://victim"
MARK = b"whole"
STUCK = 2.0  # seconds that nothing may take
TRACED = {module.__file__ for module in (_files, _tenancy, latest, segment)}


def marked(mode: str | None = None) -> Segment:
    made = Segment(URL, 64, mode)
    made.buf[: len(MARK)] = MARK
    return made


# -- what a victim does: what comes before, and what it is killed over ---------------------------------------------------


def create() -> Callable[[], object]:
    return lambda: marked("create-or-attach")


def attach() -> Callable[[], object]:
    keep = marked()
    return lambda: (Segment(URL), keep)


def resize() -> Callable[[], object]:
    thing = marked()
    return lambda: [thing.resize(size) for size in (9000, 64, 70_000)]


def unlink() -> Callable[[], object]:
    thing = marked()
    return thing.unlink


def close() -> Callable[[], object]:
    thing = marked()
    return thing.close


def write() -> Callable[[], object]:
    newest = Latest("shm://newest", 4096)

    def act() -> None:
        for n in range(200):
            newest.write(bytes([n]) * 4096)

    return act


OPERATIONS = {each.__name__: each for each in (create, attach, resize, unlink, close, write)}


def at_line(number: int, act: Callable[[], object]) -> int:
    """Do it, and die before the line of this number; the number of lines, if there are fewer."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return count


def victim(operation: str, line: int, go: int) -> None:
    """In the forked child; never returns. Line 0: again and again, until it is killed."""
    signal.alarm(30)
    try:
        os.read(go, 1)
        if line:
            lines = at_line(line, OPERATIONS[operation]())
            os._exit(2 if lines < line else 3)
        while True:
            act = OPERATIONS[operation]()
            act()
            del act
    except BaseException as error:
        print(f"victim: {operation}: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


# -- the harness -------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    rounds: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(self.killed.values())

    def __str__(self) -> str:
        of = ", ".join(f"{count} {name}" for name, count in sorted(self.killed.items()))
        return (
            f"{self.kills} kills ({of}) in {self.rounds} rounds; slowest new start {self.slowest * 1e3:.1f} ms; "
            f"faults: {len(self.faults)}"
        )


def one_round(operation: str, line: int, delay: float, company: bool, directory: Path, report: Report) -> list[str]:
    """What was wrong. The victim is forked before anything is open here, or it would inherit that."""
    wait, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        victim(operation, line, wait)
    faults = []
    ours = marked("create") if company else None
    ours_newest = Latest("shm://newest", 4096)
    view = ours.buf if ours is not None else None
    os.write(tell, b"x")
    if not line:
        end = time.perf_counter() + delay
        while time.perf_counter() < end:
            faults += torn(ours_newest)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGKILL:
        report.killed[operation + (" at a line" if line else "")] += 1
    elif status != 2:
        faults.append(f"the victim ended with {status}")
    began = time.perf_counter()
    try:
        faults += [*torn(ours_newest), *afterwards(ours)]
        ours_newest.write(b"ours")
    except errors.IpcError as error:
        faults.append(f"a new start failed: {error!r}")
    report.slowest = max(report.slowest, time.perf_counter() - began)
    if view is not None and bytes(view[: len(MARK)]) != MARK:
        faults.append("a view was harmed")
    if ours is not None:
        ours.close()
    ours_newest.close()
    if time.perf_counter() - began > STUCK:
        faults.append("it took too long")
    left = sorted(path.name for path in directory.iterdir())
    if left:
        faults.append(f"left behind: {left}")
        for path in directory.iterdir():
            path.unlink()
    os.close(wait)
    os.close(tell)
    return faults


def torn(newest: Latest[bytes]) -> list[str]:
    value = newest.read()
    return ["a torn value"] if value is not None and (len(value) != 4096 or value.count(value[0]) != 4096) else []


def afterwards(ours: Segment | None) -> list[str]:
    """Open it, and use it."""
    faults = []
    if ours is None:
        with Segment(URL, 64, "create") as again:
            if bytes(again.buf) != bytes(64):
                faults.append("what the dead had was found in a new one")
        return faults
    ours.refresh()
    if bytes(ours.buf[: len(MARK)]) != MARK:
        faults.append("the newest generation does not begin with the bytes that were there")
    try:
        ours.resize(12_345)
    except errors.NotFound:  # the victim had removed the name: it is free for a new one
        with Segment(URL, 64, "create"):
            pass
        return faults
    with Segment(URL) as again:
        if again.size != 12_345 or bytes(again.buf[: len(MARK)]) != MARK:
            faults.append("what is attached to is not what was resized")
    return faults


def lines_of(operation: str) -> int:
    """How many lines it has, in a process of its own."""
    read, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        lines = at_line(0, OPERATIONS[operation]())
        os.write(write_end, lines.to_bytes(4, "little"))
        os._exit(0)
    os.waitpid(pid, 0)
    lines = int.from_bytes(os.read(read, 4), "little")
    os.close(read)
    os.close(write_end)
    _tenancy.sweep(Path(os.environ["IPCKIT_RUNTIME_DIR"]))
    return lines


def run(count: int, seed: int, directory: Path) -> Report:
    """`directory`: the empty runtime directory."""
    chance = random.Random(seed)
    lines = {name: lines_of(name) for name in OPERATIONS}
    report = Report()
    before = len(os.listdir("/proc/self/fd"))
    for n in itertools.count():  # in company some lines do not come by: such a round kills nobody
        if report.kills >= count or report.rounds > 2 * count + 50:
            break
        operation = chance.choice([*OPERATIONS])
        line = chance.randint(1, lines[operation]) if n % 2 else 0
        delay = chance.choice([1e-3, 5e-3, 2e-2]) * chance.random()
        company = chance.random() < 0.5
        where = f"line {line}" if line else f"after {delay * 1e3:.2f} ms"
        what = f"round {n} of seed {seed}: {operation}, {where}, {'in company' if company else 'alone'}"
        report.faults += [f"{what}: {fault}" for fault in one_round(operation, line, delay, company, directory, report)]
        report.rounds += 1
    if len(os.listdir("/proc/self/fd")) != before:
        report.faults.append("descriptors are left")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ipckit-", dir="/dev/shm") as directory:
        os.environ["IPCKIT_RUNTIME_DIR"] = directory
        report = run(options.count, options.seed, Path(directory))
    print(report)
    for fault in report.faults[:20]:
        print(fault)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
