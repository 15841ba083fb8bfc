"""Kills of senders and receivers on a queue that the kernel keeps (mq, fifo): nothing is lost, torn or blocked.

    python tests/crash/kernel_kill.py mq --kills 200 --seed 7

Senders and receivers are processes that note in journals what they tried, what was accepted, what they got. One of them is
killed at a random instant, and replaced; at the end one receiver takes what is left, and the books are judged (`checker`). Then
nothing may be left on the disk. On a FIFO somebody has to keep it open: this process does.
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
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import ipckit
from ipckit import errors

sys.path.insert(0, str(Path(__file__).parent))
from checker import Books, Journal, Verdict, body_of, judge, read_body, read_journal

LARGE = 20_000  # does not fit into a record


@dataclass
class Report:
    kills: int
    verdict: Verdict
    left: list[str]

    @property
    def faults(self) -> list[str]:
        return self.verdict.faults + ([f"left behind: {self.left}"] if self.left else [])

    def __str__(self) -> str:
        return f"{self.kills} kills: {self.verdict}; left behind: {self.left or 'nothing'}"


def send(url: str, who: int, journal: Journal) -> None:
    dice = random.Random(who)
    with ipckit.sender(url, timeout=20) as sender:
        print("ready", flush=True)
        for number in range(1 << 30):
            body = body_of(who, number, dice.choice((24, 24, 24, 1500, LARGE)))
            journal.note("try", who, number)
            try:
                sender.send(body, 0.5, priority=number % 3 if url.startswith("mq") else 0)
            except errors.Timeout:
                journal.note("refused", who, number)
            else:
                journal.note("sent", who, number)


def receive(url: str, journal: Journal, quiet: float | None, pause: float) -> None:
    with ipckit.receiver(url, ack="manual", timeout=20) as receiver:
        if quiet is None:
            print("ready", flush=True)
        held: list[ipckit.Message[bytes]] = []
        with suppress(errors.Timeout):
            while True:
                message = receiver.recv(quiet)
                found = read_body(message.value)
                journal.note("got", *(found or ("torn", len(message.value))))
                held.append(message)
                if quiet is not None or len(held) > 3:
                    held.pop(0).ack()
                time.sleep(pause)
        for message in held:
            message.ack()


def run(scheme: str, kills: int, seed: int, where: Path, senders: int = 2, receivers: int = 3) -> Report:
    dice = random.Random(seed)
    home = where / "run"
    environ = os.environ | {"IPCKIT_RUNTIME_DIR": str(home)}
    os.environ["IPCKIT_RUNTIME_DIR"] = str(home)
    url = f"{scheme}://kill"
    count, books = 0, Books()
    running: list[tuple[subprocess.Popen[bytes], str, int]] = []

    def start(role: str) -> None:
        nonlocal count
        count += 1
        command = [sys.executable, __file__, scheme, "--role", role, "--who", str(count), "--where", str(where)]
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", f"a {role} does not start"
        running.append((process, role, count))

    def stop(index: int) -> str:
        process, role, who = running.pop(index)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if role == "sender":
            books.killed.add(who)
        return role

    keep = ipckit.sender(url) if scheme == "fifo" else nullcontext()
    with keep:
        try:
            for role in ["sender"] * senders + ["receiver"] * receivers:
                start(role)
            for _ in range(kills):
                time.sleep(dice.uniform(0.005, 0.12))
                start(stop(dice.randrange(len(running))))
        finally:
            while running:
                stop(0)
        rest = Journal(where / "journal.0")
        receive(url, rest, 1.0, 0)
        rest.close()
    for path in where.glob("journal.*"):
        for words in read_journal(path):
            if words[0] == "got":
                books.delivery(None if words[1] == "torn" else (int(words[1]), int(words[2])), "0")
            else:
                kind = {"try": books.tried, "sent": books.acknowledged, "refused": books.refused}[words[0]]
                kind.add((int(words[1]), int(words[2])))
    return Report(kills, judge(books), sorted(path.name for path in home.iterdir() if path.name.startswith("kill")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scheme", choices=["mq", "fifo"])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--role")
    parser.add_argument("--who", type=int)
    parser.add_argument("--where", type=Path)
    args = parser.parse_args()
    url = f"{args.scheme}://kill"
    if args.role:
        journal = Journal(args.where / f"journal.{args.who}")
        if args.role == "sender":
            send(url, args.who, journal)
        else:
            receive(url, journal, None, 0.0005)
        return
    with tempfile.TemporaryDirectory() as where:
        report = run(args.scheme, args.kills, args.seed, Path(where))
    print(f"seed {args.seed}: {report}")
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
