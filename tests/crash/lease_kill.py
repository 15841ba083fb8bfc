"""Kill the holders of a lock at a broker, or the broker itself, and look whether two were ever inside at once.

    python tests/crash/lease_kill.py --broker redis --role holder --kills 200
    python tests/crash/lease_kill.py --broker nats --role server --kills 20 --seed 1

Processes take the lock, note in their journals when they are inside (one clock for all of them), stay for a moment, and note that
they leave. One of them is killed at a random instant and replaced; or the server is killed and started again. At the end: the
times inside do not overlap, but for a hold that was told that it lost its lease; tokens grow; everybody still gets the lock.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from ipckit import errors
from ipckit.sync import Lock
from ipckit.testing.servers import nats_server, redis_server

WORKERS = 3
PATIENCE = 60.0


def work(url: str, journal: Path, seed: int) -> None:
    chance = random.Random(seed)
    lock = Lock(url)
    out = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(what: str, token: int) -> None:
        os.write(out, f"{what} {token} {time.monotonic_ns()}\n".encode())

    while True:
        try:
            with lock:
                token = lock.check()
                note("in", token)
                time.sleep(chance.random() * 0.01)
                note("out" if not lock.lost else "lost", token)
        except errors.LeaseLost as lost:
            note("lost", lost.token or 0)


@dataclass
class Hold:
    token: int
    begin: int
    end: int
    lost: bool = False


@dataclass
class Report:
    kills: int = 0
    inside: int = 0  # of them, of one that was inside
    holds: int = 0
    lost: int = 0
    faults: list[str] = field(default_factory=list)


def read(journal: Path, died: int | None) -> list[Hold]:
    """The holds of one process; the last one may have ended with it."""
    holds: list[Hold] = []
    for line in journal.read_text().splitlines() if journal.exists() else ():
        what, token, at = line.split()
        if what == "in":
            holds.append(Hold(int(token), int(at), 0))
        elif holds and holds[-1].token == int(token):
            holds[-1].end = holds[-1].end or int(at)
            holds[-1].lost |= what == "lost"
    for hold in holds:
        hold.end = hold.end or died or time.monotonic_ns()
    return holds


def judge(holds: list[Hold]) -> list[str]:
    faults = []
    holds = sorted(holds, key=lambda hold: hold.begin)
    latest = None
    for hold in holds:
        if latest is not None:
            if hold.begin < latest.end and not latest.lost:
                faults.append(f"token {hold.token} is inside {latest.end - hold.begin} ns before {latest.token} is out")
            if hold.token <= latest.token and not hold.lost:
                faults.append(f"token {hold.token} after {latest.token}")
        latest = hold
    return faults


def run(broker: str, role: str, kills: int, seed: int, directory: Path) -> Report:
    chance, report, holds = random.Random(seed), Report(), []
    with ExitStack() as stack:
        if broker == "redis":
            server = stack.enter_context(redis_server(private=True, appendonly=True, appendfsync="always"))
        else:
            server = stack.enter_context(nats_server(private=True))
        url = server.address({"redis": "/kills", "nats": "/locks/kills"}[broker], lease="500ms")
        journals: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
        stack.callback(lambda: [_end(process) for process, _ in journals.values()])

        def start(number: int) -> None:
            journal = directory / f"worker-{len(list(directory.iterdir()))}"
            journal.touch()
            command = [sys.executable, __file__, "--work", url, str(journal), str(chance.randrange(1 << 30))]
            journals[number] = subprocess.Popen(command), journal

        for number in range(WORKERS):
            start(number)
        _all_get_it(journals)
        while report.kills < kills:
            time.sleep(chance.random() * 0.05)
            if role == "server":
                server.kill()
                time.sleep(chance.random() * 0.2)
                server.start()
            else:
                number = chance.randrange(WORKERS)
                process, journal = journals[number]
                process.send_signal(signal.SIGKILL)
                process.wait(PATIENCE)
                mine = read(journal, time.monotonic_ns())
                report.inside += journal.read_text().count("in ") > sum(
                    journal.read_text().count(w) for w in ("out ", "lost ")
                )
                holds += mine
                start(number)
            report.kills += 1
            _all_get_it(journals)
        for process, journal in journals.values():
            if process.poll() is not None:
                report.faults.append(f"a worker ended with {process.returncode}")
            _end(process)
            holds += read(journal, time.monotonic_ns())
    report.holds, report.lost = len(holds), sum(hold.lost for hold in holds)
    report.faults += judge(holds)
    return report


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(PATIENCE)


def _all_get_it(journals: dict[int, tuple[subprocess.Popen[bytes], Path]]) -> None:
    """Return when everybody has been inside since now."""
    before = {number: journal.stat().st_size for number, (_, journal) in journals.items()}
    deadline = time.monotonic() + PATIENCE
    while any(journals[number][1].stat().st_size <= size for number, size in before.items()):
        if time.monotonic() > deadline:
            raise SystemExit("somebody does not get the lock any more")
        time.sleep(0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--broker", choices=("redis", "nats"), default="redis")
    parser.add_argument("--role", choices=("holder", "server"), default="holder")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as directory:
        report = run(options.broker, options.role, options.kills, options.seed, Path(directory))
    print(report)
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
