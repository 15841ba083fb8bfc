"""tcp://: addresses, names, self-connection, deaths."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import ipckit
from ipckit import _url, aio, errors
from ipckit.transports import _inet


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


def raw(listener) -> socket.socket:
    return socket.create_connection((listener.url.host.name, listener.url.host.port), 5)


def test_the_system_chooses_the_port():
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        assert listener.url.host.port
        with ipckit.connect(listener.url, timeout=5) as client, listener.accept(5) as server:
            client.send(b"x" * 200_000, 5)
            assert server.recv(5) == b"x" * 200_000
            assert client.peer.address == f"127.0.0.1:{listener.url.host.port}"
            with client.native.socket() as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_ipv6():
    with (
        ipckit.listen("tcp://[::1]:0") as listener,
        ipckit.connect(listener.url, timeout=5) as client,
        listener.accept(5) as server,
    ):
        client.send(b"x")
        assert server.recv(5) == b"x"
        assert server.peer.address.startswith("[::1]:")


def test_names_are_resolved_off_the_thread(monkeypatch):
    """A resolver that does not answer delays nobody past the timeout, and leaves nothing behind."""
    release = threading.Event()
    real = socket.getaddrinfo

    def slow(host, port, family=0, kind=0, proto=0, flags=0):
        if not flags & socket.AI_NUMERICHOST:
            release.wait(20)
        return real(host, port, family, kind, proto, flags)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(errors.NothingListening):
        ipckit.connect(f"tcp://localhost:{free_port()}", timeout=0.05)

    async def main():
        ticks = 0
        task = asyncio.create_task(aio.connect(f"tcp://localhost:{free_port()}", timeout=0.2))
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        with pytest.raises(errors.NothingListening):
            await task
        assert ticks > 3

    asyncio.run(main())
    release.set()
    for thread in threading.enumerate():
        if thread.name == "ipckit-lookup":
            thread.join(10)
    assert not set(os.listdir("/proc/self/fd")) - before  # others may have been closed meanwhile


def test_localhost():
    with (
        ipckit.listen("tcp://localhost:0") as listener,
        ipckit.connect(listener.url, timeout=5) as client,
        listener.accept(5) as server,
    ):
        client.send(b"x")
        assert server.recv(5) == b"x"


def test_unknown_name():
    with pytest.raises(errors.BadUrl, match="not known"):
        ipckit.connect("tcp://no-such-host.invalid:1", timeout=20)
    with pytest.raises(errors.BadUrl):
        ipckit.connect("tcp://" + "a" * 70 + ".invalid:1", timeout=20)


@pytest.mark.parametrize("url", ["tcp://127.0.0.1", "tcp://127.0.0.1:1/path", "tcp://", "tcp://127.0.0.1:0"])
def test_bad_urls(url):
    with pytest.raises(errors.BadUrl):
        ipckit.connect(url, timeout=1)


@pytest.mark.parametrize("option", ["keepalive=999ms", "keepalive=19h", "keepalive=15d", "limit=4GiB", "limit=-1"])
def test_what_the_kernel_or_a_prefix_cannot_count_is_refused_at_once(option):
    with pytest.raises(errors.BadOption, match=option.partition("=")[0]):
        ipckit.listen(f"tcp://127.0.0.1:0?{option}")


@pytest.mark.parametrize("keepalive", ["0", "1s", "18h"])
def test_what_can_be_counted_is_taken(keepalive):
    with (
        ipckit.listen(f"tcp://127.0.0.1:0?keepalive={keepalive}") as listener,
        ipckit.connect(str(listener.url), timeout=5) as client,
        listener.accept(5) as server,
    ):
        client.send(b"x")
        assert server.recv(5) == b"x"


def test_the_first_host_that_answers():
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        url = f"tcp://127.0.0.1:{free_port()},127.0.0.1:{listener.url.host.port}"
        with ipckit.connect(url, timeout=5) as client, listener.accept(5):
            client.send(b"x")
    with pytest.raises(errors.BadUrl, match="one address"):
        ipckit.listen("tcp://127.0.0.1:0,127.0.0.1:0")


def test_in_use_and_free_again():
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        url = listener.url
        with pytest.raises(errors.AddressInUse):
            ipckit.listen(url)
        with ipckit.connect(url, timeout=5), listener.accept(5) as server:
            server.close()  # ours is the end in TIME_WAIT
    ipckit.listen(url).close()


def test_waits_for_the_listener():
    url = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(errors.NothingListening, match="refused"):
        ipckit.connect(url, timeout=0.05)
    found = []
    waiter = threading.Thread(target=lambda: found.append(ipckit.connect(url, timeout=10)))
    waiter.start()
    time.sleep(0.1)
    with ipckit.listen(url) as listener, listener.accept(10):
        waiter.join()
        found[0].close()


def test_never_connected_to_itself(monkeypatch):
    """A port of the ephemeral range that nobody listens at can become our own, and TCP connects us to ourselves."""
    port = free_port()
    with socket.socket() as sock:  # so it is
        sock.bind(("127.0.0.1", port))
        sock.connect(("127.0.0.1", port))
        assert sock.getsockname() == sock.getpeername()

    class Unlucky(socket.socket):
        def connect_ex(self, address):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
            return super().connect_ex(address)

    monkeypatch.setattr(_inet.socket, "socket", Unlucky)
    steps = _inet.connect_steps(_url.parse(f"tcp://127.0.0.1:{free_port()}"), 0)
    for _ in range(3):
        next(steps)
    with pytest.raises(errors.NothingListening, match="refused"):
        steps.throw(errors.Timeout("time is up"))


_CLIENT = """
import ipckit, os, sys
ch = ipckit.connect(sys.argv[1], timeout=10); ch.send(b"hello")
if sys.argv[2] == "close": ch.close()
sys.stdin.read()
"""


@pytest.mark.parametrize(("how", "kind"), [("close", errors.PeerClosed), ("kill", errors.PeerDied)])
def test_closed_is_not_killed(how, kind):
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        process = subprocess.Popen([sys.executable, "-c", _CLIENT, str(listener.url), how], stdin=subprocess.PIPE)
        try:
            with listener.accept(20) as channel:
                assert channel.recv(10) == b"hello"
                if how == "kill":
                    process.send_signal(signal.SIGKILL)
                with pytest.raises(kind) as caught:
                    channel.recv(10)
                assert type(caught.value) is kind
        finally:
            process.kill()
            process.communicate()


def test_foreign_clients():
    with (
        ipckit.listen("tcp://127.0.0.1:0?goodbye=off") as listener,
        raw(listener) as client,
        listener.accept(5) as channel,
    ):
        client.sendall(b"\0\0\0\1x")
        assert channel.recv(5) == b"x"
        client.close()
        with pytest.raises(errors.PeerClosed):
            channel.recv(5)
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        with raw(listener) as client, listener.accept(5) as channel:
            client.close()
            with pytest.raises(errors.PeerDied, match="goodbye=off"):
                channel.recv(5)
        with raw(listener) as client, listener.accept(5) as channel:
            client.sendall(b"\0\0\0\1x\0\0\0\5ab")
            client.close()
            assert channel.recv(5) == b"x"
            with pytest.raises(errors.PeerDied, match="inside a message"):
                channel.recv(5)
        with raw(listener) as client, listener.accept(5) as channel:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()  # a reset
            with pytest.raises(errors.PeerDied):
                channel.recv(5)


def test_half_open_still_reads():
    """A peer that has shut down its sending side can be sent to; it has ended as a source, not as a reader."""
    with (
        ipckit.listen("tcp://127.0.0.1:0?goodbye=off") as listener,
        raw(listener) as client,
        listener.accept(5) as channel,
    ):
        client.shutdown(socket.SHUT_WR)
        channel.send(b"hi")
        assert client.recv(10) == b"\0\0\0\2hi"


def test_what_was_sent_before_the_close_arrives():
    with (
        ipckit.listen("tcp://127.0.0.1:0") as listener,
        ipckit.connect(listener.url, timeout=5) as client,
        listener.accept(5) as server,
    ):
        server.send(b"never read")
        client.send_many([b"%d" % i for i in range(1000)], 5)
        client.close()
        assert [int(m) for m in server] == list(range(1000))
        with pytest.raises(errors.PeerClosed):
            server.send(b"x")


def test_a_reset_does_not_overtake_what_was_sent():
    """More than the first congestion window is on its way when the sender closes, and the receiver is sending as well."""
    with (
        ipckit.listen("tcp://127.0.0.1:0") as listener,
        ipckit.connect(listener.url, timeout=5) as client,
        listener.accept(5) as server,
    ):
        server.send_many([b"%d" % i for i in range(500)], 5)
        server.close()
        with pytest.raises(errors.PeerClosed):
            client.send_many([bytes(1000)] * 10_000, 5)
        assert [int(m) for m in client] == list(range(500))


def test_a_slow_reader_gets_it_all():
    with (
        ipckit.listen("tcp://127.0.0.1:0") as listener,
        ipckit.connect(listener.url, timeout=5) as client,
        listener.accept(5) as server,
    ):
        sent = 0
        while sent < 1000 and server._link.try_send(bytes(50_000)) and server._link.try_flush():
            sent += 1
        server.close()
        client.send(b"to nobody")
        with contextlib.suppress(errors.PeerError):
            client.send(b"and again")
        received = 0
        with contextlib.suppress(errors.PeerDied):
            for message in client:
                assert message == bytes(50_000)
                received += 1
        assert received in (sent, sent + 1)  # the rest of the last one went out at close, if there was room


def test_async_many_times():
    """Descriptors come and go, and the loop must not remember the old ones."""

    async def main():
        async with await aio.listen("tcp://127.0.0.1:0") as listener:
            for _ in range(20):
                client, server = await asyncio.gather(aio.connect(listener.url, timeout=5), listener.accept(5))
                async with client, server:
                    await client.send(b"x" * 100_000, 5)
                    assert len(await server.recv(5)) == 100_000
        url = f"tcp://127.0.0.1:{free_port()}"
        task = asyncio.create_task(aio.connect(url, timeout=10))
        await asyncio.sleep(0.1)
        async with await aio.listen(url) as listener, await listener.accept(5) as server, await task as client:
            await client.send(b"late")
            assert await server.recv(5) == b"late"

    asyncio.run(main())


def test_nothing_stays_open():
    before = sorted(os.listdir("/proc/self/fd"))
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        for _ in range(5):
            with ipckit.connect(listener.url, timeout=5), listener.accept(5):
                pass
    with pytest.raises(errors.NothingListening):
        ipckit.connect(listener.url, timeout=0.05)
    assert sorted(os.listdir("/proc/self/fd")) == before
