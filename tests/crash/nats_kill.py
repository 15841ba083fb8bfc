"""Kill a NATS server, the leader of a cluster, or the consumers of a queue, under load, and account for every message.

    python -m tests.crash.nats_kill --role server --kills 20 --messages 50000 --seed 1
    python -m tests.crash.nats_kill --role consumer --kills 200 --messages 20000
    python -m tests.crash.nats_kill --role leader --kills 5 --messages 5000

The senders, the journals and the verdict are those of `harness` and `checker`. The server syncs before it acknowledges, and
the senders ask for it (fsync=always). At the end everything is drained, the journals are judged, and the server's
`num_ack_pending` is compared with what the last receiver holds.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from contextlib import ExitStack

import nats

import ipckit
from ipckit.testing.servers import nats_cluster, nats_server

from . import checker, harness
from .harness import until

STREAM = "kills"
ACK_WAIT = 5  # seconds; what a killed consumer had is somebody else's then


def sequence_of(message):
    """In the stream: two of them for one message are a duplicate that the server has stored."""
    return message._parcel.token.message.reply.split(".")[5]


def part(argv):
    harness.part(argv, sequence_of)


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
    report = harness.Report()
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
        parties = harness.Parties(__spec__.name, url, directory, chance)
        stack.callback(parties.close)
        for kind, me in (("one", 1), ("many", 2), ("receiver", 1), ("receiver", 2)):
            parties.start(kind, me)
        until(parties.at_work, "everybody at work", report.faults)
        for kill in range(kills):
            time.sleep(chance.uniform(0.02, 0.6))
            if role == "server":
                servers[0].kill()
                time.sleep(chance.choice([0, 0, 0.3]))
                servers[0].start()
            elif role == "leader":
                found = []
                until(lambda found=found: found.append(leader_of(servers)) or found[-1], "a leader", report.faults)
                found[-1].kill()
            else:
                me = chance.choice([1, 2])
                parties.kill("receiver", me)
                parties.start("receiver", me)
            report.kills = kill + 1
            pace = messages * report.kills // kills  # kills spread over the load
            until(lambda pace=pace: harness.acknowledged(directory) >= pace, f"{pace} acknowledgements", report.faults)
            if role == "leader":
                found[-1].start()
        (directory / "stop").touch()
        report.faults += parties.wait("one", "many")

        async def consumer(js):
            return await js.consumer_info(STREAM, "default")

        def drained():
            info = ask(servers, consumer)
            return info is not None and not info.num_pending and not info.num_ack_pending

        until(drained, "everything drained", report.faults)
        (directory / "done").touch()
        report.faults += parties.wait("receiver")
        books = harness.read_books(directory)
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


if __name__ == "__main__":
    sys.exit(harness.main(__doc__, part, run, roles=["server", "consumer", "leader"], kills=20, messages=50_000))
