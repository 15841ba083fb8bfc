"""`native=on`: stock pyzmq at the other end, strangers, and what is refused because libzmq does not have it."""

import os
import stat
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
from ipckit import errors
from ipckit.pubsub import matches

zmq = pytest.importorskip("zmq")

TCP = "zmq+tcp://127.0.0.1:0?native=on"


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@contextmanager
def stock(kind, port=None):
    """A zmq socket that knows nothing of ipckit; with a port it connects, else it listens."""
    context = zmq.Context()
    socket = context.socket(kind)
    socket.setsockopt(zmq.RCVTIMEO, 10_000)
    if port is not None:
        socket.connect(f"tcp://127.0.0.1:{port}")
    try:
        yield socket
    finally:
        socket.close(linger=1000)
        context.term()


# -- any ZeroMQ program -------------------------------------------------------------------------------------------


def test_a_stock_push_feeds_our_receiver():
    with ipckit.receiver(TCP) as work, stock(zmq.PUSH, work.url.host.port) as push:
        push.send(b"job")
        push.send(b"")
        push.send_multipart([b"parts", b"are", b"messages"])
        got = [work.recv(10) for _ in range(5)]
        assert [message.value for message in got] == [b"job", b"", b"parts", b"are", b"messages"]
        assert (got[0].id, got[0].headers, got[0].redelivered) == ("", {}, 0)


def test_our_sender_feeds_a_stock_pull():
    with stock(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        with ipckit.sender(f"zmq+tcp://127.0.0.1:{port}?native=on", timeout=10) as jobs:
            jobs.send(b"one")
            assert jobs.send_many([b"two", b"three"]) == 2
        assert [pull.recv() for _ in range(3)] == [b"one", b"two", b"three"]


def test_a_stock_sub_hears_our_publisher():
    with ipckit.publisher(TCP) as prices, stock(zmq.SUB, prices.url.host.port) as sub:
        sub.setsockopt(zmq.SUBSCRIBE, b"eu.")
        with ipckit.subscriber(prices.url, timeout=10) as ours:
            prices.wait_for_subscribers(1, 10)
            assert prices.stats()["subscribers"] == 1  # one of ours; a stock one cannot be counted
            heard = threading.Event()

            def listen():
                assert sub.recv() == b"eu.paris\x00101.5"
                heard.set()

            thread = threading.Thread(target=listen)
            thread.start()
            while not heard.is_set():  # nobody can tell when its subscription has come
                prices.publish(b"99", "us")
                prices.publish(b"101.5", "eu.paris")
                assert [ours.recv(10).topic, ours.recv(10).topic] == ["us", "eu.paris"]
            thread.join()


def test_a_stock_pub_is_heard_and_what_is_no_message_is_counted():
    with stock(zmq.XPUB) as pub:
        port = pub.bind_to_random_port("tcp://127.0.0.1")
        url = f"zmq+tcp://127.0.0.1:{port}?native=on&limit=1KiB"
        with ipckit.subscriber(url, topics=[">"], timeout=10) as prices:
            while pub.recv() != b"\x01\x01ipckit":
                pass
            for bad in (b"no end of topic", b"\xff\xfe\0not UTF-8", b"t\0" + bytes(1025), b"t" * 900 + b"\0x", b""):
                pub.send(bad)
            pub.send(b"a.b\0good\0bytes")
            message = prices.recv(10)
            assert (message.topic, message.value) == ("a.b", b"good\0bytes")
            assert (prices.stats()["malformed"], prices.stats()["received"]) == (5, 1)


# -- strangers ----------------------------------------------------------------------------------------------------


def test_a_message_above_the_limit_costs_its_connection():
    work = ipckit.receiver(TCP + "&limit=1KiB")
    port = work.url.host.port
    with work, stock(zmq.PUSH, port) as liar, stock(zmq.PUSH, port) as honest:
        liar.send(bytes(1 << 20))  # above MAXMSGSIZE: libzmq hangs up before it takes memory
        liar.send(bytes(1100))  # below it, for a topic might have been there; above our limit
        honest.send(b"fine")
        assert work.recv(10).value == b"fine"
        with ipckit.sender(work.url, timeout=10) as jobs, pytest.raises(errors.MessageTooLarge, match="1024"):
            jobs.send(bytes(1025))


def test_what_a_stranger_says_to_a_publisher_is_not_believed():
    with ipckit.publisher(TCP) as prices, stock(zmq.XSUB, prices.url.host.port) as xsub:
        for noise in (b"", b"\x02", b"\x07ipckit", b"\x00\x01ipckit", b"\x01" + os.urandom(500), b"\xff" * 5000):
            xsub.send(noise)
        with ipckit.subscriber(prices.url, timeout=10) as ours:
            prices.wait_for_subscribers(1, 10)
            prices.publish(b"x", "t")
            assert ours.recv(10).value == b"x"
            assert prices.stats()["subscribers"] == 1


def test_the_socket_is_closed_to_others(runtime):
    for opens in (ipckit.receiver, ipckit.publisher):
        with opens("zmq+ipc://mine?native=on"):
            assert stat.S_IMODE(os.stat(runtime / "mine.zmq").st_mode) == 0o600
            assert stat.S_IMODE(os.stat(runtime).st_mode) == 0o700
            with pytest.raises(errors.AddressInUse):
                ipckit.receiver("zmq+ipc://mine?native=on")
        assert os.listdir(runtime) == []


# -- what it is, and what it is not ---------------------------------------------------------------------------------


def test_capabilities_say_what_is_given_up():
    native, links = ipckit.capabilities(TCP), ipckit.capabilities("zmq+tcp://127.0.0.1:0")
    assert (native.redelivery, native.headers, native.reliable, native.native_topics) == (False, False, False, True)
    assert (links.redelivery, links.headers, links.reliable) == (True, True, True)
    for opens in (ipckit.listen, ipckit.connect):
        with pytest.raises(errors.Unsupported, match="channel"):
            opens(TCP)
    with pytest.raises(errors.Unsupported, match="redelivery"):
        ipckit.receiver(TCP, require={"redelivery"})


def test_what_libzmq_does_not_have_is_refused():
    for terms in ({"on_full": "drop_old"}, {"on_full": "drop_new"}, {"retain": 1}):
        with pytest.raises(errors.Unsupported, match="native=on has no"):
            ipckit.publisher(TCP, **terms)
    with pytest.raises(errors.Unsupported, match="groups"):
        ipckit.subscriber(TCP, group="g")
    with ipckit.receiver(TCP, ack="manual") as work, ipckit.sender(work.url, timeout=10) as jobs:
        jobs.send(b"x")
        message = work.recv(10)
        with pytest.raises(errors.Unsupported, match="again"):
            message.nack()
        message.ack()
        for named in ({"headers": {"a": "b"}}, {"priority": 1}):
            with pytest.raises(errors.Unsupported):
                jobs.send(b"x", **named)


def test_nobody_there():
    with pytest.raises(errors.NothingListening):
        ipckit.sender("zmq+ipc://nobody?native=on", timeout=0.1)
    with pytest.raises(errors.NothingListening):
        ipckit.subscriber("zmq+inproc://nobody?native=on", timeout=0.1)
    with ipckit.publisher(TCP) as prices, pytest.raises(errors.NothingListening):
        ipckit.sender(prices.url, timeout=0.2)  # somebody, but no receiver


@pytest.mark.parametrize("on_full", ["block", "error"])
def test_a_slow_subscriber_loses_nothing(on_full):
    """XPUB_NODROP: the publisher is held, or told."""
    prices = ipckit.publisher(TCP + "&sndhwm=10", on_full=on_full)
    slow = ipckit.subscriber(str(prices.url).replace("sndhwm", "rcvhwm"), topics=["t"], timeout=10)
    with prices, slow:
        prices.wait_for_subscribers(1, 10)

        def flood():
            for number in range(100_000):
                prices.publish(number.to_bytes(4, "big") + bytes(1000), "t", 0.2)

        with pytest.raises(errors.QueueFull if on_full == "error" else errors.Timeout):
            flood()
        sent = prices.stats()["sent"]
        assert sent >= 10
        assert [int.from_bytes(slow.recv(10).value[:4], "big") for _ in range(sent)] == list(range(sent))


def test_a_batch_that_meets_no_room_says_how_many_went():
    work = ipckit.receiver(TCP + "&rcvhwm=10")
    with work, ipckit.sender(str(work.url).replace("rcvhwm", "sndhwm"), timeout=10) as jobs:
        bodies = [number.to_bytes(4, "big") + bytes(50_000) for number in range(1000)]
        sent = jobs.send_many(bodies, timeout=0.2)
        assert 0 < sent < 1000
        assert [work.recv(10).value for _ in range(sent)] == bodies[:sent]


levels = st.sampled_from(["a", "b", "ab", "*"])
patterns = st.builds(
    lambda names, rest: ".".join(names + rest), st.lists(levels, max_size=3), st.sampled_from([[], [">"]])
)
names = st.lists(st.sampled_from(["a", "b", "ab", "c"]), max_size=4).map(".".join)


@given(patterns.filter(bool), names)
def test_a_prefix_hides_nothing_that_its_pattern_covers(pattern, topic):
    from ipckit.transports._zmq_native import END_OF_TOPIC, _cover, prefix_of

    wire = topic.encode() + END_OF_TOPIC
    covered = _cover((pattern,))
    heard = wire.startswith(prefix_of(pattern)) and (covered is None or covered(topic))
    assert heard == matches(pattern, topic)
