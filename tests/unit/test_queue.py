"""Senders and receivers as their users hold them, whatever the transport: batches, bad values, bad arguments."""

import asyncio
import math
import uuid

import msgspec
import pytest

import ipckit
from ipckit import aio, errors


class Job(msgspec.Struct):
    number: int


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def url():
    """What is sent waits in the kernel: a batch is what was sent before."""
    return f"fifo://{uuid.uuid4().hex[:12]}"


def good(number):
    return msgspec.msgpack.encode(Job(number))


@pytest.mark.parametrize("ack", ["auto", "manual"])
def test_a_bad_value_costs_no_other_of_its_batch(url, ack):
    with ipckit.sender(url) as jobs, ipckit.receiver(url, type=Job, ack=ack) as work:
        jobs.send_many([good(1), good(2), b"\xc1", good(3)])
        first = work.recv_many(10, 5)
        assert [message.value.number for message in first] == [1, 2]
        with pytest.raises(errors.CodecError) as told:
            work.recv_many(10, 5)
        assert told.value.undecoded.value == b"\xc1"
        assert [message.value.number for message in work.recv_many(10, 5)] == [3]


def test_what_was_not_handed_out_is_not_acknowledged(url):
    """The batch ended before the bad one: it is in nobody's hands, and the next receiver hears of it."""
    with ipckit.sender(url) as jobs:
        with ipckit.receiver(url, type=Job) as work:
            jobs.send_many([good(1), b"bad"])
            assert len(work.recv_many(10, 5)) == 1
        with ipckit.receiver(url) as other:
            assert other.recv(5).value == b"bad"
            with pytest.raises(errors.Timeout):
                other.recv(0)


def test_a_bad_value_can_be_settled(url):
    with ipckit.sender(url) as jobs, ipckit.receiver(url, type=Job, ack="manual") as work:
        sent = jobs.send(b"bad", headers={"from": "elsewhere"})
        with pytest.raises(errors.SchemaError, match=f"recv {url}: ") as told:
            work.recv(5)
        bad = told.value.undecoded
        assert (bad.value, bad.id, bad.headers) == (b"bad", sent, {"from": "elsewhere"})
        bad.nack()
        with pytest.raises(errors.SchemaError) as told:
            work.recv(5)
        assert told.value.undecoded.redelivered == 1
        told.value.undecoded.ack()
    with ipckit.receiver(url) as other, pytest.raises(errors.Timeout):
        other.recv(0)


def test_a_bad_value_awaited(url):
    async def main():
        async with await aio.sender(url) as jobs, await aio.receiver(url, type=Job, ack="manual") as work:
            await jobs.send_many([good(1), b"bad", good(2)])
            assert [message.value.number for message in await work.recv_many(10, 5)] == [1]
            with pytest.raises(errors.SchemaError) as told:
                await work.recv(5)
            await told.value.undecoded.ack()
            assert (await work.recv(5)).value.number == 2

    asyncio.run(main())


def test_a_task_that_sleeps_hears_what_ended_a_batch():
    """Two tasks receive: one sleeps, the other's batch ends with a bad value. The sleeper is told, nobody else."""

    async def main():
        async with await aio.receiver("inproc://q", type=Job) as work, await aio.sender("inproc://q") as jobs:

            async def some():
                try:
                    return [str(message.value.number) for message in await work.recv_many(10, 5)]
                except errors.SchemaError:
                    return ["bad"]

            batch, other = asyncio.create_task(some()), asyncio.create_task(some())
            await asyncio.sleep(0)
            await jobs.send_many([good(1), good(2), b"bad"])
            found = await batch + await other
            while len(found) < 3:
                found += await some()
            assert sorted(found) == ["1", "2", "bad"]

    asyncio.run(main())


def test_the_only_sender_ends_the_loop():
    ours, theirs = ipckit.pair("pipe://")
    with ipckit.sender(ours) as jobs, ipckit.receiver(theirs) as work:
        jobs.send_many([b"1", b"2"])
        jobs.close()
        assert [message.value for message in work] == [b"1", b"2"]

    async def main():
        ours, theirs = ipckit.pair("pipe://")
        async with await aio.sender(ours) as jobs, await aio.receiver(theirs) as work:
            await jobs.send_many([b"1", b"2"])
            await jobs.close()
            assert [message.value async for message in work] == [b"1", b"2"]

    asyncio.run(main())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_batch_of_nothing(url, limit):
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as work:
        jobs.send(b"x")
        with pytest.raises(errors.BadOption, match="limit must be 1 or more"):
            work.recv_many(limit, 5)
        assert work.recv(5).value == b"x"


@pytest.mark.parametrize("where", ["fifo", "unix"])
@pytest.mark.parametrize("delay", [-1, math.nan, math.inf, 1e12])
def test_a_delay_that_is_none(url, delay, where):
    url = url.replace("fifo", where)
    with ipckit.receiver(url, ack="manual") as work, ipckit.sender(url) as jobs:
        jobs.send(b"x", 5)
        message = work.recv(5)
        with pytest.raises(errors.BadOption, match="a delay is from 0 to"):
            message.nack(delay)
        message.nack()  # it is still ours to settle
        again = work.recv(5)
        assert again.redelivered == 1
        again.ack()


@pytest.mark.parametrize("value", [5, "text", None, [1, 2]])
def test_what_is_no_buffer_is_not_sent(url, value):
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as work:
        with pytest.raises(TypeError, match="bytes-like"):
            jobs.send(value)
        with pytest.raises(errors.Timeout):
            work.recv(0)
    with ipckit.publisher("inproc://topic") as topics, pytest.raises(TypeError, match="bytes-like"):
        topics.publish(value)


@pytest.mark.parametrize("bad", [{"headers": {5: "x"}}, {"headers": {"a": 5}}, {"id": 5}])
def test_bad_names_are_told_with_the_url(url, bad):
    with ipckit.sender(url) as jobs, pytest.raises(errors.BadOption, match=f"^{url}: "):
        jobs.send(b"x", **bad)


@pytest.mark.parametrize("option", ["prefetchh=3", "prefech=3"])
def test_an_option_of_the_queue_is_suggested(option):
    with pytest.raises(errors.BadOption, match="did you mean 'prefetch'"):
        ipckit.receiver(f"unix://q?{option}")


def test_the_end_of_the_block_closes_though_the_last_acknowledgement_fails(url, monkeypatch):
    def fail(parcel, verdict, delay):
        raise errors.AccessDenied("not any more")

    async def awaited():
        async with await aio.receiver(url) as work:
            await work.recv(5)
            monkeypatch.setattr(work._intake, "try_settle", fail)
            left.append(work)

    def in_a_block():
        with ipckit.receiver(url) as work:
            work.recv(5)
            monkeypatch.setattr(work._intake, "try_settle", fail)
            left.append(work)

    left = []
    with ipckit.sender(url) as jobs:
        jobs.send(b"x")
        with pytest.raises(errors.AccessDenied):
            in_a_block()
        with pytest.raises(errors.AccessDenied):
            asyncio.run(awaited())
    assert [work.closed for work in left] == [True, True]


def test_the_same_id_again_while_its_first_is_at_work():
    """Over links the second is acknowledged at once: nothing waits for it, and its window is not used up."""
    with (
        ipckit.receiver("unix://q?prefetch=2", ack="manual") as work,
        ipckit.sender("unix://q", timeout=5) as jobs,
    ):
        jobs.send(b"x", 5, id="one")
        first = work.recv(5)
        for _ in range(200):
            jobs.send(b"x", 5, id="one")
            with pytest.raises(errors.Timeout):
                work.recv(0)
        first.ack()
        jobs.send(b"y", 5)
        second = work.recv(5)
        assert second.value == b"y"
        second.ack()
        jobs.drain(5)
        assert work.stats()["duplicates"] == 200


@pytest.mark.parametrize("where", ["fifo", "unix"])
@pytest.mark.parametrize(
    "headers",
    [
        {"a": "half a character: \udc80"},
        {"a": "x" * 65536},
        {"a": "ü" * 32768},
        {f"a{number}": "x" for number in range(1001)},
    ],
)
def test_headers_that_cannot_travel_are_refused_everywhere(url, where, headers):
    url = url.replace("fifo", where)
    with ipckit.receiver(url) as work, ipckit.sender(url) as jobs:
        with pytest.raises(errors.BadOption, match=f"^{url}: "):
            jobs.send(b"x", 5, headers=headers)
        jobs.send(b"y", 5, headers={"a": "x" * 65535})
        assert len(work.recv(5).headers["a"]) == 65535
