"""udp://: sessions, cookies, limits, and what can be known of an end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time

import pytest

import ipckit
from ipckit import aio, errors
from ipckit.transports import udp
from ipckit.transports._udplink import MAX_MESSAGE


def address(listener):
    return "127.0.0.1", listener.url.host.port


def both(listener, url=None):
    found = []
    thread = threading.Thread(target=lambda: found.append(ipckit.connect(url or listener.url, timeout=10)))
    thread.start()
    server = listener.accept(10)
    thread.join()
    return found[0], server


@pytest.fixture
def listener():
    with ipckit.listen("udp://127.0.0.1:0") as listening:
        yield listening


def raw(listener):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    sock.connect(address(listener))
    return sock


def test_round_trips_on_one_port(listener):
    client, server = both(listener)
    with client, server:
        for size in (0, 1, 1000, MAX_MESSAGE):
            client.send(b"x" * size)
            assert server.recv(5) == b"x" * size
            server.send(b"y" * size)
            assert client.recv(5) == b"y" * size
        assert client.peer.address == f"127.0.0.1:{listener.url.host.port}"
        assert server.native.getsockname()[1] == listener.url.host.port


def test_sessions_are_kept_apart(listener):
    pairs = [both(listener) for _ in range(20)]
    for number, (client, _) in enumerate(pairs):
        client.send(b"%d" % number)
    for number, (client, server) in enumerate(pairs):
        assert server.recv(5) == b"%d" % number
        server.send(b"%d" % -number)
        assert client.recv(5) == b"%d" % -number
    for pair in pairs:
        for end in pair:
            end.close()


def test_too_large(listener):
    client, server = both(listener)
    with client, server:
        with pytest.raises(errors.MessageTooLarge, match="65498"):
            client.send(bytes(MAX_MESSAGE + 1))
        client.send(b"still good")
        assert server.recv(5) == b"still good"
    assert ipckit.capabilities("udp://x:1").max_message <= MAX_MESSAGE  # topics need a few bytes more


def test_limit_of_the_receiver():
    with ipckit.listen("udp://127.0.0.1:0?limit=10") as listener:
        client, server = both(listener, f"udp://127.0.0.1:{listener.url.host.port}")
        with client, server:
            client.send(bytes(11))
            with pytest.raises(errors.ProtocolError):
                server.recv(5)
            with pytest.raises(errors.ProtocolError):
                server.recv(5)


def test_goodbye_is_heard_by_receiver_and_sender(listener):
    for receives in (True, False):
        client, server = both(listener)
        client.send(b"last")
        client.close()
        with server:
            if receives:
                assert server.recv(5) == b"last"
                with pytest.raises(errors.PeerClosed):
                    server.recv(5)
            else:
                server.recv(5)
            with pytest.raises(errors.PeerClosed):
                server.send(b"x", 5)


def test_what_came_before_the_end_is_delivered(listener):
    client, server = both(listener)
    server.send(b"first")
    server.close()
    listener.close()
    with client:
        with contextlib.suppress(errors.PeerError):
            for _ in range(1000):
                client.send(b"to nobody", 5)
                time.sleep(0.01)
        with pytest.raises(errors.PeerError):
            client.send(b"to nobody")
        assert client.recv(5) == b"first"
        for _ in range(2):
            with pytest.raises(errors.PeerClosed):
                client.recv(5)


def test_nobody_there_is_a_death(listener):
    client, server = both(listener)
    with client:
        server._link.abandon()  # without a goodbye
        client.send(b"x")
        with pytest.raises(errors.Timeout):
            listener.accept(0.1)  # the listener answers for sessions that are over
        with pytest.raises(errors.PeerDied, match="knows nothing"):
            client.recv(5)
        with pytest.raises(errors.PeerDied):
            client.send(b"x")
    server.close()
    client, server = both(listener)
    with server:
        client._link.abandon()
        server.send(b"x")
        with pytest.raises(errors.PeerDied, match="machine"):
            server.recv(5)
    client.close()


def test_connect_waits_and_gives_up():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(errors.NothingListening):  # bound, but mute
            ipckit.connect(f"udp://127.0.0.1:{port}", timeout=0.1)
    with pytest.raises(errors.NothingListening, match="refused"):
        ipckit.connect(f"udp://127.0.0.1:{port}", timeout=0.1)
    found = []
    thread = threading.Thread(target=lambda: found.append(ipckit.connect(f"udp://127.0.0.1:{port}", timeout=10)))
    thread.start()
    time.sleep(0.1)
    with ipckit.listen(f"udp://127.0.0.1:{port}") as listener, listener.accept(10):
        thread.join()
        found[0].close()


def test_lost_datagrams_of_the_handshake(listener, monkeypatch):
    """Every second datagram that the listener would send is lost."""
    real, counted = udp.UdpListener._reply, []

    def lossy(self, datagram, address, here):
        counted.append(datagram)
        if len(counted) % 2 == 0:
            real(self, datagram, address, here)

    monkeypatch.setattr(udp.UdpListener, "_reply", lossy)
    client, server = both(listener)
    with client, server:
        client.send(b"x")
        assert server.recv(5) == b"x"


def test_a_lost_accept_is_sent_again(listener):
    with raw(listener) as client:
        session = os.urandom(8)
        hello(listener, client, session)
        with listener.accept(5) as server:
            assert client.recv(100) == b"A" + session
            client.send(b"H" + session + bytes(16))
            with pytest.raises(errors.Timeout):
                server.recv(0.2)
            assert client.recv(100) == b"A" + session
            client.send(b"D" + session + b"data")
            assert server.recv(5) == b"data"


def drain(sock):
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.recv(100)
    sock.settimeout(5)


def hello(listener, client, session):
    """As far as the HELLO that carries the cookie."""
    client.send(b"H" + session + bytes(16))
    with pytest.raises(errors.Timeout):
        listener.accept(0.1)
    challenge = client.recv(100)
    assert challenge[:9] == b"C" + session
    client.send(b"H" + session + challenge[9:])
    return challenge[9:]


def test_a_slow_listener_is_not_left_with_a_dead_session(listener, monkeypatch):
    """Its ACCEPT takes longer than the client waits before it asks again; the session that was accepted is the one."""
    real = udp.UdpLink.accept
    monkeypatch.setattr(udp.UdpLink, "accept", lambda link: (time.sleep(0.3), real(link)))
    client, server = both(listener)
    with client, server:
        client.send(b"x")
        assert server.recv(5) == b"x"
    with pytest.raises(errors.Timeout):
        listener.accept(0.3)


def test_a_client_that_gives_up_says_so(listener):
    given_up = []

    def attempt():
        try:
            ipckit.connect(listener.url, timeout=0.5)
        except errors.NothingListening as error:
            given_up.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    deadline = time.monotonic() + 5
    real, udp.UdpLink.accept = udp.UdpLink.accept, lambda self: None  # every ACCEPT is lost
    try:
        server = listener.accept(5)
        thread.join()
    finally:
        udp.UdpLink.accept = real
    assert given_up
    assert time.monotonic() < deadline
    with server, pytest.raises(errors.PeerClosed):
        server.recv(5)


def test_a_spoofed_hello_costs_nothing(listener):
    with raw(listener) as client, raw(listener) as other:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(200):
            client.send(b"H" + b"%08d" % number + os.urandom(16))
        with pytest.raises(errors.Timeout):
            listener.accept(0.2)
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # the bell of the waiting call
        assert not listener._listener._accepted
        assert len(client.recv(100)) <= 25  # never more than was sent
        drain(client)
        session = os.urandom(8)
        cookie = hello(listener, client, session)
        listener.accept(5).close()
        other.send(b"H" + session + cookie)  # somebody else's cookie
        with pytest.raises(errors.Timeout):
            listener.accept(0.1)
        assert other.recv(100)[:1] == b"C"


def test_garbage_harms_nobody(listener):
    client, server = both(listener)
    with client, server, raw(listener) as stranger:
        for junk in (b"", b"D", b"H", b"\xff" * 100, os.urandom(1400), b"B" + os.urandom(8)):
            stranger.send(junk)
            client.native.send(junk)
            server.native.send(junk)
        with pytest.raises(errors.Timeout):
            listener.accept(0.1)
        client.send(b"x")
        assert server.recv(5) == b"x"
        server.send(b"y")
        assert client.recv(5) == b"y"


def test_a_client_that_started_anew_at_the_same_port(listener):
    with raw(listener) as client:
        hello(listener, client, b"12345678")
        with listener.accept(5) as server:
            client.send(b"H" + b"87654321" + bytes(16))
            with pytest.raises(errors.PeerDied, match="another process"):
                server.recv(5)
        client.recv(100)
        hello(listener, client, b"87654321")
        listener.accept(5).close()


def test_in_use_and_free_again(listener):
    with pytest.raises(errors.AddressInUse):
        ipckit.listen(listener.url)
    client, server = both(listener)
    with client, server:
        listener.close()
        with ipckit.listen(listener.url) as again:  # the session lives on beside it
            with pytest.raises(errors.AddressInUse):
                ipckit.listen(listener.url)
            second, accepted = both(again)
            with second, accepted:
                second.send(b"new")
                assert accepted.recv(5) == b"new"
            client.send(b"old")
            assert server.recv(5) == b"old"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "[::1]"])
def test_any_address(host):
    """The answer comes from the address that was spoken to, or a connected socket would not take it."""
    try:
        listener = ipckit.listen(f"udp://{host}:0")
    except errors.IpcError:
        pytest.skip("no IPv6 here")
    with listener:
        target = "127.0.0.5" if host == "0.0.0.0" else "[::1]"
        client, server = both(listener, f"udp://{target}:{listener.url.host.port}")
        with client, server:
            client.send(b"x")
            assert server.recv(5) == b"x"
            server.send(b"y")
            assert client.recv(5) == b"y"


def test_async(listener):
    async def main():
        async with await aio.listen("udp://127.0.0.1:0") as listener:
            for _ in range(5):
                client, server = await asyncio.gather(aio.connect(listener.url, timeout=10), listener.accept(10))
                async with client, server:
                    await client.send(b"x")
                    assert await server.recv(10) == b"x"

    asyncio.run(main())


def test_nothing_stays_open(listener):
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        client, server = both(listener)
        client.close()
        server.close()
    with pytest.raises(errors.NothingListening):
        ipckit.connect("udp://127.0.0.1:9", timeout=0.05)
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1  # the listener's bell
