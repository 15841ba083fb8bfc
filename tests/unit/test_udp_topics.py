"""Topics over UDP, beyond their contract: exact accounts, many publishers, strangers, leases, restarts."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import ipckit
from ipckit import aio, errors
from ipckit._url import Host, parse
from ipckit.testing.conformance import free_port
from ipckit.transports import _udpgroup, _udppublisher, _udpsubscriber, udp
from ipckit.transports import _udpwire as wire
from ipckit.transports._udpledger import Ledger
from ipckit.transports._udpsock import Allowance, Cookies

_numbers = itertools.count(1)


@pytest.fixture
def group():
    return (
        f"udp://239.254.{os.getpid() % 256}.{next(_numbers) % 256}:{free_port(socket.SOCK_DGRAM)}?interface=127.0.0.1"
    )


@pytest.fixture
def place():
    return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"


@pytest.fixture(params=["group", "place"])
def url(request):
    return request.getfixturevalue(request.param)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def received(subscriber, quiet=0.3):
    got = []
    try:
        while True:
            got.append(subscriber.recv(quiet))
    except (errors.Timeout, errors.PeerClosed):
        return got


# -- the ledger -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.sampled_from(["sent", "lost", "twice", "late", "told"]), st.just(None)), max_size=60),
    st.integers(0, 20),
    st.integers(0, 60),
)
@example([("lost", None), ("sent", None)], 0, 5)
def test_received_and_missed_is_sent(events, known_at, welcomed_at):
    """Whatever is lost, doubled or overtaken, and whenever the WELCOME comes."""
    ledger = Ledger()
    delivered, missed, held, number, counted = [], 0, [], 0, None
    for at, (event, _) in enumerate(events):
        if number >= known_at and counted is None:
            counted = number
        if at == welcomed_at and counted is not None:
            missed += ledger.welcomed(counted)
        if event == "told":
            missed += ledger.told(number)
            continue
        number += 1
        arrivals = {"sent": [number], "twice": [number, number], "late": [], "lost": []}[event]
        if event == "late":
            held.append(number)
        else:
            arrivals = arrivals + held if event == "sent" else arrivals
            held = [] if event == "sent" else held
        for each in arrivals:
            gap = ledger.received(each)
            if gap is not None:
                delivered.append(each)
                missed += gap
    if counted is not None:
        missed += ledger.welcomed(counted)
    missed += ledger.told(number)
    assert delivered == sorted(set(delivered))
    assert ledger.counted_from is not None
    if counted is not None:
        assert ledger.counted_from <= counted or not delivered
    assert len(delivered) + missed == number - ledger.counted_from


# -- the datagrams --------------------------------------------------------------------------------------------------

eight = st.binary(min_size=8, max_size=8)
sixteen = st.binary(min_size=16, max_size=16)
numbers = st.integers(0, 2**58)
level = st.text("abcdé", min_size=1, max_size=3)


@given(st.binary(max_size=100), st.integers(0, 255))
def test_any_bytes_are_read_or_refused(rest, kind):
    for datagram in (rest, b"iK\x01" + bytes((kind,)) + rest):
        try:
            heard = wire.read(datagram, len(datagram))
        except errors.ProtocolError:
            continue
        assert heard.frame_at <= len(datagram)
        assert len(heard.patterns) <= wire.MAX_PATTERNS


@given(eight, eight, sixteen, numbers, st.lists(level, max_size=5).map(tuple), st.binary(max_size=20))
def test_what_is_written_is_read(session, member, cookie, number, patterns, body):
    def read(datagram):
        return wire.read(bytearray(datagram) + b"rubbish of an earlier one", len(datagram))

    heard = read(wire.data(session, number) + body)
    assert (heard.kind, heard.session, heard.number, heard.frame_at) == (wire.DATA, session, number, wire.DATA_HEAD)
    heard = read(wire.kept(session, number, member) + body)
    assert (heard.kind, heard.number, heard.member, heard.frame_at) == (wire.KEPT, number, member, wire.KEPT_HEAD)
    assert read(wire.number(session, number)) == wire.Heard(wire.NUMBER, session, number, frame_at=wire.DATA_HEAD)
    assert read(wire.number(session, number, bye=True)).kind == wire.BYE
    heard = read(wire.join(session, member, cookie, patterns))
    assert (heard.kind, heard.member, heard.cookie, heard.patterns) == (wire.JOIN, member, cookie, patterns)
    heard = read(wire.challenge(session, member, cookie))
    assert (heard.kind, heard.member, heard.cookie) == (wire.CHALLENGE, member, cookie)
    heard = read(wire.welcome(session, member, number))
    assert (heard.kind, heard.member, heard.number) == (wire.WELCOME, member, number)
    assert read(wire.leave(session, member)) == wire.Heard(wire.LEAVE, session, member=member)


def test_no_answer_is_larger_than_its_question():
    question = len(wire.join(wire.NO_SESSION, bytes(8), wire.NO_COOKIE, (">",)))
    assert len(wire.challenge(bytes(8), bytes(8), bytes(16))) <= question
    assert len(wire.welcome(bytes(8), bytes(8), 1)) <= question


def test_allowance_and_cookies():
    allowance = Allowance(3, 10.0)
    assert [allowance.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert allowance.take(100.11)
    assert not allowance.take(100.12)
    cookies = Cookies(16)
    cookie = cookies.make(("127.0.0.1", 5), b"me")
    assert cookies.good(cookie, ("127.0.0.1", 5), b"me")
    assert not cookies.good(cookie, ("127.0.0.1", 6), b"me")
    assert not cookies.good(cookie, ("127.0.0.1", 5), b"you")
    assert not Cookies(16).good(cookie, ("127.0.0.1", 5), b"me")


# -- topics, counts, ends -------------------------------------------------------------------------------------------


def test_topics_and_headers(url):
    with (
        ipckit.publisher(url) as publisher,
        ipckit.subscriber(publisher.url, topics=["eu.*", "us"], timeout=5) as some,
        ipckit.subscriber(publisher.url, timeout=5) as everything,
    ):
        publisher.wait_for_subscribers(2, 5)
        for topic in ("eu.paris", "eu", "us", "eu.paris.north", "", "us"):
            publisher.publish(b"x", topic, headers={"traceparent": topic or "none"})
        got = [message for _ in range(6) for message in [everything.recv(5)]]
        assert [message.topic for message in got] == ["eu.paris", "eu", "us", "eu.paris.north", "", "us"]
        assert got[0].headers == {"traceparent": "eu.paris"}
        assert len({message.id for message in got}) == 6
        assert [some.recv(5).topic for _ in range(3)] == ["eu.paris", "us", "us"]
        stats = some.stats()
        # In a group all messages come, and are sorted out here; else they are not even sent.
        assert (stats["received"], stats["dropped"]) == (3, 0)
        assert stats["unwanted"] == (3 if "239" in str(url) else 0)


def test_several_publishers_in_a_group(group):
    with (
        ipckit.subscriber(group) as subscriber,
        ipckit.publisher(group) as one,
        ipckit.publisher(group) as two,
    ):
        for publisher in (one, two):
            publisher.wait_for_subscribers(1, 5)
        threads = [
            threading.Thread(target=lambda p=p, n=n: [p.publish(b"%d %d" % (n, i), "t") for i in range(200)])
            for n, p in enumerate((one, two))
        ]
        for thread in threads:
            thread.start()
        got = received(subscriber)
        for thread in threads:
            thread.join()
        for number in (b"0", b"1"):
            theirs = [int(m.value.split()[1]) for m in got if m.value.startswith(number)]
            assert theirs == sorted(theirs)
        assert len(got) + subscriber.stats()["dropped"] == 400
        assert subscriber.stats()["publishers"] == 2
        one.close()  # and the subscriber goes on
        two.publish(b"still here", "t")
        assert subscriber.recv(5).value == b"still here"


def lossy(sock, lose):
    """The socket, with every datagram lost that `lose` says so of."""

    class Lossy:
        def sendmsg(self, parts, *rest):
            whole = b"".join(parts)
            return len(whole) if lose(whole) else sock.sendmsg(parts, *rest)

        def __getattr__(self, name):
            return getattr(sock, name)

    return Lossy()


@pytest.mark.parametrize("lost", [{1}, {3, 4}, {10}, {8, 9, 10}, set(range(1, 11))])
def test_what_is_lost_on_the_way_is_counted(url, lost):
    """At the beginning, in the midst, at the end; and all of it."""
    with ipckit.publisher(url) as publisher, ipckit.subscriber(publisher.url, timeout=5) as subscriber:
        publisher.wait_for_subscribers(1, 5)
        outlet = publisher._outlet
        outlet._sock = lossy(
            outlet._sock, lambda d: d[wire.KIND_AT] == wire.DATA and wire.read(d, len(d)).number in lost
        )
        for number in range(1, 11):
            publisher.publish(b"%d" % number, "t")
        got = received(subscriber)
        assert [int(m.value) for m in got] == [n for n in range(1, 11) if n not in lost]
        at = 0
        for message in got:
            assert message.gap == int(message.value) - at - 1
            at = int(message.value)
        until(lambda: received(subscriber, 0.01) or subscriber.stats()["dropped"] == len(lost))


def test_a_lost_goodbye_is_said_again(place):
    publisher = ipckit.publisher(place)
    with ipckit.subscriber(publisher.url, timeout=5) as subscriber:
        publisher.publish(b"x", "t")
        said = []
        outlet = publisher._outlet
        outlet._sock = lossy(
            outlet._sock, lambda d: d[wire.KIND_AT] == wire.BYE and not said.append(1) and len(said) < 3
        )
        publisher.close()
        assert subscriber.recv(5).value == b"x"
        with pytest.raises(errors.PeerClosed):
            subscriber.recv(5)
        assert len(said) >= 3
        with pytest.raises(errors.PeerClosed):
            subscriber.recv(5)
        until(lambda: not outlet.lingers())  # who has left is not waited for


def test_retained_values(url):
    with ipckit.publisher(url, retain=2) as publisher, ipckit.subscriber(publisher.url, timeout=5) as early:
        publisher.wait_for_subscribers(1, 5)
        for value, topic in ((b"1", "a"), (b"2", "b"), (b"3", "a"), (b"4", "a"), (b"5", "c")):
            publisher.publish(value, topic)
        assert len([early.recv(5) for _ in range(5)]) == 5
        with ipckit.subscriber(publisher.url, topics=["a", "b"], timeout=5) as late:
            publisher.wait_for_subscribers(2, 5)
            publisher.publish(b"6", "b")
            got = [late.recv(5) for _ in range(4)]
            assert [(m.value, m.topic) for m in got] == [(b"2", "b"), (b"3", "a"), (b"4", "a"), (b"6", "b")]
            assert late.stats()["dropped"] == 0
        assert early.recv(5).value == b"6"
        assert early.recv  # and of what was repeated for the late one it saw nothing
        assert (early.stats()["received"], early.stats()["dropped"]) == (6, 0)


def test_subscribers_are_counted(url, monkeypatch):
    """They come, leave, and when they are killed their lease ends."""
    monkeypatch.setattr(_udppublisher, "LEASE", 0.5)
    monkeypatch.setattr(_udpsubscriber, "RENEW", 0.1)
    with ipckit.publisher(url) as publisher:
        with ipckit.subscriber(publisher.url, timeout=5) as one, ipckit.subscriber(publisher.url, timeout=5) as two:
            publisher.wait_for_subscribers(2, 5)
            deadline = time.monotonic() + 1.2  # longer than a lease, and nobody calls
            until(lambda: time.monotonic() > deadline)
            assert publisher.stats()["subscribers"] == 2
            one.close()
            until(lambda: publisher.stats()["subscribers"] == 1)
            two._intake._leave = lambda: None
        until(lambda: publisher.stats()["subscribers"] == 0)
        with pytest.raises(errors.Timeout):
            publisher.wait_for_subscribers(1, 0.1)


def test_a_publisher_that_starts_anew_is_found(place):
    """Nobody counted what it said in between."""
    first = ipckit.publisher(place)
    with ipckit.subscriber(first.url, timeout=5) as subscriber:
        first.publish(b"1", "t")
        assert subscriber.recv(5).value == b"1"
        outlet = first._outlet
        outlet._leases.clear()
        outlet._sock = lossy(outlet._sock, lambda d: True)  # as if killed: no goodbye
        first.close()
        with ipckit.publisher(place) as second:
            subscriber._intake._source.join_at = 0  # now, and not when the lease has to be renewed
            with pytest.raises(errors.Timeout):
                subscriber.recv(0.2)
            second.wait_for_subscribers(1, 10)
            second.publish(b"2", "t")
            message = subscriber.recv(5)
            assert (message.value, message.gap) == (b"2", -1)
            assert subscriber.stats()["reconnects"] == 1


def test_the_port_is_free_at_once(place):
    """Though the first still says goodbye to one that does not listen."""
    first = ipckit.publisher(place)
    subscriber = ipckit.subscriber(first.url, timeout=5)
    first.close()
    with ipckit.publisher(place) as second:
        assert second.url == first.url
        with pytest.raises(errors.AddressInUse):
            ipckit.publisher(place)
    subscriber.close()


def test_limits(url):
    with ipckit.publisher(url) as publisher, ipckit.subscriber(publisher.url, timeout=5) as subscriber:
        publisher.wait_for_subscribers(1, 5)
        largest = ipckit.capabilities(publisher.url).max_message
        publisher.publish(bytes(largest))
        assert subscriber.recv(5).value == bytes(largest)
        with pytest.raises(errors.MessageTooLarge, match="datagram"):
            publisher.publish(bytes(largest + 1))
        assert publisher.stats()["sent"] == 1


@pytest.mark.parametrize("on_full", ["block", "drop_new", "error"])
def test_no_room_in_our_own_socket(place, on_full):
    """The one thing that a publisher of datagrams may wait for."""
    with (
        ipckit.publisher(place, on_full=on_full) as publisher,
        ipckit.subscriber(place, timeout=5) as subscriber,
    ):
        full = True
        outlet, real = publisher._outlet, publisher._outlet._sock

        class Full:
            def sendmsg(self, *args):
                if full:
                    raise BlockingIOError
                return real.sendmsg(*args)

            def __getattr__(self, name):
                return getattr(real, name)

        outlet._sock = Full()
        if on_full == "block":
            with pytest.raises(errors.OutcomeUnknown):  # taken, and still here
                publisher.publish(b"1", "t", 0.05)
            with pytest.raises(errors.Timeout):
                publisher.publish(b"2", "t", 0.05)
        else:
            publisher.publish(b"1", "t", 0.05)
            if on_full == "error":
                with pytest.raises(errors.QueueFull):
                    publisher.publish(b"2", "t", 0.05)
            else:
                publisher.publish(b"2", "t", 0.05)
        full = False
        publisher.publish(b"3", "t", 5)
        first, second = subscriber.recv(5), subscriber.recv(5)
        assert (first.value, second.value) == (b"1", b"3")
        assert second.gap == publisher.stats()["dropped"] == (on_full == "drop_new")


# -- strangers ------------------------------------------------------------------------------------------------------


def shout(url, datagrams):
    """From somebody else, to the address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for datagram in datagrams:
            sock.sendto(datagram, (url.host.name, url.host.port))


def junk():
    member, session = os.urandom(8), os.urandom(8)
    huge = b"iK\x01D" + session + (2**63).to_bytes(8, "big") + b"\x02\x3f" + b"\xff" * 40
    yield from (b"", b"i", b"iK\x01", b"iK\x01D", b"iK\x02D" + bytes(100), os.urandom(1400), huge)
    yield wire.data(session, 1) + b"\x02\x20\xff\xff\xff\xff"  # 65535 headers announced
    yield wire.join(session, member, os.urandom(16), (">",) * 3)
    yield b"iK\x01J" + session + member + bytes(16) + b" " * 5000
    yield wire.welcome(session, member, 1)
    yield wire.challenge(session, member, bytes(16))
    yield wire.number(session, 10**9, bye=True)


def test_strangers_cost_a_count(url):
    with ipckit.publisher(url) as publisher, ipckit.subscriber(publisher.url, timeout=5) as subscriber:
        publisher.wait_for_subscribers(1, 5)
        shout(publisher.url, junk())
        intake = subscriber._intake
        _, port = intake._own.getsockname() if hasattr(intake, "_own") else intake._data.getsockname()
        shout(parse(f"udp://127.0.0.1:{port}"), junk())
        publisher.publish(b"x", "t")
        message = subscriber.recv(5)
        assert (message.value, message.gap) == (b"x", 0)
        if "239" in url:
            until(lambda: subscriber.stats()["refused"] >= 7)
        else:
            until(lambda: publisher.stats()["refused"] >= 7)
        assert publisher.stats()["subscribers"] == 1


def answer(sock):
    """What the publisher says to us; its last number it may say at any time."""
    while True:
        datagram = sock.recv(1000)
        heard = wire.read(datagram, len(datagram))
        if heard.kind != wire.NUMBER:
            return heard


def test_spoofed_joins_keep_nothing(place, monkeypatch):
    """Without its cookie nobody gets in; with it, so many at a time and so many at all."""
    monkeypatch.setattr(_udppublisher, "_LEASES", 5)
    with ipckit.publisher(place) as publisher:
        shout(publisher.url, [wire.join(bytes(8), b"%08d" % n, os.urandom(16)) for n in range(500)])
        with ExitStack() as opened:
            sockets = []
            for n in range(8):
                sock = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.settimeout(5)
                sock.connect(("127.0.0.1", publisher.url.host.port))
                sockets.append(sock)
                sock.send(wire.join(bytes(8), b"%08d" % n, bytes(16)))
                heard = answer(sock)
                assert heard.kind == wire.CHALLENGE
                sock.send(wire.join(bytes(8), b"%08d" % n, heard.cookie))
                if n < 5:
                    assert answer(sock).kind == wire.WELCOME
            until(lambda: publisher.stats()["refused"] == 3)
            assert publisher.stats()["subscribers"] == 5
            for n in range(5):
                sockets[n].send(wire.leave(bytes(8), b"somebody"))
                sockets[n].send(wire.leave(bytes(8), b"%08d" % n))
            until(lambda: publisher.stats()["subscribers"] == 0)


def test_who_comes_to_a_dead_ones_address_takes_its_place(place):
    """And is sent nothing that was the other's."""
    with ipckit.publisher(place) as publisher, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect(("127.0.0.1", publisher.url.host.port))
        for member in (b"the dead", b"the next"):
            sock.send(wire.join(bytes(8), member, bytes(16)))
            cookie = answer(sock).cookie
            sock.send(wire.join(bytes(8), member, cookie))
            welcome = answer(sock)
            assert (welcome.kind, welcome.member) == (wire.WELCOME, member)
            publisher.publish(b"x", "t")
            heard = answer(sock)
            assert (heard.kind, heard.number) == (wire.DATA, welcome.number + 1)
        assert publisher.stats()["subscribers"] == 1


def test_made_up_publishers_do_not_crowd_out_real_ones(group, monkeypatch):
    monkeypatch.setattr(_udpgroup, "_SOURCES", 20)
    with ipckit.subscriber(group) as subscriber, ipckit.publisher(group) as publisher:
        publisher.wait_for_subscribers(1, 5)
        shout(publisher.url, [wire.data(os.urandom(8), 7) for _ in range(100)])
        assert received(subscriber, 0.1) == []
        assert len(subscriber._intake._sources) <= 20
        publisher.publish(b"x", "t")
        assert subscriber.recv(5).gap == 0


# -- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "error", "said"),
    [
        (lambda: ipckit.sender("udp://127.0.0.1:5000"), errors.Unsupported, "'reliable'"),
        (lambda: ipckit.receiver("udp://239.255.0.1:5000"), errors.Unsupported, "'reliable'"),
        (lambda: ipckit.connect("udp://239.255.0.1:5000"), errors.Unsupported, "pubsub"),
        (lambda: ipckit.subscriber("udp://239.255.0.1:5000", group="g"), errors.Unsupported, "'reliable'"),
        (lambda: ipckit.publisher("udp://239.255.0.1:5000", on_full="drop_old"), errors.Unsupported, "drop_new"),
        (lambda: ipckit.publisher("udp://239.255.0.1:0"), errors.BadUrl, "port"),
        (lambda: ipckit.subscriber("udp://127.0.0.1:0"), errors.BadUrl, "port"),
        (lambda: ipckit.publisher("udp://127.0.0.1:5000?ttl=2"), errors.BadOption, "multicast"),
        (lambda: ipckit.publisher("udp://239.255.0.1:5000?ttl=256"), errors.BadOption, "255"),
        (lambda: ipckit.publisher("udp://239.255.0.1:5000?interface=none7"), errors.BadOption, "none7"),
        (lambda: ipckit.subscriber("udp://239.255.0.1:5000?interface=192.0.2.77"), errors.BadOption, "interface="),
        (lambda: ipckit.subscriber("udp://127.0.0.1:9", timeout=0.1), errors.NothingListening, "refused"),
    ],
)
def test_what_cannot_be(action, error, said):
    with pytest.raises(error, match=said):
        action()


def test_a_name_with_several_addresses(monkeypatch):
    """localhost may be ::1 first, and the publisher at 127.0.0.1."""
    real = udp._inet.resolve

    def resolve(url, host, *args, **named):
        found = yield from real(url, Host("127.0.0.1", host.port), *args, **named)
        return [udp._inet.Address(socket.AF_INET6, ("::1", host.port, 0, 0), host), *found]

    with ipckit.publisher("udp://127.0.0.1:0") as publisher:
        monkeypatch.setattr(udp._inet, "resolve", resolve)
        with ipckit.subscriber(f"udp://localhost:{publisher.url.host.port}", timeout=10) as subscriber:
            publisher.publish(b"x")
            assert subscriber.recv(5).value == b"x"


def test_a_mute_place_is_no_publisher(place):
    with ipckit.listen(place), pytest.raises(errors.NothingListening):
        ipckit.subscriber(place, timeout=0.2)


def test_options_of_the_socket(group):
    with (
        ipckit.publisher(group + "&loopback=off&ttl=7") as publisher,
        ipckit.subscriber(group + "&buffer=20000") as sub,
    ):
        assert publisher.native.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP) == 0
        assert publisher.native.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL) == 7
        assert sub.native.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 40000  # Linux doubles it


def _sends_to_lo(url):
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, socket.if_nametoindex("lo"))
        place = parse(url).host
        return probe.connect_ex((place.name, place.port)) == 0


def test_ipv6_group():
    """Joining works on every machine with IPv6; where it has a multicast route on lo, so does the rest."""
    url = f"udp://[ff12::{next(_numbers):x}:{os.getpid():x}]:{free_port(socket.SOCK_DGRAM)}?interface=lo"
    with ipckit.subscriber(url) as subscriber:
        if not _sends_to_lo(url):
            with pytest.raises(errors.BadOption, match="interface="):
                ipckit.publisher(url)
            return
        with ipckit.publisher(url) as publisher:
            publisher.wait_for_subscribers(1, 5)
            publisher.publish(b"six", "t")
            assert subscriber.recv(5).value == b"six"


def test_one_datagram_whatever_the_number_of_subscribers(group):
    sent = []
    with ipckit.publisher(group) as publisher:
        subscribers = [ipckit.subscriber(group) for _ in range(4)]
        publisher.wait_for_subscribers(4, 5)
        outlet = publisher._outlet
        outlet._sock = lossy(outlet._sock, lambda d: d[wire.KIND_AT] == wire.DATA and sent.append(d))
        publisher.publish(b"x", "t")
        assert len(sent) == 1
        assert [subscriber.recv(5).value for subscriber in subscribers] == [b"x"] * 4
        for subscriber in subscribers:
            subscriber.close()


def test_both_shells_meet(url):
    async def main():
        async with await aio.publisher(url) as publisher, await aio.subscriber(publisher.url, timeout=5) as subscriber:
            await publisher.wait_for_subscribers(1, 5)
            task = asyncio.create_task(subscriber.recv(5))
            await asyncio.sleep(0)
            await publisher.publish(b"x", "t")
            assert (await task).value == b"x"

    asyncio.run(main())
