"""Kill a Redis server, or the consumers of its queue, under load, many times, and account for every message.

    python tests/crash/redis_kill.py --role server --kills 20 --messages 50000 --seed 1
    python tests/crash/redis_kill.py --role consumer --kills 200 --messages 20000

The server syncs before it acknowledges (appendfsync always), the senders ask for it (fsync=always). Senders and receivers are
processes with journals; one sender sends one message at a time and gives up early now and then (OutcomeUnknown), sending
most of those again with their ids, the other has many on their way at once. A receiver notes what it got, and then acknowledges.
At the end everything is drained, the journals are judged (`checker`), and the server's pending entries are compared with what
the last receiver holds. What a SIGKILL of the server leaves out: the kernel's cache survives it, so it tells nothing of the disk.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
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

import redis

import ipckit
from ipckit import aio, errors
from ipckit.testing.servers import redis_server


def _load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


checker = _load("checker")
STREAM = "kills"
PATIENCE = 120.0

# -- the parties ------------------------------------------------------------------------------------------------------


def send_one_by_one(url, directory, me, chance):
    journal, number = checker.Journal(directory / f"sender-{me}"), 0
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
    journal = checker.Journal(directory / f"sender-{me}")
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


def receive(url, directory, me, chance):
    journal = checker.Journal(directory / f"receiver-{me}-{os.getpid()}")
    done = directory / "done"
    with ipckit.receiver(url, ack="manual") as jobs:
        while not done.exists():
            try:
                messages = jobs.recv_many(chance.choice([1, 4, 32]), timeout=0.1)
            except errors.Timeout:
                continue
            rows = []
            for message in messages:
                sender, number = checker.read_body(message.value) or (-1, -1)
                rows.append(("got", sender, number, message._parcel.token.id.decode()))
            journal.note_many(rows)  # a kill between this and the acknowledgement is a redelivery
            for message in messages:
                if chance.random() < 0.02:
                    message.nack(delay=chance.choice([0, 0.05]))
                else:
                    message.ack()
    journal.close()


def part(argv):
    kind, url, directory, me, seed = argv
    chance = random.Random(int(seed))
    # A harness that is gone ends us too.
    signal.alarm(900)
    if kind == "one":
        send_one_by_one(url, Path(directory), int(me), chance)
    elif kind == "many":
        asyncio.run(send_many_at_once(url, Path(directory), int(me), chance))
    else:
        receive(url, Path(directory), int(me), chance)


# -- the harness ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    kills: int = 0
    verdict: object = None
    faults: list[str] = field(default_factory=list)

    def __str__(self):
        return f"{self.kills} kills; {self.verdict}\nfaults: {self.faults or 'none'}"


class Parties:
    def __init__(self, url, directory, chance):
        self.url, self.directory, self.chance = url, directory, chance
        self.running = {}

    def start(self, kind, me):
        words = [sys.executable, __file__, "--part", kind, self.url, str(self.directory), str(me)]
        self.running[kind, me] = subprocess.Popen([*words, str(self.chance.randrange(1 << 30))])

    def kill(self, kind, me):
        process = self.running.pop((kind, me))
        process.kill()
        process.wait()

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


def read_books(directory):
    books = checker.Books()
    for path in sorted(directory.glob("sender-*")):
        for verb, sender, number in checker.read_journal(path):
            message = int(sender), int(number)
            {"try": books.tried, "ack": books.acknowledged, "unknown": books.unknown, "refused": books.refused}[
                verb
            ].add(message)
    books.unknown -= books.acknowledged
    books.refused -= books.unknown
    for path in sorted(directory.glob("receiver-*")):
        for _, sender, number, entry in checker.read_journal(path):
            message = int(sender), int(number)
            books.delivery(message if message != (-1, -1) else None, entry)
    return books


def acknowledged(directory):
    return sum(path.read_text().count("ack") for path in directory.glob("sender-*"))


def all_busy(directory):
    """Whose journals have begun: nobody can be opened while the server is away."""
    return [path for path in directory.glob("*-*") if path.stat().st_size]


def until(condition, what, faults, patience=PATIENCE):
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            faults.append(f"not within {patience:.0f} s: {what}")
            return
        time.sleep(0.05)


def run(role, kills, messages, seed, directory):
    chance = random.Random(seed)
    report = Report()
    with ExitStack() as stack:
        server = stack.enter_context(redis_server(private=True, appendonly=True, appendfsync="always"))
        url = server.address(f"/0/{STREAM}", fsync="always", claim="20s" if role == "server" else "5s", dedup="1h")
        parties = Parties(url, directory, chance)
        stack.callback(parties.close)
        for kind, me in (("one", 1), ("many", 2), ("receiver", 1), ("receiver", 2)):
            parties.start(kind, me)
        until(lambda: len(all_busy(directory)) == 4, "everybody at work", report.faults)
        for kill in range(kills):
            time.sleep(chance.uniform(0.02, 0.6))
            if role == "server":
                server.kill()
                time.sleep(chance.choice([0, 0, 0.3]))
                server.start()
            else:
                me = chance.choice([1, 2])
                parties.kill("receiver", me)
                parties.start("receiver", me)
            report.kills = kill + 1
            pace = messages * report.kills // kills  # kills spread over the load
            until(lambda pace=pace: acknowledged(directory) >= pace, f"{pace} acknowledgements", report.faults)
        (directory / "stop").touch()
        report.faults += parties.wait("one", "many")
        client = stack.enter_context(redis.Redis.from_url(server.url, protocol=2))

        def drained():
            group = client.xinfo_groups(STREAM)[0]
            return (
                group["pending"] == 0 and group["last-delivered-id"] == client.xinfo_stream(STREAM)["last-generated-id"]
            )

        until(drained, "everything drained", report.faults)
        (directory / "done").touch()
        report.faults += parties.wait("receiver")
        books = read_books(directory)
        report.verdict = checker.judge(books)
        report.faults += report.verdict.faults
        stored = client.xlen(STREAM)
        expected = len({message for message in books.delivered if message is not None})
        if stored != expected:
            report.faults.append(f"the log has {stored} entries, the journals {expected} messages")
        report.faults += pending_faults(url, client)
    return report


def pending_faults(url, client):
    """The server's pending entries must be exactly what a receiver holds."""
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as held:
        jobs.send_many([b"%d" % number for number in range(8)])
        messages = [held.recv(timeout=10) for _ in range(8)]
        for message in messages[::2]:
            message.ack()
        model = sorted(message._parcel.token.id for message in messages[1::2])
        found = sorted(entry["message_id"] for entry in client.xpending_range(STREAM, "ipckit", "-", "+", 1000))
    return [] if found == model else [f"pending are {found}, held are {model}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=["server", "consumer"], default="server")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--messages", type=int, default=50_000, help="acknowledged ones, at least")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part(options.part)
        return 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        report = run(options.role, options.kills, options.messages, options.seed, Path(directory))
    print(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
