"""What every transport that meets by a rendezvous promises, through the public names, against the real thing."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import ipckit
from ipckit import aio, errors

SCHEMES = ["fifo", "mq", "redis"]

CHILD = """
import os, sys, time
import ipckit
verb, url = sys.argv[1:3]
if verb == "listen":
    with ipckit.listen(url) as listener:
        print("ready", flush=True)
        channel = listener.accept()
else:
    channel = ipckit.connect(url, timeout=20)
    print("ready", flush=True)
exec(sys.argv[3])
"""


@contextlib.contextmanager
def child(verb, url, code):
    process = subprocess.Popen([sys.executable, "-c", CHILD, verb, url, code], stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def redis():
    pytest.importorskip("redis")
    from ipckit.testing.servers import redis_server

    with redis_server() as server:
        yield server


@pytest.fixture(params=SCHEMES)
def url(request, tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))
    if request.param == "redis":
        return request.getfixturevalue("redis").address(f"/0/{tmp_path.name}")
    if request.param == "mq":
        pytest.importorskip("posix_ipc")
    return f"{request.param}://{tmp_path.name.replace('[', '_').replace(']', '_')[-60:].lstrip('_-.')}"


@contextlib.contextmanager
def pair(url, **how):
    with ipckit.listen(url, **how) as listener:
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(url, timeout=20, **how)))
        thread.start()
        with listener.accept(timeout=20) as server:
            thread.join()
            with found[0] as client:
                yield client, server


def fill(channel, frame, timeout):
    """Send until there is an error; a link that is never full is an error of its own."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        channel.send(frame, timeout=timeout)


def empty(channel):
    while True:
        channel.recv(timeout=20)


def test_both_ways_and_every_size(url):
    with pair(url) as (a, b):
        for n in (0, 1, 4095, 4096, 4097, 8191, 8192, 8193, 100_000, 3_000_000):
            message = os.urandom(n)
            thread = threading.Thread(target=a.send, args=(message,))
            thread.start()
            assert b.recv(timeout=20) == message
            thread.join()
        b.send(b"back", timeout=5)
        assert a.recv(timeout=5) == b"back"
        assert a.stats().messages_sent == 10


def test_order_and_backpressure(url):
    with pair(url) as (a, b):
        sent = [b"%d" % n for n in range(3000)]
        thread = threading.Thread(target=a.send_many, args=(sent,))
        thread.start()
        got = []
        while len(got) < len(sent):
            got.extend(b.recv_many(100, timeout=20))
        thread.join()
        assert got == sent
        frame = b"x" * 60_000
        with pytest.raises(errors.Timeout):
            fill(a, frame, 0.05)


def test_timeouts(url):
    with pytest.raises(errors.NothingListening):
        ipckit.connect(url, timeout=0.05)
    with ipckit.listen(url) as listener, pytest.raises(errors.Timeout):
        listener.accept(timeout=0.05)
    with pair(url) as (a, _), pytest.raises(errors.Timeout):
        a.recv(timeout=0)


def test_closed_in_order(url):
    with pair(url) as (a, b):
        a.send(b"1")
        a.send(b"2")
        a.close()
        assert list(b) == [b"1", b"2"]
        with pytest.raises(errors.PeerClosed):
            b.recv()
        with pytest.raises(errors.PeerClosed):
            b.send(b"x")
        with pytest.raises(errors.Closed):
            a.recv()


def test_a_sender_hears_that_the_peer_closed_behind_unread_messages(url):
    with pair(url) as (a, b):
        for _ in range(5):
            a.send(b"unread")
        a.close()
        with pytest.raises(errors.PeerClosed):
            fill(b, b"x" * 1000, 20)
        assert [b.recv(timeout=5) for _ in range(5)] == [b"unread"] * 5
        with pytest.raises(errors.PeerClosed):
            b.recv(timeout=5)


def test_a_close_with_everything_full_is_heard(url):
    with pair(url) as (a, b):
        with pytest.raises(errors.Timeout):
            fill(a, b"x" * 1000, 0)
        a.close()
        with pytest.raises(errors.PeerError):
            empty(b)


def test_close_wakes_a_waiter(url):
    with pair(url) as (a, _):
        threading.Timer(0.05, a.close).start()
        with pytest.raises(errors.Closed):
            a.recv(timeout=20)


def test_a_name_is_taken_once(url):
    with ipckit.listen(url), pytest.raises(errors.AddressInUse):
        ipckit.listen(url)
    ipckit.listen(url).close()


@pytest.mark.parametrize("verb", ["listen", "connect"])
def test_a_killed_peer_is_heard_after_what_it_had_committed(url, verb):
    code = "[channel.send(b'%d' % n) for n in range(5)]; channel.recv(); print('all', flush=True); time.sleep(60)"
    listener = ipckit.listen(url) if verb == "connect" else contextlib.nullcontext()
    with listener, child(verb, url, code) as process:
        channel = listener.accept(timeout=20) if verb == "connect" else ipckit.connect(url, timeout=20)
        with channel:
            channel.send(b"go on", timeout=5)
            for word in (b"ready\n", b"all\n"):
                assert process.stdout.readline() == word
            process.kill()
            killed = time.monotonic()
            assert [channel.recv(timeout=20) for _ in range(5)] == [b"%d" % n for n in range(5)]
            with pytest.raises(errors.PeerDied) as caught:
                channel.recv(timeout=20)
            assert time.monotonic() - killed < 10
            assert caught.value.pid == process.pid
            with pytest.raises(errors.PeerDied):
                channel.send(b"x", timeout=20)


def test_a_paused_peer_is_not_dead(url):
    echo = "channel.send(channel.recv())"
    with (
        ipckit.listen(url) as listener,
        child("connect", url, echo) as process,
        listener.accept(timeout=20) as channel,
    ):
        process.send_signal(signal.SIGSTOP)
        channel.send(b"hi", timeout=5)
        with pytest.raises(errors.Timeout):
            channel.recv(timeout=1.5)
        process.send_signal(signal.SIGCONT)
        assert channel.recv(timeout=20) == b"hi"


def test_the_name_of_a_killed_listener_is_free(url):
    for _ in range(2):
        with child("listen", url, "time.sleep(60)") as process:
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(errors.AddressInUse):
                ipckit.listen(url)
            process.kill()
            process.wait()
            with pytest.raises(errors.NothingListening):
                ipckit.connect(url, timeout=0.2)
    with pair(url) as (a, b):
        a.send(b"hi")
        assert b.recv(timeout=5) == b"hi"


def test_a_client_killed_in_its_handshake_costs_nobody_else(url):
    code = "raise SystemExit"
    with ipckit.listen(url) as listener:
        with child("connect", url, code) as process:  # it waits for an accept that does not come
            time.sleep(0.5)
            process.kill()
            process.wait()
        with child("connect", url, "channel.send(b'hi'); channel.recv()"), listener.accept(timeout=20) as channel:
            assert channel.recv(timeout=20) == b"hi"


def test_the_listener_goes_and_its_channels_live_on(url):
    with pair(url) as (a, b):
        ipckit.listen(url + "2").close()
        assert a.url.scheme == b.url.scheme
    listener = ipckit.listen(url)
    with (
        child("connect", url, "channel.send(b'hi'); channel.send(channel.recv())"),
        listener.accept(timeout=20) as channel,
    ):
        listener.close()
        assert channel.recv(timeout=20) == b"hi"
        channel.send(b"still")
        assert channel.recv(timeout=20) == b"still"


def test_many_clients(url):
    with ipckit.listen(url) as listener:
        clients = []
        threads = [threading.Thread(target=lambda: clients.append(ipckit.connect(url, timeout=20))) for _ in range(4)]
        for thread in threads:
            thread.start()
        servers = [listener.accept(timeout=20) for _ in threads]
        for thread in threads:
            thread.join()
        for n, client in enumerate(clients):
            client.send(b"%d" % n)
        got = sorted(server.recv(timeout=5) for server in servers)
        assert got == [b"0", b"1", b"2", b"3"]
        for channel in clients + servers:
            channel.close()


def test_no_descriptor_and_no_thread_stays(url):
    with pair(url):
        pass
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        with pair(url) as (a, b):
            a.send(b"x")
            b.recv(timeout=5)
    with pytest.raises(errors.NothingListening):
        ipckit.connect(url, timeout=0.05)
    until = time.monotonic() + 10  # a connection that was given up while it was being opened is closed a little later
    while set(os.listdir("/proc/self/fd")) != before or threading.active_count() != threads:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_forked_child_does_not_keep_the_link_alive(url):
    code = "channel.recv(); forked = os.fork(); os.write(1, b'forked\\n'); time.sleep(60 if forked else 4)"
    with child("listen", url, code) as process, ipckit.connect(url, timeout=20) as channel:
        channel.send(b"fork")
        assert [process.stdout.readline() for _ in range(3)] == [b"ready\n", b"forked\n", b"forked\n"]
        process.kill()
        killed = time.monotonic()
        with pytest.raises(errors.PeerDied):
            channel.recv(timeout=20)
        assert time.monotonic() - killed < 3.5
        assert process.stdout.readline() == b""  # the grandchild has ended


def test_asyncio(url):
    async def main():
        async with await aio.listen(url) as listener:
            server, client = await asyncio.gather(listener.accept(timeout=20), aio.connect(url, timeout=20))
            async with server, client:
                for n in (10, 100_000):
                    message = os.urandom(n)
                    _, got = await asyncio.gather(client.send(message), server.recv(timeout=20))
                    assert got == message
                for _ in range(20):  # a cancelled receive loses nothing
                    task = asyncio.create_task(client.recv())
                    await asyncio.sleep(0)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                for n in range(50):
                    await server.send(b"%d" % n)
                    assert await client.recv(timeout=20) == b"%d" % n
                waiting = asyncio.create_task(client.recv(timeout=20))
                await asyncio.sleep(0.05)
                await server.close()
                with pytest.raises(errors.PeerClosed):
                    await waiting
            # the same again: what was registered for the handshake has been forgotten
            for _ in range(3):
                server, client = await asyncio.gather(listener.accept(timeout=20), aio.connect(url, timeout=20))
                async with server, client:
                    await server.send(b"again")
                    assert await client.recv(timeout=20) == b"again"
        with pytest.raises(errors.NothingListening):
            await aio.connect(url, timeout=0.05)

    asyncio.run(main())


def test_cancelling_a_connect_leaves_nothing(url):
    async def main():
        async with await aio.listen(url) as listener:
            task = asyncio.create_task(aio.connect(url))
            await asyncio.sleep(0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            with pytest.raises(errors.Timeout):
                await listener.accept(timeout=0.2)

    asyncio.run(main())
