"""Calls through brokers beside what people call with: a unary call of 64 bytes, and a stream of a server's.

The server is a process of its own, as is the broker; the caller is this one. NATS: nats-py's request and a subscription that
answers. Redis: two streams and redis-py, which is what a call over Redis by hand comes to.
"""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import ipckit
import ipckit.aio

BODY = b"x" * 64
UNARY = "{}: a unary call, 64 B"
STREAM = "{}: a stream of 1000 items, 64 B each"
CALLS = {"rounds": 2000, "warmup_rounds": 200}
_names = itertools.count()

OURS = """
import sys
from collections.abc import Iterator
import ipckit

class Echo(ipckit.Service):
    def echo(self, data: bytes) -> bytes:
        return data

    def many(self, data: bytes, n: int) -> Iterator[bytes]:
        for _ in range(n):
            yield data

with ipckit.Server(sys.argv[1], Echo()) as server:
    print("ready", flush=True)
    server.wait()
"""
NATS = """
import asyncio, sys
import nats

async def main():
    client = await nats.connect(sys.argv[1].rpartition("/")[0])
    async def answer(message):
        await message.respond(message.data)
    await client.subscribe(sys.argv[1].rpartition("/")[2], cb=answer)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
REDIS = """
import sys
import redis

url, _, name = sys.argv[1].rpartition("/")
client = redis.Redis.from_url(url)
client.xgroup_create(f"{name}.calls", "servers", "0", mkstream=True)
print("ready", flush=True)
while True:
    for _, calls in client.xreadgroup("servers", "me", {f"{name}.calls": ">"}, block=0):
        for number, call in calls:
            pipe = client.pipeline(transaction=False)
            pipe.xadd(call[b"to"], {"d": call[b"d"]})
            pipe.xack(f"{name}.calls", "servers", number)
            pipe.xdel(f"{name}.calls", number)
            pipe.execute()
"""


class Echo(ipckit.Service):
    def echo(self, data: bytes) -> bytes:
        raise NotImplementedError

    def many(self, data: bytes, n: int) -> Iterator[bytes]:
        raise NotImplementedError


@contextmanager
def serving(program: str, url: str) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", program, url], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.kill()


@pytest.fixture(params=["nats", "redis"])
def place(request, servers):
    """The name of the broker, and an address there that nobody else uses."""
    base = servers(request.param).rstrip("/") + ("/0" if request.param == "redis" else "")
    return request.param, f"{base}/bench-{next(_names)}"


def test_unary(benchmark, place):
    benchmark.group = UNARY.format(place[0])
    with serving(OURS, place[1]), ipckit.client(place[1], Echo) as echo:
        benchmark.pedantic(echo.echo, (BODY,), **CALLS)


def test_unary_aio(benchmark, place):
    benchmark.group = UNARY.format(place[0])
    with asyncio.Runner() as runner, serving(OURS, place[1]):
        echo = runner.run(_client(place[1]))
        benchmark.pedantic(lambda: runner.run(_call(echo)), **CALLS)
        runner.run(echo.close())


async def _client(url):
    return await ipckit.aio.client(url, Echo)


async def _call(echo):
    assert await echo.echo(BODY) == BODY


def test_stream(benchmark, place):
    benchmark.group = STREAM.format(place[0])
    with serving(OURS, place[1]), ipckit.client(place[1], Echo) as echo:
        benchmark.pedantic(lambda: sum(1 for _ in echo.many(BODY, 1000)), rounds=20, warmup_rounds=2)


def test_unary_by_nats_py(benchmark, servers):
    nats = pytest.importorskip("nats")
    url = f"{servers('nats').rstrip('/')}/bench-{next(_names)}"
    benchmark.group = UNARY.format("nats")
    subject = url.rpartition("/")[2]

    async def call(client):
        assert (await client.request(subject, BODY)).data == BODY

    with asyncio.Runner() as runner, serving(NATS, url):
        client = runner.run(nats.connect(url.rpartition("/")[0]))
        benchmark.pedantic(lambda: runner.run(call(client)), **CALLS)
        runner.run(client.close())


def test_unary_by_redis_py(benchmark, servers):
    redis = pytest.importorskip("redis")
    url = f"{servers('redis').rstrip('/')}/0/bench-{next(_names)}"
    benchmark.group = UNARY.format("redis")
    base, _, name = url.rpartition("/")
    last = [b"0-0"]
    with serving(REDIS, url), redis.Redis.from_url(base) as client:

        def call():
            client.xadd(f"{name}.calls", {"to": f"{name}.mine", "d": BODY})
            ((_, answers),) = client.xread({f"{name}.mine": last[0]}, block=0)
            last[0] = answers[-1][0]

        benchmark.pedantic(call, **CALLS)
        client.delete(f"{name}.calls", f"{name}.mine")
