"""Kill a Redis server, or the consumers of its queue, under load, many times, and account for every message.

    python -m tests.crash.redis_kill --role server --kills 20 --messages 50000 --seed 1
    python -m tests.crash.redis_kill --role consumer --kills 200 --messages 20000

The server syncs before it acknowledges (appendfsync always), the senders ask for it (fsync=always). Senders and receivers are
processes with journals; one sender sends one message at a time and gives up early now and then (OutcomeUnknown), sending
most of those again with their ids, the other has many on their way at once. A receiver notes what it got, and then acknowledges.
At the end everything is drained, the journals are judged (`checker`), and the server's pending entries are compared with what
the last receiver holds. What a SIGKILL of the server leaves out: the kernel's cache survives it, so it tells nothing of the disk.
"""

from __future__ import annotations

import random
import sys
import time
from contextlib import ExitStack

import redis

import ipckit
from ipckit.testing.servers import redis_server

from . import checker, harness
from .harness import until

STREAM = "kills"


def entry_of(message):
    return message._parcel.token.id.decode()


def part(argv):
    harness.part(argv, entry_of)


def run(role, kills, messages, seed, directory):
    chance = random.Random(seed)
    report = harness.Report()
    with ExitStack() as stack:
        server = stack.enter_context(redis_server(private=True, appendonly=True, appendfsync="always"))
        url = server.address(f"/0/{STREAM}", fsync="always", claim="20s" if role == "server" else "5s", dedup="1h")
        parties = harness.Parties(__spec__.name, url, directory, chance)
        stack.callback(parties.close)
        for kind, me in (("one", 1), ("many", 2), ("receiver", 1), ("receiver", 2)):
            parties.start(kind, me)
        until(parties.at_work, "everybody at work", report.faults)
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
            until(lambda pace=pace: harness.acknowledged(directory) >= pace, f"{pace} acknowledgements", report.faults)
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
        books = harness.read_books(directory)
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


if __name__ == "__main__":
    sys.exit(harness.main(__doc__, part, run, roles=["server", "consumer"], kills=20, messages=50_000))
