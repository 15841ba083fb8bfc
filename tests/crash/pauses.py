"""Stop everybody in turn with SIGSTOP, for a while each: nothing may be lost, and nobody be declared dead.

    python -m tests.crash.pauses --scheme redis --rounds 2 --longest 10 --seed 1

A sender and a receiver, a publisher and a subscriber (whichever patterns the transport has) and the broker's server, each a
process, work without a break; in each round each of them stands still once, for 0.1 s or more. Then everything is drained, and

    the queue's journals are judged by `checker`, and nothing came twice, for nobody died
    the subscriber got everything that was published, in order, without a gap
    `stats()` of all of them count what was sent, and no reconnection, redelivery, duplicate or drop

There is no word about time in it: a pause of a second may take ten on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import trustme

import ipckit
from ipckit import errors
from ipckit.testing.conformance import free_port
from ipckit.testing.servers import nats_server, redis_server

from . import checker, harness
from .harness import until

SCHEMES = ["shm", "unix", "tcp", "tls", "zmq+ipc", "zmq+tcp", "mq", "fifo", "grpc", "redis", "nats"]
SERVERS = {"redis": redis_server, "nats": nats_server}
CREWS = {"queue": ("receiver", "sender"), "pubsub": ("publisher", "subscriber")}
END = b"the end"
#: What must stay at zero where it is counted.
QUIET = ("reconnects", "redelivered", "duplicates", "deduplicated", "dropped", "unacknowledged", "unconfirmed")


def patterns(scheme):
    """Those of the two that the transport has."""
    return [name for name in ("queue", "pubsub") if name in ipckit.capabilities(f"{scheme}://").patterns]


def place(scheme, directory, server):
    name = f"pauses-{secrets.token_hex(4)}"
    if scheme in ("redis", "nats"):
        return server.address(f"/0/{name}" if scheme == "redis" else f"/{name}")
    if scheme == "tls":
        return f"tls://127.0.0.1:{free_port()}?ca={directory}/ca.pem&cert={directory}/server.pem"
    return f"{scheme}://127.0.0.1:{free_port()}" if scheme in ("tcp", "zmq+tcp", "grpc") else f"{scheme}://{name}"


def certificate(directory):
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    authority.cert_pem.write_to_path(directory / "ca.pem")


# -- the parties: each writes what it counted, and `stats()`, at its end -------------------------------------------------


def send(url, directory, chance):
    journal, number, stop = checker.Journal(directory / f"sender-1-{os.getpid()}"), 0, directory / "stop"
    with ipckit.sender(url, timeout=harness.PATIENCE) as jobs:
        while not stop.exists():
            for number in range(number + 1, number + chance.choice([2, 4, 32])):  # noqa: B020 - it goes on
                journal.note("try", 1, number)
                jobs.send(checker.body_of(1, number), timeout=harness.PATIENCE)
                journal.note("ack", 1, number)
            time.sleep(0.004)  # a load, and not a flood: the journals are to be read
        jobs.drain(harness.PATIENCE)
        return number, jobs.stats()


def receive(url, directory, chance):
    journal, count, done = checker.Journal(directory / f"receiver-1-{os.getpid()}"), 0, directory / "done"
    with ipckit.receiver(url, timeout=harness.PATIENCE) as jobs:
        journal.note("open")
        while not done.exists():
            try:
                messages = jobs.recv_many(chance.choice([1, 4, 32]), timeout=0.1)
            except errors.Timeout:
                continue
            count += len(messages)
            bodies = [checker.read_body(message.value) or (-1, -1) for message in messages]
            journal.note_many([("got", *body, m.id or "-") for body, m in zip(bodies, messages, strict=True)])
            journal.note_many([("settle", *body) for body in bodies])
        return count, jobs.stats()


def publish(url, directory, chance):
    journal, number, stop = checker.Journal(directory / f"publisher-{os.getpid()}"), 0, directory / "stop"
    with ipckit.publisher(url, timeout=harness.PATIENCE) as topics:
        journal.note("open")
        topics.wait_for_subscribers(1, harness.PATIENCE)
        while not stop.exists():
            for _ in range(chance.choice([1, 4, 32])):
                topics.publish(b"%d" % number, f"load.{number % 3}", harness.PATIENCE)
                number += 1
            time.sleep(0.004)
        topics.publish(END, "end", harness.PATIENCE)
        return number + 1, topics.stats()


def subscribe(url, directory, chance):
    journal, count = checker.Journal(directory / f"subscriber-{os.getpid()}"), 0
    with ipckit.subscriber(url, topics=["load.*", "end"], timeout=harness.PATIENCE) as topics:
        journal.note("open")
        while True:
            message = topics.recv(harness.PATIENCE)
            due = (b"%d" % count, f"load.{count % 3}")
            if (message.value, message.topic) not in (due, (END, "end")) or message.gap:
                raise SystemExit(f"{count} was due, and came: {message!r} after a gap of {message.gap}")
            count += 1
            if message.value == END:
                return count, topics.stats()


KINDS = {"sender": send, "receiver": receive, "publisher": publish, "subscriber": subscribe}


def part(argv):
    kind, url, directory, _, seed = argv
    count, stats = KINDS[kind](url, Path(directory), random.Random(int(seed)))
    (Path(directory) / f"stats.{kind}").write_text(json.dumps({"count": count, **stats}))


# -- the watch ----------------------------------------------------------------------------------------------------------


def pause(together, seconds, parties, server):
    def tell(stop):
        for who in together:
            if who == "server":
                (server.pause if stop else server.resume)()
            else:
                parties[who].signal(who, 1, signal.SIGSTOP if stop else signal.SIGCONT)

    tell(True)
    time.sleep(seconds)
    tell(False)


def run(scheme, rounds, longest, seed, directory):
    chance = random.Random(seed)
    report = harness.Report()
    faults = report.faults
    with ExitStack() as stack:
        runtime_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="ipckit-"))  # short, for a socket's path
        stack.enter_context(patch.dict(os.environ, IPCKIT_RUNTIME_DIR=runtime_dir))
        server = stack.enter_context(SERVERS[scheme](private=True)) if scheme in SERVERS else None
        if scheme == "tls":
            certificate(directory)
        parties = {}
        for pattern in patterns(scheme):
            crew = harness.Parties(__spec__.name, place(scheme, directory, server), directory, chance)
            stack.callback(crew.close)
            for kind in CREWS[pattern]:
                parties[kind] = crew
                crew.start(kind, 1)
        for crew in parties.values():
            until(crew.at_work, "everybody at work", faults)
        for _ in range(rounds):
            # One of the queue and one of the topics at a time: they know nothing of each other.
            crews = [chance.sample(crew, 2) for pattern, crew in CREWS.items() if pattern in patterns(scheme)]
            turns = [*zip(*crews, strict=True), *([("server",)] if server else [])]
            for together in chance.sample(turns, len(turns)):
                time.sleep(chance.uniform(0.05, 0.3))
                pause(together, chance.uniform(0.1, longest), parties, server)
                report.kills += len(together)
        (directory / "stop").touch()
        for kind in ("sender", "publisher", "subscriber"):
            faults += parties[kind].wait(kind) if kind in parties else []
        if "queue" in patterns(scheme):

            def all_there():
                got = sum(path.read_text().count("got") for path in directory.glob("receiver-*"))
                return got >= harness.acknowledged(directory)

            until(all_there, "everything delivered", faults)
            (directory / "done").touch()
            faults += parties["receiver"].wait("receiver")
            report.verdict = checker.judge(harness.read_books(directory))
            faults += report.verdict.faults
            if report.verdict.redelivered:
                faults.append(f"nobody died, and {report.verdict.redelivered} messages came again")
        faults += counted(directory, parties)
    return report


def counted(directory, parties):
    """What `stats()` must say."""
    faults = []
    told = {path.suffix[1:]: json.loads(path.read_text()) for path in directory.glob("stats.*")}
    for kind, stats in told.items():
        verb = "sent" if kind in ("sender", "publisher") else "received"
        if stats[verb] != stats["count"]:
            faults.append(f"{kind}: stats() says {verb} {stats[verb]}, and it was {stats['count']}")
        faults += [f"{kind}: {name} is {stats[name]}" for name in QUIET if stats.get(name)]
    for one, other in (("sender", "receiver"), ("publisher", "subscriber")):
        if {one, other} <= set(told) and told[one]["count"] != told[other]["count"]:
            faults.append(f"{one}: {told[one]['count']}, {other}: {told[other]['count']}")
    missing = set(parties) - set(told)
    return faults + [f"{kind} has not come to its end" for kind in missing]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--longest", type=float, default=10.0, help="seconds of the longest pause")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        signal.alarm(harness.LIFE)
        part(options.part)
        return 0
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        report = run(options.scheme, options.rounds, options.longest, options.seed, Path(directory))
    print(str(report).replace("kills", "pauses"))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
