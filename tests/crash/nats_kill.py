"""Kill a NATS server, the leader of a cluster, or the consumers of a queue, under load, and account for every message.

    python tests/crash/nats_kill.py --role server --kills 20 --messages 50000 --seed 1
    python tests/crash/nats_kill.py --role consumer --kills 200 --messages 20000
    python tests/crash/nats_kill.py --role leader --kills 5 --messages 5000

The senders, the journals and the verdict are those of `redis_kill` and `checker`. The server syncs before it acknowledges, and
the senders ask for it (fsync=always). At the end everything is drained, the journals are judged, and the server's
`num_ack_pending` is compared with what the last receiver holds.
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
from pathlib import Path

import nats

import ipckit
from ipckit import errors
from ipckit.testing.servers import nats_cluster, nats_server


def _load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


checker, base = _load("checker"), _load("redis_kill")
STREAM = "kills"
ACK_WAIT = 5  # seconds; what a killed consumer had is somebody else's then


def sequence_of(message):
    """In the stream: two of them for one message are a duplicate that the server has stored."""
    return message._parcel.token.message.reply.split(".")[5]


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
                rows.append(("got", sender, number, sequence_of(message)))
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
    signal.alarm(900)  # a harness that is gone ends us too
    if kind == "one":
        base.send_one_by_one(url, Path(directory), int(me), chance)
    elif kind == "many":
        asyncio.run(base.send_many_at_once(url, Path(directory), int(me), chance))
    else:
        receive(url, Path(directory), int(me), chance)


class Parties(base.Parties):
    def start(self, kind, me):
        words = [sys.executable, __file__, "--part", kind, self.url, str(self.directory), str(me)]
        self.running[kind, me] = subprocess.Popen([*words, str(self.chance.randrange(1 << 30))])


def ask(servers, question):
    """What `question(jetstream)` answers; while nobody can answer, None."""

    async def asked():
        client = await nats.connect([server.url for server in servers], connect_timeout=5)
        try:
            return await question(client.jetstream(timeout=5))
        finally:
            await client.close()

    try:
        return asyncio.run(asked())
    except (OSError, nats.errors.Error):
        return None


def leader_of(servers):
    """The server that leads the stream, once the others have all that it has."""

    async def cluster(js):
        return (await js.stream_info(STREAM)).cluster

    found = ask(servers, cluster)
    if found is None or found.leader is None or not all(peer.current for peer in found.replicas):
        return None
    return servers[int(found.leader.removeprefix("n"))]


def run(role, kills, messages, seed, directory):
    chance = random.Random(seed)
    report = base.Report()
    with ExitStack() as stack:
        if role == "leader":
            servers = stack.enter_context(nats_cluster(3))
            options = {"replicas": "3"}
        else:
            servers = (stack.enter_context(nats_server(private=True, sync_always=True)),)
            options = {"fsync": "always", "monitor": servers[0].monitor}
        query = "&".join(
            f"{name}={value}" for name, value in {**options, "ack_wait": f"{ACK_WAIT}s", "dedup": "1h"}.items()
        )
        url = f"nats://{','.join(server.url.removeprefix('nats://') for server in servers)}/{STREAM}?{query}"
        parties = Parties(url, directory, chance)
        stack.callback(parties.close)
        for kind, me in (("one", 1), ("many", 2), ("receiver", 1), ("receiver", 2)):
            parties.start(kind, me)
        base.until(lambda: len(base.all_busy(directory)) == 4, "everybody at work", report.faults)
        for kill in range(kills):
            time.sleep(chance.uniform(0.02, 0.6))
            if role == "server":
                servers[0].kill()
                time.sleep(chance.choice([0, 0, 0.3]))
                servers[0].start()
            elif role == "leader":
                found = []
                base.until(lambda found=found: found.append(leader_of(servers)) or found[-1], "a leader", report.faults)
                found[-1].kill()
            else:
                me = chance.choice([1, 2])
                parties.kill("receiver", me)
                parties.start("receiver", me)
            report.kills = kill + 1
            pace = messages * report.kills // kills  # kills spread over the load
            base.until(
                lambda pace=pace: base.acknowledged(directory) >= pace, f"{pace} acknowledgements", report.faults
            )
            if role == "leader":
                found[-1].start()
        (directory / "stop").touch()
        report.faults += parties.wait("one", "many")

        async def consumer(js):
            return await js.consumer_info(STREAM, "default")

        def drained():
            info = ask(servers, consumer)
            return info is not None and not info.num_pending and not info.num_ack_pending

        base.until(drained, "everything drained", report.faults)
        (directory / "done").touch()
        report.faults += parties.wait("receiver")
        books = base.read_books(directory)
        report.verdict = checker.judge(books)
        report.faults += report.verdict.faults
        report.faults += pending_faults(url, lambda: ask(servers, consumer))
    return report


def pending_faults(url, consumer):
    """The server's unacknowledged messages must be exactly as many as a receiver holds."""
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as held:
        jobs.send_many([b"%d" % number for number in range(8)])
        messages = [held.recv(timeout=10) for _ in range(8)]
        for message in messages[::2]:
            message.ack()
        info = consumer()
        found = None if info is None else (info.num_pending, info.num_ack_pending)
    return [] if found == (0, 4) else [f"(pending, unacknowledged) is {found}, and the model says (0, 4)"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--role", choices=["server", "consumer", "leader"], default="server")
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
