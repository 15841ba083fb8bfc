"""Topics on NATS: on a stream, and with `durable=0` without one."""

import asyncio
import os
import secrets
import time

import pytest

pytest.importorskip("nats")

import nats

import ipckit
from ipckit import errors
from ipckit.testing.servers import nats_server
from ipckit.transports._nats_roll import subjects_of

HANG = 20


@pytest.fixture(scope="module")
def shared():
    try:
        with nats_server(private=True) as running:
            yield running
    except errors.MissingDependency as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture
def name():
    return f"t{secrets.token_hex(4)}"


def drain(subscriber, patience=0.3):
    got = []
    try:
        while True:
            got.append(subscriber.recv(patience))
    except errors.Timeout:
        return got


def values(messages):
    return [message.value for message in messages]


@pytest.mark.parametrize(
    ("topics", "subjects", "choosy"),
    [
        ((">",), [], False),
        (("eu.*",), ["s.eu.*"], False),
        (("eu.*", "eu.paris", "eu.*"), ["s.eu.*"], False),
        (("eu.>",), ["s.eu.>", "s.eu"], False),
        (("eu.*", "us.*"), ["s.eu.*", "s.us.*"], False),
        (("eu.*", ">"), [], False),
        (("eu.*", "*.paris"), [], True),
        (("eu.>", "eu"), ["s.eu.>", "s.eu"], False),
    ],
)
def test_subjects(topics, subjects, choosy):
    found, others = subjects_of("s", topics)
    assert (sorted(found), others) == (sorted(subjects), choosy)


def test_replay(shared, name):
    with ipckit.publisher(shared.address(f"/{name}")) as prices:
        for number in range(1, 5):
            prices.publish(b"%d" % number, "t", HANG)
        for replay, due in (("all", [b"1", b"2", b"3", b"4"]), ("new", []), ("3", [b"3", b"4"])):
            with ipckit.subscriber(shared.address(f"/{name}", replay=replay)) as late:
                assert values(drain(late)) == due


def test_what_the_stream_dropped_is_counted(shared, name):
    url = shared.address(f"/{name}", maxlen="50")
    with ipckit.publisher(url) as prices, ipckit.subscriber(shared.address(f"/{name}", prefetch="10")) as slow:
        prices.publish_many([b"%d" % number for number in range(500)], "t", HANG)
        at = -1
        for message in drain(slow):
            assert int(message.value) == at + 1 + message.gap
            at = int(message.value)
        assert at == 499
        stats = slow.stats()
        assert stats["dropped"] > 300
        assert stats["received"] + stats["dropped"] == 500


def test_and_under_a_pattern_only_what_it_covers(shared, name):
    url = shared.address(f"/{name}", maxlen="60")
    place = shared.address(f"/{name}", prefetch="10")
    with ipckit.publisher(url) as prices, ipckit.subscriber(place, topics=["eu.*"]) as slow:
        prices.publish(b"first", "eu.x", HANG)
        assert slow.recv(HANG).value == b"first"
        for _ in range(10):
            prices.publish_many([b"eu"] * 30, "eu.x", HANG)
            prices.publish_many([b"us"] * 30, "us.x", HANG)
        drain(slow)
        prices.publish(b"last", "eu.x", HANG)
        assert slow.recv(HANG).value == b"last"
        stats = slow.stats()
        assert stats["dropped"] > 100
        assert stats["received"] + stats["dropped"] == 302


def test_subscribers_and_publishers_outlive_the_server():
    with nats_server(private=True) as server:
        url = server.address("/prices")
        with (
            ipckit.publisher(url) as prices,
            ipckit.subscriber(url) as alone,
            ipckit.subscriber(url, group="g") as shared,
        ):
            for number in range(3):
                prices.publish(b"%d" % number, "t", HANG)
                server.kill()
                server.start()
            prices.publish(b"3", "t", HANG)
            assert [alone.recv(HANG).value for _ in range(4)] == [b"0", b"1", b"2", b"3"]
            got = set()
            while len(got) < 4:
                got.add(shared.recv(HANG).value)
            assert alone.stats()["dropped"] == 0
            assert alone.stats()["reconnects"] >= 1
            assert prices.stats()["reconnects"] >= 1


def test_a_stream_that_is_deleted_is_told(shared, name):
    async def delete():
        client = await nats.connect(shared.url)
        await client.jetstream().delete_stream(name)
        await client.close()

    with ipckit.subscriber(shared.address(f"/{name}")) as alone:
        assert not drain(alone)
        asyncio.run(delete())
        with pytest.raises(errors.ConfigError, match="stream not found"):
            alone.recv(HANG)


@pytest.mark.parametrize("durable", ["1", "0"])
def test_wait_for_subscribers(shared, name, durable):
    url = shared.address(f"/{name}", durable=durable)
    with ipckit.publisher(url, on_full="block" if durable == "1" else "drop_new") as prices:
        with pytest.raises(errors.Timeout):
            prices.wait_for_subscribers(1, 0.3)
        with ipckit.subscriber(url), ipckit.subscriber(url, group="g"):
            prices.wait_for_subscribers(2, HANG)
            with pytest.raises(errors.Timeout):
                prices.wait_for_subscribers(3, 0.3)
        with pytest.raises(errors.Timeout):
            prices.wait_for_subscribers(1, 0.3)


def test_on_full(shared, name):
    full = shared.address(f"/{name}", maxlen="2", discard="new")
    with ipckit.publisher(full, on_full="error") as prices:
        prices.publish_many([b"x"] * 2, "t", HANG)
        with pytest.raises(errors.QueueFull):
            prices.publish(b"y", "t", HANG)
    with ipckit.publisher(full, on_full="drop_new") as prices:
        prices.publish(b"y", "t", HANG)
        assert (prices.stats()["sent"], prices.stats()["dropped"]) == (0, 1)
    with ipckit.publisher(full) as prices, pytest.raises(errors.OutcomeUnknown):
        prices.publish(b"y", "t", 0.3)
    ipckit.publisher(shared.address(f"/{name}-old", maxlen="2")).close()
    with pytest.raises(errors.Unsupported, match="drops its oldest"):
        ipckit.publisher(shared.address(f"/{name}-old"), on_full="error")
    with pytest.raises(errors.Unsupported, match="retain"):
        ipckit.publisher(shared.address(f"/{name}"), retain=1)


# -- without a stream -------------------------------------------------------------------------------------------------


def test_core_topics_and_groups(shared, name):
    url = shared.address(f"/{name}", durable="0")
    with (
        ipckit.publisher(url, on_full="drop_new") as prices,
        ipckit.subscriber(url, topics=["eu.*"]) as europe,
        ipckit.subscriber(url, topics=["eu.*", "*.paris"]) as both,
        ipckit.subscriber(url, group="g") as one,
        ipckit.subscriber(url, group="g") as two,
    ):
        prices.wait_for_subscribers(4, HANG)
        for topic in ("eu.paris", "us.paris", "", "eu.rome"):
            prices.publish(topic.encode(), topic, HANG, headers={"a": "b"})
        got = drain(europe)
        assert values(got) == [b"eu.paris", b"eu.rome"]
        assert got[0].headers == {"a": "b"}
        assert values(drain(both)) == [b"eu.paris", b"us.paris", b"eu.rome"]
        assert sorted(values(drain(one) + drain(two))) == [b"", b"eu.paris", b"eu.rome", b"us.paris"]


def test_core_counts_what_is_missed(shared, name):
    url = shared.address(f"/{name}", durable="0")
    with ipckit.publisher(url, on_full="drop_new") as prices, ipckit.subscriber(url) as slow:
        prices.wait_for_subscribers(1, HANG)
        prices.publish(b"first", "t", HANG)
        assert slow.recv(HANG).value == b"first"
        sent = 1
        for _ in range(8):
            sent += prices.publish_many([bytes(10)] * 10_000, "t", HANG)
            time.sleep(0.01)
        slow._intake._jet.home.turn()  # it has been asleep; its server and its backlog are full
        got = len(drain(slow, 1.5))
        prices.publish(b"last", "t", HANG)
        assert slow.recv(HANG).value == b"last"
        stats = slow.stats()
        assert got + 2 == stats["received"]
        assert stats["received"] + stats["dropped"] == sent + 1


def test_core_says_that_it_holds_nobody_up(shared, name):
    url = shared.address(f"/{name}", durable="0")
    with pytest.raises(errors.Unsupported, match="core NATS"):
        ipckit.publisher(url)
    with pytest.raises(errors.Unsupported, match="replay"):
        ipckit.subscriber(shared.address(f"/{name}", durable="0", replay="all"))


@pytest.mark.parametrize("durable", [0, 1])
def test_what_was_refused_was_missed_by_nobody(shared, name, durable):
    """Under a pattern, where messages are counted by the numbers that their publisher gives them."""
    url = shared.address(f"/{name}", durable=str(durable))
    on_full = "block" if durable else "drop_new"
    with (
        ipckit.publisher(url, on_full=on_full, timeout=HANG) as publisher,
        ipckit.subscriber(url, topics=["eu.*"], timeout=HANG) as subscriber,
    ):
        publisher.publish(b"1", "eu.paris", HANG)
        for size in (8 << 20, 20 << 20):
            with pytest.raises(errors.MessageTooLarge, match=r"^publish nats://"):
                publisher.publish(bytes(size), "eu.paris", HANG)
        publisher.publish(b"2", "eu.paris", HANG)
        assert [(message.value, message.gap) for message in (subscriber.recv(HANG), subscriber.recv(HANG))] == [
            (b"1", 0),
            (b"2", 0),
        ]
        assert subscriber.stats()["dropped"] == 0


def test_a_group_hands_out_again_and_others_say_that_they_do_not(shared, name):
    url = shared.address(f"/{name}", replay="all")
    with ipckit.publisher(url, timeout=HANG) as publisher:
        publisher.publish(b"x", "eu", HANG)
    with ipckit.subscriber(url, group="g", timeout=HANG) as group, ipckit.subscriber(url, timeout=HANG) as alone:
        group.recv(HANG).nack()
        assert group.recv(HANG).redelivered == 1
        assert group.stats()["dropped"] == 0
        with pytest.raises(errors.Unsupported, match="nobody hands this out again"):
            alone.recv(HANG).nack()
