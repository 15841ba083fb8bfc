"""A message through a zmq queue and a zmq topic, alone and in batches, beside pyzmq by hand in the same run.

One thread does both sides, so that a figure is the cost of the calls and of libzmq's thread, without two schedulers. Three
contenders: the default (over links: acknowledged, handed out again), `native=on` (PUSH/PULL, PUB/SUB), and raw sockets of these
kinds, whose topic is the beginning of the one frame, as in ours. The raw ones have no high-water mark: a PUB would drop there.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest

import ipckit

zmq = pytest.importorskip("zmq")

BODY = b"x" * 64
BATCH = 200  # less than what every contender takes ahead: one thread does both sides
TOPIC = "eu.paris"
_names = itertools.count()

KINDS = ["zmq+tcp", "zmq+ipc"]
WAYS = ["links", "native", "raw"]


@contextmanager
def raw_pair(address, gives, takes, fed_by_listener):
    context = zmq.Context()
    giver, taker = context.socket(gives), context.socket(takes)
    try:
        for each in (giver, taker):
            each.set_hwm(0)
        listening, connecting = (giver, taker) if fed_by_listener else (taker, giver)
        listening.bind(address)
        connecting.connect(listening.getsockopt_string(zmq.LAST_ENDPOINT))
        if takes == zmq.SUB:
            taker.setsockopt(zmq.SUBSCRIBE, TOPIC.encode())
            giver.recv()  # an XPUB hears of it
        yield giver, taker
    finally:
        giver.close(linger=0)
        taker.close(linger=0)
        context.term()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))

    def make(kind, way):
        if way == "raw":
            return "tcp://127.0.0.1:*" if kind == "zmq+tcp" else f"ipc://{tmp_path}/{next(_names)}"
        where = "127.0.0.1:0" if kind == "zmq+tcp" else f"bench{next(_names)}"
        return f"{kind}://{where}" + ("?native=on" if way == "native" else "")

    return make


@contextmanager
def queue(address, way):
    """`send one`, `receive one`, `send these`, `receive so many`."""
    if way == "raw":
        with raw_pair(address, zmq.PUSH, zmq.PULL, False) as (push, pull):
            yield by_hand(push, pull, b"")
    else:
        with ipckit.receiver(address) as work, ipckit.sender(work.url, timeout=10) as jobs:
            yield jobs.send, work.recv, jobs.send_many, work.recv_many


@contextmanager
def topics(address, way):
    if way == "raw":
        with raw_pair(address, zmq.XPUB, zmq.SUB, True) as (pub, sub):
            yield by_hand(pub, sub, TOPIC.encode() + b"\0")
    else:
        with ipckit.publisher(address) as pub, ipckit.subscriber(pub.url, topics=[TOPIC], timeout=10) as sub:
            pub.wait_for_subscribers(1, 10)
            yield (
                lambda body: pub.publish(body, TOPIC),
                sub.recv,
                lambda all: pub.publish_many(all, TOPIC),
                sub.recv_many,
            )


def by_hand(giver, taker, head):
    def give_many(bodies):
        for body in bodies:
            giver.send(head + body)

    return lambda body: giver.send(head + body), taker.recv, give_many, lambda count: [taker.recv()]


CONTENDERS = [(kind, pattern, way) for kind in KINDS for pattern in ("queue", "topics") for way in WAYS]


@pytest.mark.parametrize(("kind", "pattern", "way"), CONTENDERS)
def test_one_at_a_time(benchmark, place, kind, pattern, way):
    benchmark.group = f"{kind} {pattern}: one message of 64 B"
    with {"queue": queue, "topics": topics}[pattern](place(kind, way), way) as (give, take, _, _):

        def once():
            give(BODY)
            take()

        benchmark.pedantic(once, rounds=3000, warmup_rounds=300)


@pytest.mark.parametrize(("kind", "pattern", "way"), CONTENDERS)
def test_batched(benchmark, place, kind, pattern, way):
    benchmark.group = f"{kind} {pattern}: {BATCH} messages of 64 B"
    with {"queue": queue, "topics": topics}[pattern](place(kind, way), way) as (_, _, give_many, take_many):

        def once():
            give_many([BODY] * BATCH)
            got = 0
            while got < BATCH:
                got += len(take_many(BATCH))

        benchmark.pedantic(once, rounds=100, warmup_rounds=10)
