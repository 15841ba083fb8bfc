"""Topics in shared memory, beyond their contract: exact counts, read-only payloads, bad neighbours, publishers that come back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
import socket
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
from ipckit import _linkwire as wire
from ipckit import aio, errors
from ipckit.message import UNKNOWN, Parcel, new_id
from ipckit.transports import _shm_topics as topics
from ipckit.transports._runtime import path_for


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


@pytest.fixture
def no_leak():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    yield
    deadline = time.monotonic() + 5  # the keeper's thread lets go of its own
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert "ipckit-topics" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("on_full", ["drop_old", "drop_new"])
@pytest.mark.parametrize("size", ["64MiB", "64KiB"])
def test_received_and_dropped_is_sent_over_many(on_full, size, no_leak):
    """A fast one, one that stops now and then, one that never receives before the end; the queues are full, or the memory is."""
    count, padding = 30_000, bytes(500 if size == "64KiB" else 20)
    with ipckit.publisher(f"shm://p?backlog=200&size={size}", on_full=on_full) as publisher:
        subscribers = [ipckit.subscriber("shm://p", timeout=5) for _ in range(3)]
        failures = []

        def receive(subscriber, pause):
            try:
                last = -1
                for seen, message in enumerate(subscriber):
                    number = int(message.value[:6])
                    assert number == last + 1 + message.gap
                    assert len(message.value) == 6 + len(padding)
                    last = number
                    if pause and not seen % 5000:
                        time.sleep(pause)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=receive, args=(subscribers[i], 0.05 * i)) for i in range(2)]
        for thread in threads:
            thread.start()
        for number in range(count):
            publisher.publish(b"%06d" % number + padding, "t")
        dropped = publisher.stats()["dropped"]
        publisher.close()
        receive(subscribers[2], 0)
        for thread in threads:
            thread.join(30)
        assert not failures
        stats = [subscriber.stats() for subscriber in subscribers]
        assert [each["received"] + each["dropped"] for each in stats] == [count] * 3
        assert sum(each["dropped"] for each in stats) == dropped == publisher.stats()["dropped"]
        assert stats[2]["dropped"]
        for subscriber in subscribers:
            subscriber.close()


@pytest.mark.parametrize("on_full", ["drop_old", "drop_new"])
def test_a_stuck_subscriber_costs_the_others_nothing(on_full):
    """Not even when it is the memory that is full, and not the queue."""
    with (
        ipckit.publisher("shm://p?size=64KiB", on_full=on_full) as publisher,
        ipckit.subscriber("shm://p") as stuck,
        ipckit.subscriber("shm://p") as fast,
    ):
        for number in range(2000):
            publisher.publish(b"%d" % number + bytes(1000), "t")
            assert fast.recv(5).gap == 0
        dropped = publisher.stats()["dropped"]
        first = stuck.recv(1)
        assert first.gap == (dropped if on_full == "drop_old" else 0)
        assert dropped > 1900


def test_a_full_memory_blocks_and_goes_on():
    with ipckit.publisher("shm://p?size=64KiB") as publisher, ipckit.subscriber("shm://p") as subscriber:
        for _ in range(2):
            publisher.publish(bytes(30_000), "t", 5)
        with pytest.raises(errors.Timeout):
            publisher.publish(bytes(30_000), "t", 0.05)
        sending = threading.Thread(target=publisher.publish, args=(b"x" * 30_000, "t", 10))
        sending.start()
        assert [subscriber.recv(5).value[:1] for _ in range(3)] == [b"\0", b"\0", b"x"]
        sending.join(10)
        assert publisher.stats()["sent"] == 3
    with ipckit.publisher("shm://p?size=64KiB", on_full="error") as publisher, ipckit.subscriber("shm://p"):
        for _ in range(2):
            publisher.publish(bytes(30_000), "t")
        with pytest.raises(errors.QueueFull):
            publisher.publish(bytes(30_000), "t")


def test_sizes_that_do_not_fit():
    with ipckit.publisher("shm://p?limit=1000") as publisher, ipckit.subscriber("shm://p") as subscriber:
        with pytest.raises(errors.MessageTooLarge, match="limit="):
            publisher.publish(bytes(1000), "t")
        publisher.publish(bytes(900), "t")
        assert len(subscriber.recv(5).value) == 900
    with ipckit.publisher("shm://p?size=64KiB") as publisher:
        with pytest.raises(errors.MessageTooLarge, match="size="):
            publisher.publish(bytes(1 << 16), "t")
        publisher.publish(bytes(65_000), "t")
    for bad in ("size=1KiB", "size=2GiB", "backlog=0", "ring=1MiB"):
        with pytest.raises(errors.BadOption):
            ipckit.publisher(f"shm://p?{bad}")


def test_a_subscriber_with_a_limit_of_its_own():
    """What is above it is dropped for this one, and counted at both ends."""
    with (
        ipckit.publisher("shm://p") as publisher,
        ipckit.subscriber("shm://p?limit=1000") as small,
        ipckit.subscriber("shm://p") as large,
    ):
        for size in (10, 2000, 20, 3000):
            publisher.publish(bytes(size), "t")
        assert [(len(m.value), m.gap) for m in (small.recv(5), small.recv(5))] == [(10, 0), (20, 1)]
        assert [len(large.recv(5).value) for _ in range(4)] == [10, 2000, 20, 3000]
        assert publisher.stats()["dropped"] == 2
        publisher.close()
        with pytest.raises(errors.PeerClosed):
            small.recv(5)
        assert small.stats()["dropped"] == 2


def test_large_messages():
    with ipckit.publisher("shm://p") as publisher, ipckit.subscriber("shm://p") as subscriber:
        value = os.urandom(10 << 20)
        for _ in range(20):
            publisher.publish(value, "t", 5)
            assert subscriber.recv(5).value == value


def test_more_retained_than_the_backlog():
    with ipckit.publisher("shm://p?backlog=5", on_full="drop_new", retain=3) as publisher:
        for number in range(40):
            publisher.publish(b"%d" % number, f"t{number % 10}")
        with ipckit.subscriber("shm://p", timeout=5) as late:
            publisher.publish(b"new", "t0")  # above the backlog: dropped
            got = late.recv_many(100, 5)
            assert [int(message.value) for message in got] == list(range(10, 40))
            publisher.publish(b"newer", "t0")
            assert (late.recv(5).gap, publisher.stats()["dropped"]) == (1, 1)


def test_members_of_a_group_take_turns_and_survive_each_other():
    with ipckit.publisher("shm://p?backlog=10", on_full="drop_new") as publisher:
        first, second = (ipckit.subscriber("shm://p", group="g") for _ in range(2))
        for number in range(10):
            publisher.publish(b"%d" % number, "t")
        assert [int(first.recv(5).value) % 2 for _ in range(5)] in ([0] * 5, [1] * 5)
        assert len(second.recv_many(10, 5)) == 5
        for _ in range(15):
            publisher.publish(b"x", "t")
        assert publisher.stats()["dropped"] == 0  # the one that has room is given what the other has none for
        first.close()
        publisher.wait_for_subscribers(1, 5)
        while publisher.stats()["subscribers"] != 1:
            time.sleep(0.001)
        second.recv_many(100, 5)
        for number in range(10):
            publisher.publish(b"%d" % number, "t")
        assert [int(message.value) for message in second.recv_many(100, 5)] == list(range(10))
        second.close()


def test_a_publisher_that_dies_and_comes_back(no_leak):
    """What it had published is received; it is found again; what was missed in between is unknown."""
    first = ipckit.publisher("shm://p")
    subscriber = ipckit.subscriber("shm://p", timeout=5)
    for _ in range(3):
        first.publish(b"old", "t")
    first._outlet.abandon()  # without a goodbye: as if it had died
    first._outlet._name.release()
    assert [subscriber.recv(5).value for _ in range(3)] == [b"old"] * 3
    with pytest.raises(errors.Timeout):
        subscriber.recv(0.05)
    received = []
    thread = threading.Thread(target=lambda: received.append(subscriber.recv(20)))
    thread.start()
    with ipckit.publisher("shm://p") as second:
        second.wait_for_subscribers(1, 10)
        second.publish(b"new", "t")
        second.publish(b"newer", "t")
        thread.join(20)
        assert (received[0].value, received[0].gap) == (b"new", UNKNOWN)
        assert subscriber.recv(5).gap == 0
        assert subscriber.stats()["reconnects"] == 1
    subscriber.close()
    first.close()


def test_what_was_published_outlives_the_close(no_leak):
    """Without a word between the two processes: the memory is the subscriber's, too."""
    with ipckit.publisher("shm://p") as publisher:
        subscriber = ipckit.subscriber("shm://p")
        for number in range(500):
            publisher.publish(b"%d" % number, "t")
    assert [int(message.value) for message in subscriber] == list(range(500))
    subscriber.close()


def test_async_waits(no_leak):
    async def main():
        async with await aio.publisher("shm://p?backlog=4") as publisher, await aio.subscriber("shm://p") as subscriber:

            async def receive():
                return [int((await subscriber.recv(10)).value) for _ in range(300)]

            receiving = asyncio.ensure_future(receive())
            for number in range(300):  # both wait for each other again and again
                await publisher.publish(b"%d" % number, "t", 10)
            assert await receiving == list(range(300))

    asyncio.run(main())


# -- bad neighbours --------------------------------------------------------------------------------------------------


def ask(text: bytes) -> tuple[socket.socket, bytes, list[int]]:
    """A subscriber by hand."""
    sock = socket.socket(socket.AF_UNIX, topics.KIND)
    sock.settimeout(5)
    sock.connect(str(path_for(ipckit._url.parse("shm://p"), ".shm")))
    sock.send(text)
    data, fds, _, _ = socket.recv_fds(sock, 4096, 8)
    return sock, data, list(fds)


HELLO = topics.greeting(topics.SUBSCRIBE, 1 << 20, wire.hello(wire.Hello(wire.SUBSCRIBER, topics=(">",))))


def test_the_payloads_are_read_only():
    with ipckit.publisher("shm://p") as publisher:
        sock, _, fds = ask(HELLO)
        publisher.publish(b"secret", "t")
        with sock, mmap.mmap(fds[0], 0, prot=mmap.PROT_READ) as memory:
            assert memory[:8] == b"ipccast\0"
            assert memory.find(b"secret") > 0
        for attempt in (
            lambda: mmap.mmap(fds[0], 0),
            lambda: os.pwrite(fds[0], b"x", 5000),
            lambda: os.ftruncate(fds[0], 0),
            lambda: os.ftruncate(fds[1], 0),
        ):
            with pytest.raises(PermissionError):
                attempt()
        for fd in fds:
            os.close(fd)


@given(st.binary(max_size=64), st.integers(0, 63))
def test_reading_a_prefix_believes_nothing(noise, at):
    parcel = Parcel(b"body", new_id(), topic="a.b")
    good = wire.prefix(parcel)
    assert wire.read_prefix(good, b"body") == parcel
    bad = good[: at % len(good)] + noise
    with contextlib.suppress(errors.ProtocolError):
        assert wire.read_prefix(bad, b"body").body == b"body"


@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 5000])
def test_a_subscriber_that_writes_nonsense_is_dropped(value):
    """And the others do not notice."""
    with ipckit.publisher("shm://p?backlog=100") as publisher, ipckit.subscriber("shm://p") as good:
        sock, _, fds = ask(HELLO)
        with sock, mmap.mmap(fds[1], 0) as queue:
            struct.pack_into("=Q", queue, 256, value)  # the head
            queue[4096:] = b"\xff" * (len(queue) - 4096)
            for number in range(500):
                publisher.publish(b"%d" % number, "t", 5)
                assert int(good.recv(5).value) == number
            assert sock.recv(1) == b""
        for fd in fds:
            os.close(fd)
        assert publisher.stats()["subscribers"] == 1


@pytest.mark.parametrize(("offset", "value"), [(128, 2**60), (4096 + 8, 2**40), (4096 + 16, 2**40), (4096 + 24, 2**63)])
def test_a_publisher_that_writes_nonsense_is_an_error(offset, value):
    with ipckit.publisher("shm://p") as publisher, ipckit.subscriber("shm://p") as subscriber:
        publisher.publish(b"x", "t")
        with mmap.mmap(subscriber._intake._gift.queue, 0) as queue:
            struct.pack_into("=Q", queue, offset, value)
        for _ in range(2):
            with pytest.raises(errors.ProtocolError):
                subscriber.recv(5)


@pytest.mark.parametrize(
    "bad",
    [
        b"x",
        bytes(100),
        topics.greeting(topics.QUEUE, 0),
        topics.greeting(topics.SUBSCRIBE, 5),
        topics.greeting(topics.SUBSCRIBE, 5, wire.hello(wire.Hello(wire.SUBSCRIBER))),
        topics.greeting(topics.SUBSCRIBE, 5, wire.hello(wire.Hello(wire.RECEIVER, window=5))),
        HELLO + b"more",
    ],
)
def test_a_bad_greeting_costs_its_connection(bad, no_leak):
    with ipckit.publisher("shm://p") as publisher, ipckit.subscriber("shm://p") as good:
        sock, data, fds = ask(bad)
        with sock:
            assert topics.read_greeting(data).kind == topics.REFUSED
            assert not fds
        publisher.publish(b"x", "t")
        assert good.recv(5).value == b"x"


def test_talk_on_the_control_socket_ends_it():
    with ipckit.publisher("shm://p") as publisher:
        sock, _, fds = ask(HELLO)
        with sock:
            publisher.wait_for_subscribers(1, 5)
            sock.send(b"hello")
            assert sock.recv(1) == b""
        for fd in fds:
            os.close(fd)


def accept_nobody(listener):
    with pytest.raises(errors.Closed):
        listener.accept()


def test_other_patterns_at_the_same_name():
    with ipckit.publisher("shm://p"):
        with pytest.raises(errors.ProtocolError):
            ipckit.connect("shm://p", timeout=5)
        with pytest.raises(errors.AddressInUse):
            ipckit.listen("shm://p")
        with pytest.raises(errors.AddressInUse):
            ipckit.publisher("shm://p")
    with pytest.raises(errors.NothingListening):
        ipckit.subscriber("shm://p", timeout=0.05)
    with ipckit.listen("shm://p") as listener:
        accepting = threading.Thread(target=accept_nobody, args=(listener,))
        accepting.start()
        with pytest.raises(errors.ProtocolError, match="greeting"):
            ipckit.subscriber("shm://p", timeout=5)
        listener.close()
        accepting.join()
