"""What a message costs the publisher of `shm://` topics, by the number of subscribers; what a slow one costs the others.

The cost is the publishing thread's own processor time: with more subscribers than cores, wall-clock time would tell what
the subscribers cost. `burst` publishes without a pause, so that subscribers sleep seldom; `paced` lets everybody fall asleep
between two messages, so that each is woken for each message: a system call a subscriber, on any transport.

    pytest benchmarks/test_shm_pubsub.py --benchmark-only
    python benchmarks/test_shm_pubsub.py --count 1000000        the slow subscriber, in full
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import pytest

import ipckit

_SPAWN = multiprocessing.get_context("spawn")


def subscribe(url: str, pause: float, report: Connection) -> None:
    """Receive until the publisher closes, resting `pause` seconds after each hundred; then report the counts and the seconds."""
    with ipckit.subscriber(url, timeout=30) as subscriber:
        begun, missing, following = None, 0, 0
        for message in subscriber:
            begun = begun or time.monotonic()
            number = int.from_bytes(message.value[:8], "little")
            assert number == following + message.gap
            following = number + 1
            missing += message.gap
            if pause and following % 100 == 0:
                time.sleep(pause)
        stats = subscriber.stats()
        report.send((stats["received"], stats["dropped"], time.monotonic() - (begun or time.monotonic())))


@contextmanager
def audience(url: str, on_full: Any, pauses: list[float]) -> Iterator[tuple[ipckit.Publisher[bytes], list[Connection]]]:
    """A publisher here, and a subscriber of its own process for each pause."""
    with ipckit.publisher(url, on_full=on_full) as publisher:
        reports, processes = [], []
        for pause in pauses:
            ours, theirs = _SPAWN.Pipe(duplex=False)
            process = _SPAWN.Process(target=subscribe, args=(url, pause, theirs))
            process.start()
            theirs.close()
            reports.append(ours)
            processes.append(process)
        publisher.wait_for_subscribers(len(pauses), 60)
        yield publisher, reports
    for report, process in zip(reports, processes, strict=True):
        process.join(60)
        report.close()
        assert process.exitcode == 0


@pytest.mark.benchmark(timer=time.thread_time)
@pytest.mark.parametrize("subscribers", [1, 4, 16])
@pytest.mark.parametrize("size", [64, 16384])
@pytest.mark.parametrize("pace", ["burst", "paced"])
def test_publisher_cost(benchmark, tmp_path, monkeypatch, subscribers, size, pace):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))
    benchmark.group = f"shm: publisher's processor time, {size} bytes, {pace}"
    rest = bytes(size - 8)
    number = 0
    with audience("shm://bench", "block", [0.0] * subscribers) as (publisher, _):

        def drained() -> None:
            while publisher.stats()["queued"]:
                time.sleep(0.001)
            time.sleep(0.005 if pace == "paced" else 0)

        def publish() -> None:
            nonlocal number
            publisher.publish(number.to_bytes(8, "little") + rest, "prices.eu")
            number += 1

        def burst() -> None:
            for _ in range(500):
                publish()

        benchmark.extra_info["messages a round"] = 500 if pace == "burst" else 1
        if pace == "burst":
            benchmark.pedantic(burst, setup=drained, rounds=20, warmup_rounds=2)
        else:
            benchmark.pedantic(publish, setup=drained, rounds=100, warmup_rounds=5)


def resident() -> int:
    """This process's resident memory, bytes, shared pages included."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def slow_subscriber(count: int, pauses: list[float]) -> dict[str, Any]:
    """Publish `count` messages to subscribers that rest so long; what became of memory, rate and counts."""
    with audience("shm://slow", "drop_old", pauses) as (publisher, reports):
        rest = bytes(56)
        before = peak = 0
        for number in range(count):
            publisher.publish(number.to_bytes(8, "little") + rest, "prices.eu")
            if number == min(10_000, count // 10):
                before = resident()
            if number % 10_000 == 0:
                peak = max(peak, resident())
        peak = max(peak, resident())
        dropped = publisher.stats()["dropped"]
        publisher.close()
        counts = [report.recv() for report in reports]
    for received, missed, _ in counts:
        assert received + missed == count, "the counts are not exact"
    assert sum(missed for _, missed, _ in counts) == dropped
    return {
        "growth": peak / before - 1,
        "rates": [received / seconds for received, _, seconds in counts],
        "dropped": [missed for _, missed, _ in counts],
    }


def test_slow_subscriber(tmp_path, monkeypatch):
    """Exact at any speed. The figures are printed, and judged by nobody here."""
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))
    print(slow_subscriber(20_000, [0.0, 0.05]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory(prefix="ipckit-bench-") as runtime_dir:
        os.environ["IPCKIT_RUNTIME_DIR"] = runtime_dir
        for pauses in ([0.0], [0.0, 0.05]):
            found = slow_subscriber(count, pauses)
            for pause, rate, dropped in zip(pauses, found["rates"], found["dropped"], strict=True):
                print(f"{'slow' if pause else 'fast'}: {rate:,.0f} messages/s received, {dropped:,} dropped")
            print(
                f"{len(pauses)} subscribers: resident memory of the publisher grew by {found['growth']:.1%}; counts exact"
            )


if __name__ == "__main__":
    main()
