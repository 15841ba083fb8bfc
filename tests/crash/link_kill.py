"""Kill the consumers, or the senders, of queues over links, under load, many times, and account for every message.

    python -m tests.crash.link_kill --role consumer --kills 200 --scheme unix --listener receiver
    python -m tests.crash.link_kill --role sender --kills 200 --scheme shm --listener sender

The side that listens has the name: two senders and one receiver, or one sender and two receivers that compete. Whoever is killed
is started again at once, and the others find it. Nobody outlives a sender here, so it notes "ack" after `drain`, and
begins each life with what its earlier lives had tried and not noted so, under the same ids. Besides the verdict of `checker`:

    a message comes as new (`redelivered` is 0) once for each life of its sender that sent it; then only marked as redelivered
    what a sender calls unacknowledged at the end is what a receiver holds
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import ipckit
from ipckit import errors
from ipckit.testing.conformance import free_port

from . import checker, harness
from .harness import until

SCHEMES = ["unix", "shm", "tcp"]


def place_of(scheme):
    return f"tcp://127.0.0.1:{free_port()}" if scheme == "tcp" else f"{scheme}://kills"


# -- the parties ------------------------------------------------------------------------------------------------------


def send(url, directory, me, chance, *, listen):
    stop = directory / "stop"
    earlier = [row for path in sorted(directory.glob(f"sender-{me}-*")) for row in checker.read_journal(path)]
    done = {int(number) for verb, _, number in earlier if verb == "ack"}
    batch = sorted({int(number) for _, _, number in earlier} - done)  # of earlier lives, in nobody's hands perhaps
    number = max((int(number) for _, _, number in earlier), default=-1) + 1
    life = str(os.getpid())
    journal = checker.Journal(directory / f"sender-{me}-{life}")
    with ipckit.sender(url, listen=listen, timeout=harness.PATIENCE) as jobs:
        while True:
            journal.note_many([("try", me, n) for n in batch])
            for n in batch:
                body = checker.body_of(me, n, n * 37 % 3000)
                jobs.send(body, id=f"{me}-{n}", headers={"life": life}, timeout=harness.PATIENCE)
            jobs.drain(harness.PATIENCE)
            journal.note_many([("ack", me, n) for n in batch])
            if stop.exists():
                break
            batch = range(number, number + chance.choice([1, 8, 64, 300]))
            number = batch.stop
        if jobs.stats()["unacknowledged"]:
            raise SystemExit(f"drained, and then {jobs.stats()}")
    journal.close()


def entry_of(message):
    """Its identity, and what tells the times apart that it was handed out."""
    return f"{message.id}:{message.headers['life']}:{message.redelivered}"


def part(argv):
    kind, url, directory, me, seed = argv
    kind, _, side = kind.partition("-")
    directory, me, chance = Path(directory), int(me), random.Random(int(seed))
    if kind == "sender":
        send(url, directory, me, chance, listen=side == "listens")
    else:
        harness.receive(url, directory, me, chance, entry_of, listen=side == "listens", timeout=harness.PATIENCE)


# -- the watch ----------------------------------------------------------------------------------------------------------


def new_again(directory):
    """Messages that came as new twice from one life of their sender."""
    new = Counter(
        tuple(row[-1].split(":")[:2])
        for path in directory.glob("receiver-*")
        for row in checker.read_journal(path)
        if row[0] == "got" and row[-1].endswith(":0")
    )
    twice = sorted(message for message, times in new.items() if times > 1)
    return [f"handed out as new twice: {len(twice)}, such as {twice[:5]}"] if twice else []


def unacknowledged_faults(url):
    """What the sender calls unacknowledged must be what a receiver holds."""
    with ipckit.receiver(url, ack="manual") as held, ipckit.sender(url, timeout=10) as jobs:
        jobs.send_many([b"%d" % number for number in range(8)])
        messages = [held.recv(timeout=10) for _ in range(8)]
        for message in messages[::2]:
            message.ack()
        found = []

        def settled():
            try:
                jobs.drain(0)
            except errors.Timeout:
                found[:] = [jobs.stats()["unacknowledged"]]
            return found == [4]

        until(settled, "four of eight acknowledged", faults := [], 10)
    return [f"unacknowledged are {found}, held are 4"] if faults else []


def run(role, kills, messages, seed, directory, scheme, listener):
    chance = random.Random(seed)
    report = harness.Report()
    with ExitStack() as stack:
        runtime_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="ipckit-"))  # short, for a socket's path
        stack.enter_context(patch.dict(os.environ, IPCKIT_RUNTIME_DIR=runtime_dir))
        url = place_of(scheme)
        parties = harness.Parties(__spec__.name, url, directory, chance)
        stack.callback(parties.close)
        if listener == "receiver":
            sends, receives = "sender-connects", "receiver-listens"
            crew = [(receives, 1), (sends, 1), (sends, 2)]
        else:
            sends, receives = "sender-listens", "receiver-connects"
            crew = [(sends, 1), (receives, 1), (receives, 2)]
        for kind, me in crew:
            parties.start(kind, me)
        for kill in range(kills):
            if chance.random() < 0.8:  # or while somebody is on their way
                until(parties.at_work, "everybody at work", report.faults)
            time.sleep(chance.uniform(0, 0.1))
            victim = chance.choice([each for each in crew if each[0] == (sends if role == "sender" else receives)])
            parties.kill(*victim)
            parties.start(*victim)
            report.kills = kill + 1
            pace = messages * report.kills // kills
            until(lambda pace=pace: harness.acknowledged(directory) >= pace, f"{pace} acknowledged", report.faults)
        until(parties.at_work, "everybody at work", report.faults)  # nobody comes to a sender that has ended
        (directory / "stop").touch()
        report.faults += parties.wait(sends)
        (directory / "done").touch()
        report.faults += parties.wait(receives)
        books = harness.read_books(directory)
        report.verdict = checker.judge(books)
        report.faults += report.verdict.faults + new_again(directory) + unacknowledged_faults(url)
    return report


if __name__ == "__main__":
    choices = {"scheme": SCHEMES, "listener": ["receiver", "sender"]}
    sys.exit(harness.main(__doc__, part, run, roles=["consumer", "sender"], kills=200, messages=20_000, **choices))
