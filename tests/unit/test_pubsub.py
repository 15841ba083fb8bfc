"""Publish/subscribe, what its contract does not ask: wrong arguments are told at once, and who waits holds nobody up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest

import ipckit
from ipckit import aio, errors

HANG = 20


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize("retain", [-1, "1", 1.5, None])
@pytest.mark.parametrize("url", ["inproc://t", "shm://t", "udp://127.0.0.1:0"])
def test_retain_is_a_number_of_messages(url, retain):
    with pytest.raises(errors.BadOption, match="retain"):
        ipckit.publisher(url, retain=retain)


@pytest.mark.parametrize("group", ["", "two words", "a*", "line\n", 5, b"metrics", "x" * 101])
@pytest.mark.parametrize("url", ["inproc://t", "shm://t", "nats://127.0.0.1:1/t", "redis://127.0.0.1:1/0/t"])
def test_a_bad_group_is_told_before_anything_is_opened(url, group):
    with pytest.raises(errors.BadOption, match="no name of a group"):
        ipckit.subscriber(url, group=group, timeout=0)


@pytest.mark.parametrize("topics", [[5], [None], [b"eu"], ["eu", ["us"]], ["x" * 101], ["x."], [""]])
def test_patterns_that_are_none(topics):
    with pytest.raises(errors.BadOption, match="is no pattern"):
        ipckit.subscriber("inproc://t", topics=topics, timeout=0)


@pytest.mark.parametrize("topic", [5, None, b"eu", ["eu"], "x" * 101, "x.".ljust(202, "x")])
def test_topics_that_are_none(topic):
    with ipckit.publisher("inproc://t") as publisher, pytest.raises(errors.BadOption, match="is no topic"):
        publisher.publish(b"x", topic)


@pytest.mark.parametrize("url", ["inproc://t", "unix://t", "shm://t", "udp://127.0.0.1:0"])
def test_who_waits_for_subscribers_holds_no_other_thread_up(url):
    with ipckit.publisher(url) as publisher, ipckit.subscriber(publisher.url, timeout=HANG) as first:
        ended = threading.Event()

        def wait() -> None:
            publisher.wait_for_subscribers(2, HANG)
            ended.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        try:
            publisher.wait_for_subscribers(1, HANG)
            for _ in range(20):
                publisher.publish(b"x", timeout=HANG)
                assert first.recv(HANG).value == b"x"
            assert not ended.is_set()
        finally:
            with ipckit.subscriber(publisher.url, timeout=HANG):
                waiting.join(HANG)
        assert ended.is_set()


@pytest.mark.parametrize("url", ["inproc://t?backlog=1", "unix://t?backlog=1", "shm://t?backlog=1"])
def test_and_is_not_held_up_by_one_that_waits_for_a_slow_subscriber(url):
    with ipckit.publisher(url) as publisher, ipckit.subscriber(publisher.url, timeout=HANG):
        publisher.wait_for_subscribers(1, HANG)

        def publish() -> None:
            with contextlib.suppress(errors.Closed):
                while True:
                    publisher.publish(bytes(1 << 16))

        publishing = threading.Thread(target=publish)
        publishing.start()
        try:
            with ipckit.subscriber(publisher.url, timeout=HANG):
                publisher.wait_for_subscribers(2, HANG)
        finally:
            publisher.close()
            publishing.join(HANG)


def test_and_is_woken_by_close():
    publisher = ipckit.publisher("inproc://t")
    closing = threading.Timer(0.1, publisher.close)
    closing.start()
    with pytest.raises(errors.Closed):
        publisher.wait_for_subscribers(1, HANG)
    closing.join()


def test_how_many_are_missing_is_told():
    with ipckit.publisher("inproc://t") as publisher, ipckit.subscriber("inproc://t"):
        publisher.wait_for_subscribers(1, HANG)
        for timeout in (0, 0.05):
            with pytest.raises(
                errors.Timeout, match="wait_for_subscribers inproc://t: 1 of 3 subscribers came in time"
            ):
                publisher.wait_for_subscribers(3, timeout)


def test_tasks_publish_while_one_waits():
    async def main() -> None:
        async with (
            await aio.publisher("inproc://t") as publisher,
            await aio.subscriber("inproc://t", timeout=HANG) as first,
        ):
            waiting = asyncio.ensure_future(publisher.wait_for_subscribers(2, HANG))
            await publisher.publish(b"x", timeout=HANG)
            assert (await first.recv(HANG)).value == b"x"
            assert not waiting.done()
            async with await aio.subscriber("inproc://t", timeout=HANG):
                await waiting

    asyncio.run(main())


@pytest.mark.parametrize("url", ["inproc://t", "shm://t", "udp://127.0.0.1:0"])
def test_what_nobody_hands_out_again_cannot_be_refused(url):
    with ipckit.publisher(url) as publisher, ipckit.subscriber(publisher.url, timeout=HANG) as subscriber:
        publisher.wait_for_subscribers(1, HANG)
        publisher.publish(b"x")
        message = subscriber.recv(HANG)
        with pytest.raises(errors.Unsupported, match="nobody hands this out again"):
            message.nack()
        message.ack()
        message.extend()


def test_a_slow_subscriber_and_a_timeout_leave_it_unknown():
    """There is no id to publish it again with, so that is not what one is told to do."""
    with ipckit.publisher("unix://t") as publisher, ipckit.subscriber("unix://t", timeout=HANG):
        publisher.wait_for_subscribers(1, HANG)
        with pytest.raises(errors.OutcomeUnknown, match=r"publish unix://t: .* \(it may still arrive"):
            publisher.publish(bytes(8 << 20), timeout=0.05)
