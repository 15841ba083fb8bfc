"""A message through a queue that the kernel keeps: sent, received, acknowledged; beside the bare calls.

One thread does both sides, so that a figure is the cost of the calls, without two schedulers. The bare calls keep no message that
a killed receiver had, and have no ids, headers or large messages; ours have.
"""

from __future__ import annotations

import itertools
import os

import pytest

import ipckit

BODY = b"x" * 64
_names = itertools.count()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.mark.parametrize("scheme", ["mq", "fifo"])
@pytest.mark.parametrize("ack", ["auto", "manual"])
@pytest.mark.benchmark(group="kernel queue: send, receive, acknowledge one message of 64 B")
def test_one_at_a_time(benchmark, scheme, ack):
    if scheme == "mq":
        pytest.importorskip("posix_ipc")
    with ipckit.sender(f"{scheme}://bench") as jobs, ipckit.receiver(f"{scheme}://bench", ack=ack) as work:

        def once():
            jobs.send(BODY)
            message = work.recv()
            if ack == "manual":
                message.ack()

        benchmark.pedantic(once, rounds=5000, warmup_rounds=100)


@pytest.mark.parametrize("scheme", ["mq", "fifo"])
@pytest.mark.benchmark(group="kernel queue: send, receive, acknowledge 8 messages of 64 B")
def test_batched(benchmark, scheme):
    if scheme == "mq":
        pytest.importorskip("posix_ipc")
    with ipckit.sender(f"{scheme}://bench") as jobs, ipckit.receiver(f"{scheme}://bench") as work:

        def once():
            jobs.send_many([BODY] * 8)
            assert len(work.recv_many(8)) == 8

        benchmark.pedantic(once, rounds=2000, warmup_rounds=50)


@pytest.mark.benchmark(group="kernel queue: send, receive, acknowledge one message of 64 B")
def test_bare_posix_ipc(benchmark):
    posix_ipc = pytest.importorskip("posix_ipc")
    name = f"/ipckit.bench.{os.getpid()}.{next(_names)}"
    queue = posix_ipc.MessageQueue(name, posix_ipc.O_CREX, mode=0o600)
    posix_ipc.unlink_message_queue(name)

    def once():
        queue.send(BODY)
        queue.receive()

    try:
        benchmark.pedantic(once, rounds=5000, warmup_rounds=100)
    finally:
        queue.close()


@pytest.mark.benchmark(group="kernel queue: send, receive, acknowledge one message of 64 B")
def test_bare_fifo(benchmark, tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    fd = os.open(path, os.O_RDWR)

    def once():
        os.write(fd, BODY)
        os.read(fd, 4096)

    try:
        benchmark.pedantic(once, rounds=5000, warmup_rounds=100)
    finally:
        os.close(fd)
