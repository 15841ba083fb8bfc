"""nats://: what the conformance suite cannot know of: the server's part, its losses, its logins and its ends."""

import asyncio
import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nats
import pytest
import trustme

import ipckit
import ipckit.aio
from ipckit import _wait, errors
from ipckit._url import parse
from ipckit.testing.servers import nats_server
from ipckit.transports import _natsclient
from ipckit.transports import _natswire as wire


@pytest.fixture(scope="module")
def server():
    try:
        with nats_server() as running:
            yield running
    except errors.MissingDependency as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))


@pytest.fixture
def url(server):
    return server.address(f"/unit.{secrets.token_hex(4)}")


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def meet(url, pool, connect_url=None):
    """(listener's end, client's end)"""
    with ipckit.listen(url, timeout=10) as listener:
        connecting = pool.submit(ipckit.connect, connect_url or url, timeout=10)
        return listener.accept(timeout=10), connecting.result(10)


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def publish(server, subject, *payloads):
    async def main():
        client = await nats.connect(server.url)
        for payload in payloads:
            await client.publish(subject, payload)
        await client.flush()
        await client.close()

    asyncio.run(main())


def subject_of(channel):
    """Where the peer writes to it."""
    return channel._link._inbox.card["subject"]


# -- losses -----------------------------------------------------------------------------------------------------------


def test_a_lost_payload_is_an_error_and_what_came_before_it_is_delivered(url, pool):
    one, two = meet(url, pool)
    with one, two:
        one.send(b"first")
        one._link._outbox.number += 1  # as if the server had dropped one
        one.send(b"third")
        assert two.recv(timeout=10) == b"first"
        with pytest.raises(errors.PeerError, match="dropped") as caught:
            two.recv(timeout=10)
        assert type(caught.value) is errors.PeerError
        with pytest.raises(errors.PeerError, match="dropped"):
            two.send(b"more")


def test_the_loss_of_the_last_payload_shows_without_another_message(url, pool):
    one, two = meet(url, pool)
    with one, two:
        one._link._outbox.number += 1
        with pytest.raises(errors.PeerError, match="dropped"):
            two.recv(timeout=10)


# -- bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        wire.pack(99, 1, b"what is this"),
        wire.pack(wire.MESSAGES, 1, b"\xff\xff\xff\xff"),
        wire.pack(wire.MORE, 1, b"a part of nothing"),
        wire.pack(wire.FIRST, 1, b"short"),
        wire.pack_first(1, 1 << 62, memoryview(b"too long")),
        wire.pack_first(1, 3, memoryview(b"longer than it says")),
        wire.pack_first(1, 3, memoryview(b"")),
        wire.pack(wire.CREDIT, 1, b"\0"),
        wire.pack_credit(1, 1 << 40),
    ],
)
def test_bad_payloads_cost_only_their_channel(server, url, pool, payload):
    with ipckit.listen(url, timeout=10) as listener:
        clients = [pool.submit(ipckit.connect, url, timeout=10) for _ in range(2)]
        served = [listener.accept(timeout=10) for _ in range(2)]
        for end in served:
            end.send(b"hello")
        channels = [client.result(10) for client in clients]
        for channel in channels:
            assert channel.recv(timeout=10) == b"hello"
        publish(server, subject_of(served[0]), payload)
        with pytest.raises(errors.ProtocolError):  # the number is right: the READY of the handshake was the first
            served[0].recv(timeout=10)
        bystander = next(c for c in channels if c.peer.address == subject_of(served[1]))
        bystander.send(b"still here")
        assert served[1].recv(timeout=10) == b"still here"
        for end in (*served, *channels):
            end.close()


def test_garbage_at_the_rendezvous_turns_nobody_away(server, url, pool):
    subject = "ipckit.ch." + parse(url).path[1:]
    evil = wire.pack(wire.MESSAGE, 0, b'H{"version":1,"card":{"subject":"ipckit.ch.other.>"},"limit":1}')
    with ipckit.listen(url, timeout=10) as listener:
        publish(server, subject, b"", b"x" * 100, wire.pack(wire.MESSAGE, 0, b"nonsense"), evil, wire.pack(0, 0))
        connecting = pool.submit(ipckit.connect, url, timeout=10)
        with listener.accept(timeout=10) as one, connecting.result(10) as two:
            one.send(b"ok")
            assert two.recv(timeout=10) == b"ok"


def test_a_peer_that_ignores_its_credit_is_stopped(server, url, pool):
    url += "?window=64KiB"
    one, two = meet(url, pool)
    with one, two:
        part = b"x" * 60_000
        publish(server, subject_of(two), *(wire.pack(wire.MESSAGE, n, part) for n in range(1, 40)))
        with pytest.raises(errors.ProtocolError, match="credit"):
            two.send_many([two.recv(timeout=10) for _ in range(40)])


# -- flow -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", ["4KiB", "64KiB", "4MiB"])
def test_messages_far_above_the_window_and_the_servers_limit(url, pool, window):
    one, two = meet(f"{url}?window={window}", pool)
    with one, two:
        big = secrets.token_bytes(1 << 20) * 3
        sending = pool.submit(lambda: [one.send(b"before"), one.send(big), one.send(b"after")])
        assert two.recv(timeout=20) == b"before"
        assert two.recv(timeout=20) == big
        assert two.recv(timeout=20) == b"after"
        sending.result(10)


def test_a_small_max_payload_is_kept():
    with nats_server(max_payload=8192) as server, ThreadPoolExecutor(2) as pool:
        one, two = meet(server.address("/small"), pool)
        with one, two:
            frames = [secrets.token_bytes(size) for size in (0, 1, 8191, 8192, 8193, 100_000)] * 3
            sending = pool.submit(one.send_many, frames, 20)
            assert [two.recv(timeout=20) for _ in frames] == frames
            assert sending.result(10) == len(frames)


def test_messages_sent_together_travel_together(url, pool):
    one, two = meet(url, pool)
    with one, two:
        before = one._link._outbox.number
        assert one.send_many([b"x" * 64] * 1000, timeout=10) == 1000
        assert one._link._outbox.number - before < 20
        received = []
        while len(received) < 1000:
            received += two.recv_many(1000, timeout=10)
        assert received == [b"x" * 64] * 1000


def test_async_backpressure_ends(url):
    async def main():
        async with await ipckit.aio.listen(url, timeout=10) as listener:
            connecting = asyncio.create_task(ipckit.aio.connect(url, timeout=10))
            one = await listener.accept(timeout=10)
            two = await connecting
            async with one, two:
                sent = await one.send_many([b"x" * 50_000] * 100, timeout=0.5)
                assert 0 < sent < 100
                for _ in range(sent):
                    await two.recv(timeout=10)
                await one.send(b"again", timeout=10)
                assert await two.recv(timeout=10) == b"again"

    asyncio.run(main())


# -- names ----------------------------------------------------------------------------------------------------------------


def test_of_many_who_claim_a_name_at_once_one_gets_it(url, pool):
    start = threading.Barrier(6)

    def claim():
        start.wait()
        try:
            return ipckit.listen(url, timeout=20)
        except errors.AddressInUse:
            return None

    listeners = [
        listener for listener in [claim_.result(30) for claim_ in [pool.submit(claim) for _ in range(6)]] if listener
    ]
    for listener in listeners:
        listener.close()
    assert len(listeners) == 1


@pytest.mark.parametrize("path", ["", "/", "/a b", "/a..b", "/a.*", "/>", "/a/b", "/é", "/" + "x" * 300])
def test_names_that_would_be_other_subjects_are_refused(server, path):
    with pytest.raises(errors.BadUrl):
        ipckit.listen(server.url + parse("nats://h" + path).path.replace(" ", "%20"), timeout=5)


# -- the server ends --------------------------------------------------------------------------------------------------------


def test_a_killed_server_ends_channels_and_not_listeners():
    with nats_server() as server, ThreadPoolExecutor(4) as pool:
        url = server.address("/again")
        with ipckit.listen(url, timeout=10) as listener:
            connecting = pool.submit(ipckit.connect, url, timeout=10)
            one, two = listener.accept(timeout=10), connecting.result(10)
            two.send(b"before")
            until(lambda: one._link._inbox.payloads or one._link.try_flush())
            waiting = pool.submit(two.recv, timeout=20)
            server.kill()
            for receive in (lambda: waiting.result(20), lambda: [one.recv(timeout=10) for _ in range(2)]):
                with pytest.raises(errors.PeerError, match="lost") as caught:
                    receive()
                assert type(caught.value) is errors.PeerError
            with pytest.raises(errors.PeerError):
                two.send(b"after")
            one.close()
            two.close()
            server.start()
            connecting = pool.submit(ipckit.connect, url, timeout=20)
            with listener.accept(timeout=20) as one, connecting.result(20) as two:
                two.send(b"a new session")
                assert one.recv(timeout=10) == b"a new session"


def test_connect_waits_for_the_server_too():
    with nats_server() as server, ThreadPoolExecutor(2) as pool:
        url = server.address("/late")
        server.stop()
        with pytest.raises(errors.NothingListening, match="no NATS server"):
            ipckit.connect(url, timeout=0.2)
        with pytest.raises(errors.NothingListening, match="no NATS server"):
            ipckit.listen(url, timeout=5)
        connecting = pool.submit(ipckit.connect, url, timeout=20)
        server.start()
        with (
            ipckit.listen(url, timeout=10) as listener,
            listener.accept(timeout=20) as one,
            connecting.result(20) as two,
        ):
            two.send(b"x")
            assert one.recv(timeout=10) == b"x"


def test_a_connecting_client_outlives_a_restart_of_the_server():
    with nats_server() as server, ThreadPoolExecutor(2) as pool:
        url = server.address("/restart")
        connecting = pool.submit(ipckit.connect, url, timeout=30)
        time.sleep(0.2)
        server.kill()
        server.start()
        with ipckit.listen(url, timeout=10) as listener, listener.accept(timeout=20), connecting.result(20):
            pass


def test_a_server_that_says_nothing_is_no_server():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"nats://127.0.0.1:{silent.getsockname()[1]}/x"
        with pytest.raises(errors.NothingListening):
            ipckit.connect(url, timeout=0.3)


def test_one_of_several_servers_is_enough(server, pool):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead, live = nobody.getsockname()[1], parse(server.url).host.port
        url = f"nats://127.0.0.1:{dead},127.0.0.1:{live}/several"
        one, two = meet(url, pool)
        with one, two:
            one.send(b"x")
            assert two.recv(timeout=10) == b"x"


# -- logins, TLS ------------------------------------------------------------------------------------------------------------


def test_logins_and_their_secrets():
    with nats_server(user="us", password="s3cret/:@") as server, ThreadPoolExecutor(2) as pool:
        one, two = meet(server.address("/x"), pool)
        one.close()
        two.close()
        host = parse(server.url).host
        with pytest.raises(errors.BadUrl, match="token=") as unclear:
            ipckit.connect(f"nats://wr0ng@{host}/x", timeout=10)
        assert "wr0ng" not in str(unclear.value)
        for login in ("", "us:wr0ng@"):
            with pytest.raises(errors.AccessDenied) as caught:
                ipckit.connect(f"nats://{login}{host}/x", timeout=10)
            assert "wr0ng" not in str(caught.value) + repr(caught.value.__cause__)
            with pytest.raises(errors.AccessDenied):
                ipckit.listen(f"nats://{login}{host}/x", timeout=10)
    with nats_server(token="t0ken") as server, ThreadPoolExecutor(2) as pool:
        host = parse(server.url).host
        one, two = meet(server.address("/x"), pool, f"nats://{host}/x?token=t0ken")
        assert "t0ken" not in repr(one) + repr(two) + str(one.url)
        one.close()
        two.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    made = trustme.CA()
    made.cert_pem.write_to_path(directory / "ca.pem")
    trustme.CA().cert_pem.write_to_path(directory / "other.pem")
    issued = made.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    return directory


def test_tls_trusts_nobody_by_itself(authority):
    with nats_server(tls=(authority / "cert.pem", authority / "key.pem"), user="us", password="pw") as server:
        for options in ({}, {"cafile": str(authority / "other.pem")}):
            with pytest.raises(errors.AccessDenied, match="TLS"):
                ipckit.connect(server.address("/x", **options), timeout=10)
        with pytest.raises(errors.BadOption, match="nowhere"):
            ipckit.connect(server.address("/x", cafile="/nowhere"), timeout=10)


@pytest.mark.parametrize("login", ["us:s3cret@", ""])
def test_nothing_is_said_to_a_server_that_does_not_encrypt(authority, login):
    """A server in the middle could answer without TLS and read the login."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            listener.settimeout(10)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5)
                connection.sendall(
                    b'INFO {"server_id":"x","version":"2.11.0","max_payload":1048576,"headers":true}\r\n'
                )
                while data := connection.recv(4096):
                    heard.append(data)
                    if b"PING" in data:
                        connection.sendall(b"PONG\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"nats+tls://{login}127.0.0.1:{listener.getsockname()[1]}/x?cafile={authority / 'ca.pem'}"
        with pytest.raises(errors.AccessDenied, match="TLS"):
            ipckit.connect(url, timeout=10)
        thread.join(10)
    assert b"s3cret" not in b"".join(heard)


def test_a_missing_nkeys_is_named(url, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nkeys" else True)
    with pytest.raises(errors.MissingDependency, match="nkeys"):
        ipckit.connect(url + "?creds=/tmp/x", timeout=5)


# -- life -----------------------------------------------------------------------------------------------------------------


def test_a_caller_that_does_not_call_stays_connected(url, pool, monkeypatch):
    """Probes of the peer are answered, and the server's pings, while nobody is inside the library."""
    one, two = meet(url, pool)
    with one, two:
        pings = two.native._pings_outstanding, two.native.stats["in_msgs"]
        time.sleep(2.5)
        assert two.native.is_connected
        assert two.native.stats["in_msgs"] > pings[1]  # somebody has turned its loop
        one.send(b"x")
        assert two.recv(timeout=10) == b"x"


def test_blocking_calls_inside_a_running_loop(url, pool):
    async def main():
        one, two = meet(url, pool)
        with one, two:
            one.send(b"from a notebook")
            return two.recv(timeout=10)

    assert asyncio.run(main()) == b"from a notebook"


def test_an_interrupted_client_says_so(url, pool):
    one, two = meet(url, pool)

    def interrupt(*_):
        raise KeyboardInterrupt

    with one, two:
        with pytest.raises(KeyboardInterrupt):
            one._link._home.do(interrupt)
        with pytest.raises(errors.PeerError, match="interrupted"):
            one.recv(timeout=10)
        with pytest.raises(errors.PeerError, match="interrupted"):
            one.send(b"x")


def test_a_round_trip_that_was_given_up_leaves_the_client_hearing(server):
    async def main():
        lane = _wait.Lane(_wait.Gate(server.url, lambda: None), "test")
        steps = _natsclient.connect(parse(server.url), _natsclient.NatsOptions(), "connect")
        connection = await _wait.arun(steps, lane, 10)
        try:
            given_up = asyncio.create_task(connection.round_trip())
            while not connection.client._pongs:  # noqa: ASYNC110
                await asyncio.sleep(0)  # the client tells nobody that it has sent a ping
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            await connection.client.rtt(timeout=20)
        finally:
            connection.leave()

    asyncio.run(main())


def test_a_channel_outlives_its_listener_and_the_last_one_closes_the_connection(server, url, pool):
    with ipckit.listen(url, timeout=10) as listener:
        connecting = [pool.submit(ipckit.connect, url, timeout=10) for _ in range(3)]
        served = [listener.accept(timeout=10) for _ in range(3)]
        channels = [future.result(10) for future in connecting]
    client = served[0].native
    for end in served:
        assert end.native is client
        assert client.is_connected
        end.send(b"still")
        end.close()
    assert client.is_closed
    for channel in channels:
        assert channel.recv(timeout=10) == b"still"
        with pytest.raises(errors.PeerClosed):
            channel.recv(timeout=10)
        channel.close()


def test_the_public_way_of_the_client_works_as_well(url, pool, monkeypatch):
    """Should nats-py hide its stream elsewhere one day: slower, not broken."""
    monkeypatch.setattr("ipckit.transports._natsclient._stream", lambda client: None)
    one, two = meet(url, pool)
    with one, two:
        for size in (0, 64, 300_000):
            one.send(b"x" * size, timeout=10)
            assert two.recv(timeout=10) == b"x" * size
        assert two.send_many([b"y"] * 500, timeout=10) == 500
        assert one.recv(timeout=10) == b"y"


def test_capabilities_are_readable_without_the_backend():
    assert ipckit.capabilities("nats+tls://h/x").encrypted
    assert not ipckit.capabilities("nats://h/x").encrypted
    assert ipckit.capabilities("nats://h/x").broker
