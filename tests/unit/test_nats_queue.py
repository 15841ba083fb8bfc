"""Queues on JetStream: what the contract does not ask of every transport."""

import asyncio
import os
import secrets
import time

import pytest
import trustme

pytest.importorskip("nats")

import nats

import ipckit
from ipckit import errors
from ipckit.testing.servers import nats_server

HANG = 20


@pytest.fixture(scope="module")
def shared():
    try:
        with nats_server(private=True, sync_always=True) as running:
            yield running
    except errors.MissingDependency as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture
def own():
    with nats_server(private=True) as running:
        yield running


@pytest.fixture
def name():
    return f"q{secrets.token_hex(4)}"


def jetstream(server, action):
    """What `await action(jetstream context)` answers, by nats-py itself."""

    async def main():
        client = await nats.connect(server.url)
        try:
            return await action(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(main())


def drain(receiver, patience=0.3):
    got = []
    try:
        while True:
            got.append(receiver.recv(patience))
    except errors.Timeout:
        return got


def values(messages):
    return [message.value for message in messages]


def test_the_same_id_twice_is_stored_once(shared, name):
    with ipckit.sender(shared.address(f"/{name}")) as jobs, ipckit.receiver(shared.address(f"/{name}")) as received:
        for _ in range(3):
            assert jobs.send(b"once", HANG, id="order-17") == "order-17"
        jobs.send(b"other", HANG)
        assert values(drain(received)) == [b"once", b"other"]
        assert jobs.stats()["duplicates"] == 2


def test_an_unknown_outcome_has_the_id_and_sending_again_makes_no_duplicate(own):
    url = own.address("/jobs")
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as received:
        jobs.send(b"before", HANG)
        own.pause()
        time.sleep(0.2)  # the signal takes its way
        with pytest.raises(errors.OutcomeUnknown) as unknown:
            jobs.send(b"perhaps", 0.2)
        own.resume()
        jobs.send(b"perhaps", HANG, id=unknown.value.message_id)
        jobs.send(b"after", HANG)
        assert values(drain(received)) == [b"before", b"perhaps", b"after"]


def test_a_sender_and_a_receiver_outlive_the_server(own):
    url = own.address("/jobs")
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as received:
        for number in range(3):
            jobs.send_many([b"%d a" % number, b"%d b" % number], HANG)
            first = received.recv(HANG)
            own.kill()
            own.start()
            first.ack()
            second = received.recv(HANG)
            second.ack()
            assert [first.value, second.value] == [b"%d a" % number, b"%d b" % number]
        assert jobs.stats()["reconnects"] >= 2
        assert received.stats()["reconnects"] >= 2
        assert not drain(received)


def test_a_server_that_forgets_its_deliveries_holds_nobody_up(own):
    """It is killed right after it delivered: an acknowledgement is answered by nobody then, and nothing comes twice."""
    url = own.address("/jobs")
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as received:
        got = []
        for burst in range(8):
            jobs.send_many([b"%d %d" % (burst, number) for number in range(40)], HANG)
            for _ in range(5):
                message = received.recv(HANG)
                got.append(message.value)
                message.ack()
            message = received.recv(HANG)
            own.kill()
            own.start()
            got.append(message.value)
            message.ack()
        while len(got) < 8 * 40:
            message = received.recv(HANG)
            got.append(message.value)
            message.ack()
        assert not drain(received)
        assert sorted(got) == sorted(b"%d %d" % (burst, number) for burst in range(8) for number in range(40))


def test_a_receiver_that_sleeps_wakes_after_a_restart(own):
    url = own.address("/jobs")
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as received:
        assert not drain(received)
        own.stop()
        with pytest.raises(errors.Timeout):
            received.recv(0.3)
        own.start()
        jobs.send(b"x", HANG)
        assert received.recv(HANG).value == b"x"


def test_nothing_was_sent_while_there_is_no_server(own):
    with ipckit.sender(own.address("/jobs")) as jobs:
        own.stop()
        time.sleep(0.1)
        with pytest.raises(errors.Timeout):
            jobs.send(b"opens the eyes", 0.3)
        with pytest.raises(errors.Timeout) as caught:
            jobs.send(b"x", 0.1)
        assert not isinstance(caught.value, errors.OutcomeUnknown)
        own.start()


@pytest.mark.parametrize(
    ("first", "then", "what"),
    [
        ({"maxlen": "10"}, {"maxlen": "20"}, "max_msgs is 10, not 20"),
        ({"maxage": "1h"}, {"maxage": "2h"}, "max_age"),
        ({}, {"storage": "memory"}, "storage is 'file', not 'memory'"),
        ({}, {"discard": "new"}, "discard"),
        ({}, {"retention": "work"}, "retention"),
        ({}, {"maxbytes": "1MiB", "dedup": "30s"}, "max_bytes.*duplicate_window"),
    ],
)
def test_a_stream_that_differs_is_told_and_not_changed(shared, name, first, then, what):
    ipckit.sender(shared.address(f"/{name}", **first)).close()
    before = jetstream(shared, lambda js: js.stream_info(name)).config
    with pytest.raises(errors.ConfigError, match=what):
        ipckit.sender(shared.address(f"/{name}", **then))
    assert jetstream(shared, lambda js: js.stream_info(name)).config == before
    ipckit.sender(shared.address(f"/{name}", **first)).close()
    ipckit.sender(shared.address(f"/{name}")).close()


def test_a_group_that_differs_is_told(shared, name):
    ipckit.receiver(shared.address(f"/{name}", ack_wait="10s"), group="g").close()
    with pytest.raises(errors.ConfigError, match="ack_wait"):
        ipckit.receiver(shared.address(f"/{name}", ack_wait="20s"), group="g")
    ipckit.receiver(shared.address(f"/{name}"), group="g").close()


@pytest.mark.parametrize("option", [{"ack_wait": "0s"}, {"dedup": "0s"}, {"maxage": "50ms"}])
def test_a_time_that_is_none(shared, name, option):
    with pytest.raises(errors.BadOption, match="s or more"):
        ipckit.receiver(shared.address(f"/{name}", **option))


def test_subjects_of_another_stream(shared, name):
    jetstream(shared, lambda js: js.add_stream(name=f"{name}-x", subjects=[f"{name}.>"]))
    with pytest.raises(errors.ConfigError, match="another stream"):
        ipckit.sender(shared.address(f"/{name}"))


def test_lanes(shared, name):
    url = shared.address(f"/{name}", lanes="3")
    assert ipckit.capabilities(url).priorities == 3
    with ipckit.sender(url) as jobs:
        for priority in (0, 1, 2, 0, 1, 2):
            jobs.send(b"%d" % priority, HANG, priority=priority)
        with pytest.raises(errors.Unsupported, match="3 lanes"):
            jobs.send(b"x", priority=3)
    with ipckit.receiver(url) as received:
        time.sleep(0.3)
        got = drain(received)
    assert values(got)[-2:] == [b"0", b"0"]
    assert sorted(values(got)) == [b"0", b"0", b"1", b"1", b"2", b"2"]
    assert [message.priority for message in got] == [int(message.value) for message in got]


@pytest.mark.parametrize("prefetch", ["0", "1", "64"])
def test_prefetch(shared, name, prefetch):
    url = shared.address(f"/{name}", prefetch=prefetch)
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as received:
        jobs.send_many([b"%d" % number for number in range(200)], HANG)
        assert [received.recv(HANG).value for _ in range(200)] == [b"%d" % number for number in range(200)]


def test_replay(shared, name):
    url = shared.address(f"/{name}")
    with ipckit.sender(url) as jobs:
        jobs.send_many([b"1", b"2", b"3"], HANG)
        moment = jetstream(shared, lambda js: js.get_msg(name, 3)).time
        for replay, due in (
            ("all", [b"1", b"2", b"3"]),
            ("new", []),
            ("2", [b"2", b"3"]),
            (moment.isoformat(), [b"3"]),
        ):
            place = shared.address(f"/{name}", replay=replay)
            with ipckit.receiver(place, group=f"g-{len(due)}-{replay[:3]}") as received:
                assert values(drain(received)) == due
    with pytest.raises(errors.BadOption, match="replay"):
        ipckit.receiver(shared.address(f"/{name}", replay="yesterday"))


def test_dead_letters(shared, name):
    url = shared.address(f"/{name}", max_deliver="2", ack_wait="10s")
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as received:
        jobs.send(b"poison", HANG, id="p1", headers={"traceparent": "00-1"})
        jobs.send(b"good", HANG)
        for times in range(2):
            while (message := received.recv(HANG)).value != b"poison":
                message.ack()
            assert message.redelivered == times
            message.nack()
        assert {message.value for message in drain(received, 0.5)} <= {b"good"}
        assert received.stats()["dead"] == 1
        with ipckit.receiver(shared.address(f"/{name}-dead")) as dead:
            (buried,) = drain(dead)
    assert buried.value == b"poison"
    assert buried.id.startswith("p1@")
    assert buried.headers["traceparent"] == "00-1"
    assert buried.headers["x-dead-deliveries"] == "2"
    assert jetstream(shared, lambda js: js.consumer_info(name, "default")).num_ack_pending <= 1


def test_extend_keeps_it(shared, name):
    url = shared.address(f"/{name}", ack_wait="1s")
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as received:
        jobs.send(b"long work", HANG)
        message = received.recv(HANG)
        for _ in range(4):
            with pytest.raises(errors.Timeout):
                received.recv(0.5)
            message.extend()
        message.ack()
        assert not drain(received, 1.5)


def test_what_lies_here_unread_is_not_given_to_others(shared, name):
    """Prefetched messages outlive `ack_wait`: they are looked after, and handed out once."""
    url = shared.address(f"/{name}", ack_wait="1s")
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as received:
        jobs.send_many([b"%d" % number for number in range(20)], HANG)
        got = [received.recv(HANG)]
        got[0].ack()
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            got.append(received.recv(HANG))
            got[-1].ack()
            time.sleep(0.25)
        got += drain(received)
        assert values(got) == [b"%d" % number for number in range(20)]
        assert not any(message.redelivered for message in got)


def test_closing_gives_back_at_once(shared, name):
    url = shared.address(f"/{name}")  # ack_wait is 30 s
    with ipckit.sender(url) as jobs:
        jobs.send_many([b"%d" % number for number in range(50)], HANG)
        first = ipckit.receiver(url, ack="manual")
        first.recv(HANG).ack()
        first.recv(HANG)
        first.close()
        with ipckit.receiver(url) as second:
            assert sorted(values(drain(second, 1)), key=int) == [b"%d" % number for number in range(1, 50)]


def test_automatic_acknowledgements_arrive(shared, name):
    url = shared.address(f"/{name}")
    with ipckit.sender(url) as jobs, ipckit.receiver(url) as received:
        jobs.send_many([b"x"] * 300, HANG)
        assert len(drain(received)) == 300
        info = jetstream(shared, lambda js: js.consumer_info(name, "default"))
        assert (info.num_pending, info.num_ack_pending) == (0, 0)


def test_a_full_stream(shared, name):
    with ipckit.sender(shared.address(f"/{name}", maxlen="3", discard="new")) as jobs:
        for _ in range(3):
            jobs.send(b"x", HANG)
        with pytest.raises(errors.QueueFull):
            jobs.send(b"y", HANG)


def test_too_large(shared, name):
    with ipckit.sender(shared.address(f"/{name}", limit="10")) as jobs:
        with pytest.raises(errors.MessageTooLarge):
            jobs.send(bytes(11), HANG)
        jobs.send(bytes(10), HANG)
    with ipckit.sender(shared.address(f"/{name}")) as jobs, pytest.raises(errors.MessageTooLarge, match="max_payload"):
        jobs.send(bytes(2 << 20), HANG)


@pytest.mark.parametrize("value", [" before", "after "])
def test_a_header_that_nats_would_change(shared, name, value):
    with ipckit.sender(shared.address(f"/{name}")) as jobs:
        with pytest.raises(errors.Unsupported, match="header 'a' begins or ends with a space"):
            jobs.send(b"x", headers={"a": value})
        jobs.send(b"x", timeout=5)


def test_messages_of_other_programs(shared, name):
    url = shared.address(f"/{name}")
    with ipckit.receiver(url) as received:
        ack = jetstream(shared, lambda js: js.publish(name, b"from outside", headers={"Trace": "x"}))
        message = received.recv(HANG)
        assert (message.value, message.id, message.headers) == (b"from outside", str(ack.seq), {"trace": "x"})


def test_a_sender_hears_that_its_stream_is_gone(shared, name):
    """At once, and not when the server may have forgotten the id; a new sender makes it anew."""
    url = shared.address(f"/{name}")
    with ipckit.sender(url) as jobs:
        jobs.send(b"x", HANG)
        jetstream(shared, lambda js: js.delete_stream(name))
        with pytest.raises(errors.OutcomeUnknown, match="the stream was deleted") as told:
            jobs.send(b"y", HANG, id="mine")
        assert told.value.message_id == "mine"
        with ipckit.sender(url) as again, ipckit.receiver(url) as received:
            again.send(b"z", HANG)
            jobs.send(b"and", HANG)
            assert [received.recv(HANG).value for _ in range(2)] == [b"z", b"and"]


def test_a_group_that_is_deleted_is_told(shared, name):
    with ipckit.receiver(shared.address(f"/{name}"), group="g") as received:
        assert not drain(received)
        jetstream(shared, lambda js: js.delete_consumer(name, "g"))
        with pytest.raises(errors.PeerError, match="deleted"):
            received.recv(HANG)


def test_fsync_always(shared, own, name):
    with ipckit.sender(shared.address(f"/{name}", fsync="always", monitor=shared.monitor)) as jobs:
        jobs.send(b"x", HANG)
    with pytest.raises(errors.Unsupported, match="cannot be known"):
        ipckit.sender(shared.address(f"/{name}", fsync="always"))
    with pytest.raises(errors.Unsupported, match="no monitoring"):
        ipckit.sender(shared.address(f"/{name}", fsync="always", monitor="127.0.0.1:1"))
    with pytest.raises(errors.Unsupported, match="names no server"):  # the monitoring of another server
        ipckit.sender(own.address(f"/{name}", fsync="always", monitor=shared.monitor))


def test_no_jetstream(name):
    with nats_server(jetstream=False) as server, pytest.raises(errors.Unsupported, match="no JetStream"):
        ipckit.sender(server.address(f"/{name}"), timeout=HANG)


def test_no_server():
    with pytest.raises(errors.NothingListening):
        ipckit.sender("nats://127.0.0.1:1/jobs", timeout=0.3)


@pytest.mark.parametrize("path", ["", "/", "/a.b", "/a/b", "/a b", "/*"])
def test_bad_names(shared, path):
    with pytest.raises(errors.BadUrl):
        ipckit.sender(shared.address(path))


def test_a_bad_group(shared, name):
    with pytest.raises(errors.BadOption, match="group"):
        ipckit.receiver(shared.address(f"/{name}"), group="a.b", timeout=HANG)


def test_over_tls(tmp_path, name):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with nats_server(tls=(tmp_path / "cert.pem", tmp_path / "key.pem")) as server:
        url = server.address(f"/{name}", cafile=str(tmp_path / "ca.pem"))
        assert url.startswith("nats+tls://")
        with ipckit.sender(url) as jobs, ipckit.receiver(url) as received:
            jobs.send(b"a job")
            assert received.recv(HANG).value == b"a job"
        url = server.address(f"/{name}-topics", cafile=str(tmp_path / "ca.pem"))
        with ipckit.publisher(url) as topics, ipckit.subscriber(url, topics=["eu.*"]) as heard:
            topics.publish(b"news", "eu.paris")
            assert heard.recv(HANG).value == b"news"
