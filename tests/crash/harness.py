"""What the crash tests of queues have in common: senders and receivers with journals, as processes, and who watches them.

    parties = Parties("tests.crash.redis_kill", url, directory, chance)
    parties.start("one", 1); parties.start("receiver", 1)         # each runs `part` of its module, with a seed of its own
    until(lambda: acknowledged(directory) >= 1000, ...)
    verdict = checker.judge(read_books(directory))

A sender notes what it tries, then how it ended. A receiver notes what it got, then that it settles it, then settles it: what a
killed one has noted as got and not as settled must be handed out again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import ipckit
from ipckit import aio, errors

from . import checker

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; for what a loaded machine does late
LIFE = 900  # seconds after which a party ends whose harness is gone

# -- the parties ------------------------------------------------------------------------------------------------------


def send_one_by_one(url, directory, me, chance):
    """One message at a time; gives up early now and then, and sends most of those again with their ids."""
    journal, number = checker.Journal(directory / f"sender-{me}-{os.getpid()}"), 0
    stop = directory / "stop"
    with ipckit.sender(url) as jobs:
        while not stop.exists():
            body, id = checker.body_of(me, number, chance.randrange(200)), f"{me}-{number}"
            journal.note("try", me, number)
            patience = chance.choice([0.02, 0.2, 10.0])
            while True:
                try:
                    jobs.send(body, id=id, timeout=patience)
                    journal.note("ack", me, number)
                except errors.OutcomeUnknown as unknown:
                    if unknown.message_id != id:
                        raise SystemExit(f"unknown is {unknown.message_id}, sent was {id}") from unknown
                    journal.note("unknown", me, number)
                    if chance.random() < 0.8:
                        patience = 10.0
                        continue
                except errors.Timeout:
                    journal.note("refused", me, number)
                break
            number += 1
    journal.close()


async def send_many_at_once(url, directory, me, chance):
    """Many messages on their way at the same time."""
    journal = checker.Journal(directory / f"sender-{me}-{os.getpid()}")
    stop = directory / "stop"

    async def send(jobs, number):
        while True:
            try:
                await jobs.send(checker.body_of(me, number, chance.randrange(200)), id=f"{me}-{number}", timeout=20)
                return "ack", me, number
            except errors.OutcomeUnknown:
                journal.note("unknown", me, number)

    async with await aio.sender(url) as jobs:
        number = 0
        while not stop.exists():
            batch = range(number, number + chance.choice([1, 8, 64]))
            number = batch.stop
            journal.note_many([("try", me, n) for n in batch])
            journal.note_many(await asyncio.gather(*(send(jobs, n) for n in batch)))
    journal.close()


def receive(url, directory, me, chance, entry_of, **options):
    """Until the harness is done. `entry_of` says which entry of the log a message is: two for one message are a duplicate.

    What it says behind a colon is for the script's own checks.
    """
    journal = checker.Journal(directory / f"receiver-{me}-{os.getpid()}")
    done = directory / "done"
    with ipckit.receiver(url, ack="manual", **options) as jobs:
        journal.note("open")
        while not done.exists():
            try:
                messages = jobs.recv_many(chance.choice([1, 4, 32]), timeout=0.1)
            except errors.Timeout:
                continue
            bodies = [checker.read_body(message.value) or (-1, -1) for message in messages]
            journal.note_many([("got", *body, entry_of(m)) for body, m in zip(bodies, messages, strict=True)])
            for body, message in zip(bodies, messages, strict=True):  # a kill in here is a redelivery
                journal.note("settle", *body)
                if chance.random() < 0.02:
                    message.nack(delay=chance.choice([0, 0.05]))
                else:
                    message.ack()
    journal.close()


def part(argv, entry_of):
    """One party of a broker's queue: what the process runs that `Parties` has started."""
    kind, url, directory, me, seed = argv
    chance = random.Random(int(seed))
    if kind == "one":
        send_one_by_one(url, Path(directory), int(me), chance)
    elif kind == "many":
        asyncio.run(send_many_at_once(url, Path(directory), int(me), chance))
    else:
        receive(url, Path(directory), int(me), chance, entry_of)


class Parties:
    """Processes that run the `part` of a module, each with its kind and a number."""

    def __init__(self, module, url, directory, chance):
        self.module, self.url, self.directory, self.chance = module, url, directory, chance
        self.running = {}

    def start(self, kind, me):
        words = [sys.executable, "-m", self.module, "--part", kind, self.url, str(self.directory), str(me)]
        self.running[kind, me] = subprocess.Popen([*words, str(self.chance.randrange(1 << 30))], cwd=ROOT)

    def kill(self, kind, me):
        process = self.running.pop((kind, me))
        process.kill()
        process.wait()

    def signal(self, kind, me, number):
        self.running[kind, me].send_signal(number)

    def at_work(self):
        """Whether everybody has opened what it works on: whose journals have begun."""
        journals = [path for process in self.running.values() for path in self.directory.glob(f"*-{process.pid}")]
        return len([path for path in journals if path.stat().st_size]) == len(self.running)

    def wait(self, *kinds):
        """They are told to end: whoever ends with an error is a fault."""
        faults = []
        for (kind, me), process in list(self.running.items()):
            if kind in kinds:
                try:
                    if process.wait(PATIENCE):
                        faults.append(f"{kind} {me} ended with {process.returncode}")
                except subprocess.TimeoutExpired:
                    faults.append(f"{kind} {me} hangs")
                    process.kill()
                    process.wait()
                del self.running[kind, me]
        return faults

    def close(self):
        for process in self.running.values():
            process.kill()
            process.wait()


# -- the books ----------------------------------------------------------------------------------------------------------


def read_books(directory):
    books = checker.Books()
    kinds = {"try": books.tried, "ack": books.acknowledged, "unknown": books.unknown, "refused": books.refused}
    for path in sorted(directory.glob("sender-*")):
        for verb, sender, number in checker.read_journal(path):
            kinds[verb].add((int(sender), int(number)))
    books.unknown -= books.acknowledged
    books.refused -= books.unknown
    for path in sorted(directory.glob("receiver-*")):
        held = Counter()
        for verb, *words in checker.read_journal(path):
            if verb == "open":
                continue
            sender, number, *entry = words
            message = int(sender), int(number)
            if verb == "got":
                books.delivery(message if message != (-1, -1) else None, entry[0].partition(":")[0])
                held[message] += 1
            else:
                held[message] -= 1
        books.abandoned.update(+held)
    return books


def acknowledged(directory):
    return sum(path.read_text().count("ack") for path in directory.glob("sender-*"))


# -- the watch ----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    kills: int = 0
    verdict: checker.Verdict | None = None
    faults: list[str] = field(default_factory=list)

    def __str__(self):
        return f"{self.kills} kills; {self.verdict}\nfaults: {self.faults or 'none'}"


def until(condition, what, faults, patience=PATIENCE):
    """Whether it came true; if not, that is a fault."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            faults.append(f"not within {patience:.0f} s: {what}")
            return False
        time.sleep(0.02)
    return True


def main(description, part, run, *, roles, kills, messages, **choices):
    """The command line of a script. `run(role, kills, messages, seed, directory, **chosen)` makes the report."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--role", choices=roles, default=roles[0], help="who is killed")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--messages", type=int, default=messages, help="acknowledged ones, at least")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        signal.alarm(LIFE)
        part(options.part)
        return 0
    print(f"seed {options.seed}", flush=True)
    chosen = {name: getattr(options, name) for name in choices}
    with tempfile.TemporaryDirectory() as directory:
        report = run(options.role, options.kills, options.messages, options.seed, Path(directory), **chosen)
    print(report)
    return 1 if report.faults else 0
