"""A lock at a broker: taken and given back with nobody else there, and handed from one to the next; beside redis-py's own lock.

redis-py's acquire is one SET and has no token; its waiters sleep 100 ms between two tries, or as told (here also 1 ms,
which is a thousand commands a second for each). Ours are woken. One process does both sides of a handover, with two threads.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time

import pytest

from ipckit import aio
from ipckit.sync import Lock

redis = pytest.importorskip("redis")

_names = itertools.count()
ALONE = "lock at a broker: acquire and release, uncontended"
HANDOVER = "lock at a broker: from a release to the next holder"


@pytest.fixture(params=["redis", "nats"])
def url(request, servers, tmp_path):
    path = {"redis": "", "nats": "/bench"}[request.param]
    return f"{servers(request.param)}{path}/{tmp_path.name}.{next(_names)}"


@pytest.mark.benchmark(group=ALONE)
def test_alone(benchmark, url):
    lock = Lock(url)

    def once():
        with lock:
            pass

    benchmark.pedantic(once, rounds=1000, warmup_rounds=50)
    lock.close()


@pytest.mark.benchmark(group=ALONE)
def test_alone_with_tasks(benchmark, url):
    with asyncio.Runner() as runner:
        lock = aio.Lock(url)

        async def many():
            for _ in range(10):
                async with lock:
                    pass

        benchmark.pedantic(lambda: runner.run(many()), rounds=100, warmup_rounds=5)
        benchmark.extra_info["each"] = "ten of them"
        runner.run(lock.close())


@pytest.mark.benchmark(group=ALONE)
def test_alone_by_redis_py(benchmark, servers):
    with redis.Redis.from_url(servers("redis")) as client:
        lock = client.lock(f"bench.{next(_names)}", timeout=10)

        def once():
            with lock:
                pass

        benchmark.pedantic(once, rounds=1000, warmup_rounds=50)


class _Handover:
    """`next`: seconds from the release by one thread to the acquire by the other, who was waiting."""

    def __init__(self, mine, theirs):
        self._mine, self._theirs = mine, theirs
        self._go, self._stop, self._done = threading.Semaphore(0), False, threading.Semaphore(0)
        self._at = 0.0
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def _wait(self):
        while True:
            self._go.acquire()
            if self._stop:
                return
            with self._theirs:
                self._at = time.perf_counter()
            self._done.release()

    def next(self):
        with self._mine:
            self._go.release()
            time.sleep(0.01)  # until it waits
            released = time.perf_counter()
        self._done.acquire()
        return self._at - released

    def close(self):
        self._stop = True
        self._go.release()
        self._thread.join()


def _measure(benchmark, mine, theirs):
    handover = _Handover(mine, theirs)
    taken = []
    # The clock of the table is the whole turn with its pause; what counts is in extra_info.
    benchmark.pedantic(lambda: taken.append(handover.next()), rounds=50, warmup_rounds=3)
    handover.close()
    taken.sort()
    benchmark.extra_info |= {"handover p50 (us)": taken[len(taken) // 2] * 1e6, "worst (us)": taken[-1] * 1e6}
    print(f"handover: p50 {taken[len(taken) // 2] * 1e6:.0f} us, worst {taken[-1] * 1e6:.0f} us")


@pytest.mark.benchmark(group=HANDOVER)
def test_handover(benchmark, url):
    mine, theirs = Lock(url), Lock(url)
    _measure(benchmark, mine, theirs)
    mine.close()
    theirs.close()


@pytest.mark.benchmark(group=HANDOVER)
@pytest.mark.parametrize("pause", [0.1, 0.001])
def test_handover_by_redis_py(benchmark, servers, pause):
    with redis.Redis.from_url(servers("redis")) as one, redis.Redis.from_url(servers("redis")) as other:
        name = f"bench.{next(_names)}"
        _measure(
            benchmark,
            one.lock(name, timeout=10, sleep=pause, thread_local=False),
            other.lock(name, timeout=10, sleep=pause, thread_local=False),
        )
