"""A message through a queue on Redis Streams: added, read, acknowledged; one at a time and in batches, beside redis-py by hand.

One thread does both sides, so that a figure is the cost of the calls and of the server, without two schedulers. By hand means
what a careful user writes with redis-py: XADD, XREADGROUP, XACK, each waited for; batches by a pipeline without a transaction. It
has no deduplication; ours has.
"""

from __future__ import annotations

import itertools

import pytest

import ipckit

redis = pytest.importorskip("redis")

BODY = b"x" * 64
BATCH = 100
_names = itertools.count()


@pytest.fixture
def place(servers, tmp_path):
    url = servers("redis")
    name = f"{tmp_path.name}.{next(_names)}"
    yield url, name
    with redis.Redis.from_url(url) as client:
        client.delete(name)


@pytest.mark.parametrize("ack", ["auto", "manual"])
@pytest.mark.benchmark(group="redis queue: add, read, acknowledge one message of 64 B")
def test_one_at_a_time(benchmark, place, ack):
    url = f"{place[0]}/0/{place[1]}"
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack=ack) as work:

        def once():
            jobs.send(BODY)
            message = work.recv()
            if ack == "manual":
                message.ack()

        benchmark.pedantic(once, rounds=2000, warmup_rounds=100)


@pytest.mark.benchmark(group="redis queue: add, read, acknowledge one message of 64 B")
def test_one_at_a_time_by_hand(benchmark, place):
    url, name = place
    with redis.Redis.from_url(url) as client:
        client.xgroup_create(name, "g", mkstream=True)

        def once():
            client.xadd(name, {"body": BODY, "id": "0" * 32})
            ((_, ((number, _),)),) = client.xreadgroup("g", "c", {name: ">"}, count=1, block=1000)
            client.xack(name, "g", number)

        benchmark.pedantic(once, rounds=2000, warmup_rounds=100)


@pytest.mark.benchmark(group=f"redis queue: add, read, acknowledge {BATCH} messages of 64 B")
def test_batched(benchmark, place):
    url = f"{place[0]}/0/{place[1]}?prefetch={BATCH}"
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as work:

        def once():
            jobs.send_many([BODY] * BATCH)
            got = 0
            while got < BATCH:
                got += len(work.recv_many(BATCH))

        benchmark.pedantic(once, rounds=200, warmup_rounds=10)


@pytest.mark.benchmark(group=f"redis queue: add, read, acknowledge {BATCH} messages of 64 B")
def test_batched_by_hand(benchmark, place):
    url, name = place
    with redis.Redis.from_url(url) as client:
        client.xgroup_create(name, "g", mkstream=True)

        def once():
            pipeline = client.pipeline(transaction=False)
            for _ in range(BATCH):
                pipeline.xadd(name, {"body": BODY, "id": "0" * 32})
            pipeline.execute()
            ((_, entries),) = client.xreadgroup("g", "c", {name: ">"}, count=BATCH, block=1000)
            client.xack(name, "g", *(number for number, _ in entries))

        benchmark.pedantic(once, rounds=200, warmup_rounds=10)
