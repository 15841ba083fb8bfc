"""A message through a queue on JetStream: published, received, acknowledged; alone and in batches, beside nats-py by hand.

One thread does both sides, so that a figure is the cost of the calls and of the server, without two schedulers. By hand means
what a careful user writes with nats-py: publish, fetch(1), ack; batches by publish_async and fetch(n). Deduplication by
id is on in ours only.
"""

from __future__ import annotations

import asyncio
import itertools

import pytest

import ipckit

nats = pytest.importorskip("nats")

BODY = b"x" * 64
BATCH = 500
ONE = "nats queue: publish, receive, acknowledge one message of 64 B"
MANY = f"nats queue: publish, receive, acknowledge {BATCH} messages of 64 B"
_names = itertools.count()


@pytest.fixture
def place(servers, tmp_path):
    return servers("nats"), f"{tmp_path.name}-{next(_names)}".replace(".", "-")


@pytest.mark.benchmark(group=ONE)
def test_one_at_a_time(benchmark, place):
    url = "/".join(place)
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as work:

        def once():
            jobs.send(BODY)
            work.recv()

        benchmark.pedantic(once, rounds=2000, warmup_rounds=200)


@pytest.mark.benchmark(group=ONE)
def test_one_at_a_time_each_ack_confirmed(benchmark, place):
    url = "/".join(place)
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as work:

        def once():
            jobs.send(BODY)
            work.recv().ack()

        benchmark.pedantic(once, rounds=2000, warmup_rounds=200)


def by_hand(benchmark, place, once, **pedantic):
    """Time the coroutine function `once(jetstream, subscription, name)`."""
    url, name = place
    loop = asyncio.new_event_loop()

    async def opened():
        client = await nats.connect(url)
        js = client.jetstream()
        await js.add_stream(name=name, subjects=[name])
        return client, js, await js.pull_subscribe(name, "g")

    client, js, subscription = loop.run_until_complete(opened())
    try:
        benchmark.pedantic(lambda: loop.run_until_complete(once(js, subscription, name)), **pedantic)
    finally:
        loop.run_until_complete(client.close())
        loop.close()


@pytest.mark.benchmark(group=ONE)
def test_one_at_a_time_by_hand(benchmark, place):
    async def once(js, subscription, name):
        await js.publish(name, BODY)
        (message,) = await subscription.fetch(1)
        await message.ack()

    by_hand(benchmark, place, once, rounds=2000, warmup_rounds=200)


@pytest.mark.benchmark(group=MANY)
def test_batched(benchmark, place):
    url = "/".join(place)
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as work:

        def once():
            jobs.send_many([BODY] * BATCH)
            got = 0
            while got < BATCH:
                got += len(work.recv_many(BATCH))

        benchmark.pedantic(once, rounds=50, warmup_rounds=5)


@pytest.mark.benchmark(group=MANY)
def test_batched_by_hand(benchmark, place):
    async def once(js, subscription, name):
        await asyncio.gather(*[await js.publish_async(name, BODY) for _ in range(BATCH)])
        got = 0
        while got < BATCH:
            for message in await subscription.fetch(BATCH - got):
                await message.ack()
                got += 1

    by_hand(benchmark, place, once, rounds=50, warmup_rounds=5)
