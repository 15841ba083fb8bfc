"""What is particular to redis://: its URLs, what it leaves in the server, and what it says when that does not play along."""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import ipckit
from ipckit import aio, errors
from ipckit._url import parse
from ipckit._wait import Gate, Lane, run
from ipckit.testing.servers import redis_server
from ipckit.transports import _redis_mail, _redis_wire
from ipckit.transports import redis as transport

redis = pytest.importorskip("redis")


@pytest.fixture(scope="module")
def server():
    with redis_server() as server:
        yield server


@pytest.fixture
def url(server, tmp_path):
    return server.address(f"/0/{tmp_path.name}")


@pytest.fixture
def keys(server, tmp_path):
    """The keys of this test."""
    client = redis.Redis.from_url(server.url)

    def look():
        return sorted(client.scan_iter(match=f"ipckit:{{{tmp_path.name}}}:*"))

    look.client = client
    yield look
    client.close()


def drive(steps, timeout=10):
    return run(steps, Lane(Gate("redis://", lambda: None), "test"), timeout)


@contextlib.contextmanager
def pair(url, other=None):
    with ipckit.listen(url) as listener:
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(other or url, timeout=20)))
        thread.start()
        with listener.accept(timeout=20) as server:
            thread.join()
            with found[0] as client:
                yield client, server


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://h:7000/3/jobs", {"host": "h", "port": 7000, "db": 3, "username": None, "password": None}),
        ("redis://u:p%40@h/0/a/b:c", {"host": "h", "port": 6379, "db": 0, "username": "u", "password": "p@"}),
        ("redis:///0/x", {"host": "127.0.0.1", "port": 6379, "db": 0}),
        ("redis+unix:///run/r.sock?db=2&name=jobs", {"path": "/run/r.sock", "db": 2}),
        ("rediss://h/0/x?ca=/ca.pem", {"ssl_ca_certs": "/ca.pem", "ssl_certfile": None}),
    ],
)
def test_addresses(text, expected):
    url = parse(text)
    address = transport.read_address(url, ipckit._options.read(transport.RedisOptions, url))
    assert expected.items() <= address.settings.items()
    assert address.connection().is_connected is False
    address.client().close()


@pytest.mark.parametrize(
    "text",
    [
        "redis://h",
        "redis://h/0",
        "redis://h/0/",
        "redis://h/name",
        "redis://h/x/name",
        "redis://h/0/na me",
        "redis://h/0/{x}",
        "redis://h,i/0/x",
        "redis://h/0/x?db=1",
        "redis://h/0/x?ca=/x",
        "redis+unix:///run/r.sock",
        "redis+unix://h/run/r.sock?name=x",
        "redis://h/0/x?window=1",
    ],
)
def test_addresses_that_are_none(text):
    with pytest.raises((errors.BadUrl, errors.BadOption)):
        ipckit.listen(text, timeout=5)


def test_the_unix_socket_and_tcp_are_one_place(server, tmp_path):
    unix = f"redis+unix://{server.socket}?name={tmp_path.name}"
    with pair(server.address(f"/0/{tmp_path.name}"), unix) as (a, b):
        a.send(b"hi")
        assert b.recv(timeout=5) == b"hi"
    assert ipckit.capabilities(unix).cross_machine is False
    assert ipckit.capabilities("rediss://h/0/x").encrypted


@contextlib.contextmanager
def tls_proxy(server, certificate):
    """TLS in front of a server that speaks none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    ready, loop = threading.Event(), asyncio.new_event_loop()
    port = 0

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader, writer):
        there, back = await asyncio.open_unix_connection(str(server.socket))
        await asyncio.gather(pump(reader, back), pump(there, writer))

    async def main():
        nonlocal port
        listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = listening.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        listening.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    ready.wait(10)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_tls(server, tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with tls_proxy(server, authority.issue_cert("127.0.0.1")) as port:
        url = f"rediss://127.0.0.1:{port}/0/{tmp_path.name}?ca={tmp_path}/ca.pem"
        with pair(url) as (a, b):
            big = os.urandom(3_000_000)
            thread = threading.Thread(target=a.send, args=(big,))
            thread.start()
            assert b.recv(timeout=20) == big
            thread.join()
            for n in range(50):
                b.send(b"%d" % n, timeout=20)
                assert a.recv(timeout=20) == b"%d" % n
        with pytest.raises(errors.AccessDenied, match="certificate"):
            ipckit.listen(url.partition("?")[0], timeout=10)


# -- what is in the server --------------------------------------------------------------------------------------------


def test_keys_expire_and_go_at_close(url, keys):
    with pair(url) as (a, b):
        a.send(b"x")
        b.recv(timeout=5)
        time.sleep(0.6)
        with pytest.raises(errors.Timeout):
            b.recv(timeout=0.1)
        with pytest.raises(errors.Timeout):
            a.recv(timeout=0.1)
        boxes = [key for key in keys() if b":box:" in key]
        assert len(boxes) == 2
        for key in keys():
            assert 0 < keys.client.pttl(key) <= 86_400_000
        until(lambda: all(keys.client.pttl(key) > 1000_000 for key in boxes))
    until(lambda: not keys())


def test_a_failed_connect_leaves_nothing(url, keys):
    with ipckit.listen(url) as listener:
        with pytest.raises(errors.NothingListening):
            ipckit.connect(url, timeout=0.3)
        with pytest.raises(errors.Timeout):
            listener.accept(timeout=0.3)
        until(lambda: len(keys()) == 2)
    until(lambda: not keys())


def test_the_survivor_removes_what_the_dead_had(url, keys):
    code = "import sys, time, ipckit; c = ipckit.connect(sys.argv[1], timeout=20); c.send(b'up'); time.sleep(60)"
    with ipckit.listen(url) as listener:
        process = subprocess.Popen([sys.executable, "-c", code, url])
        with listener.accept(timeout=20) as channel:
            assert channel.recv(timeout=20) == b"up"
            process.kill()
            process.wait()
            with pytest.raises(errors.PeerDied):
                channel.recv(timeout=20)
    until(lambda: not keys())


def test_read_entries_are_trimmed(url, keys):
    with pair(url) as (a, b):
        for _ in range(4):
            a.send_many([b"x" * 100] * 500, timeout=20)
            for _ in range(500):
                b.recv(timeout=20)
        lengths = [keys.client.xlen(key) for key in keys() if b":box:" in key]
        assert max(lengths) < 1100


def test_the_window_bounds_what_waits_in_the_server(url, keys):
    with pair(url + "?window=10") as (a, b):
        sent = a.send_many([b"x"] * 100, timeout=0.5)
        assert sent < 20
        assert max(keys.client.xlen(key) for key in keys() if b":box:" in key) <= 14
        got = [b.recv(timeout=5) for _ in range(sent)]
        assert got == [b"x"] * sent
        a.send(b"again", timeout=5)


# -- when something is wrong --------------------------------------------------------------------------------------------


def test_a_lost_frame_is_a_gap_and_no_silent_loss(url, keys):
    with pair(url) as (a, b):
        a.send(b"1")
        assert b.recv(timeout=5) == b"1"
        mailbox = b.native.inbox.key
        a.send(b"2", timeout=5)
        keys.client.xadd(mailbox, {"d": b"D3"}, id="9-0")
        assert b.recv(timeout=5) == b"2"
        with pytest.raises(errors.ProtocolError, match="missing"):
            b.recv(timeout=5)
        with pytest.raises(errors.ProtocolError):
            b.send(b"x")


def test_a_flushed_server_is_no_silence(url, keys):
    with pair(url) as (a, _):
        keys.client.delete(*keys())
        with pytest.raises(errors.PeerError):
            a.send(b"x", timeout=5)


def test_garbage_in_the_rendezvous(url, keys):
    with ipckit.listen(url) as listener:
        (desk,) = [key for key in keys() if b":desk:" in key]
        for fields in ({"d": b"H{}"}, {"x": b"", "y": b""}, {"d": os.urandom(5000)}):
            keys.client.xadd(desk, fields)
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(url, timeout=20)))
        thread.start()
        with listener.accept(timeout=20) as channel:
            thread.join()
            found[0].send(b"hi")
            assert channel.recv(timeout=5) == b"hi"
            found[0].close()


@pytest.mark.parametrize(
    "card",
    [
        {},
        {"box": "other:key", "client": 1},
        {"box": "ipckit:{n}:box:1", "client": "x"},
        {"box": "ipckit:{n}:box:1", "client": 1, "run": "an older server"},
    ],
)
def test_a_card_is_checked(card):
    url = parse("redis://h/0/n")
    options = transport.RedisOptions()
    post = _redis_mail.Post(transport.read_address(url, options), options.window, options.ttl)
    with pytest.raises((errors.ProtocolError, errors.NothingListening)):
        next(post.open_outbox(card))


def test_a_card_of_an_older_server_does_not_block_the_name(url, keys, tmp_path):
    key = f"ipckit:{{{tmp_path.name}}}:listener"
    for value in (b"garbage", b'{"client":1,"run":"another","box":"x"}'):
        keys.client.set(key, value)
        with ipckit.listen(url):
            pass


def test_wrong_password():
    with redis_server(private=True, password="s3cret-word") as server:
        with pair(server.address("/0/x")) as (a, b):
            a.send(b"hi")
            assert b.recv(timeout=5) == b"hi"
        wrong = server.address("/0/x").replace("s3cret-word", "wr0ng-word")
        for attempt in (ipckit.listen, ipckit.connect):
            with pytest.raises(errors.AccessDenied) as caught:
                attempt(wrong, timeout=5)
            assert "wr0ng-word" not in str(caught.value)
        with pytest.raises(errors.AccessDenied):
            ipckit.connect(wrong.replace(":wr0ng-word@", ""), timeout=5)


def test_no_server():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{sock.getsockname()[1]}/0/x"
        with pytest.raises(errors.NothingListening, match="no Redis server"):
            ipckit.listen(url, timeout=10)
        with pytest.raises(errors.NothingListening, match="no Redis server"):
            ipckit.connect(url, timeout=0.3)


def test_a_server_that_never_answers_does_not_outwait_the_timeout():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        url = f"redis://127.0.0.1:{sock.getsockname()[1]}/0/x"
        begin = time.monotonic()
        with pytest.raises(errors.NothingListening):
            ipckit.connect(url, timeout=0.3)
        assert time.monotonic() - begin < 3
        conn, _ = sock.accept()
        conn.close()
        until(lambda: not any(t.name == "ipckit-open" for t in threading.enumerate()))


def test_the_server_dies_and_both_hear_it():
    with redis_server(private=True) as server:
        with pair(server.address("/0/x")) as (a, b):
            server.kill()
            for channel in (a, b):
                with pytest.raises(errors.PeerError, match="lost"):
                    channel.recv(timeout=5)
                with pytest.raises(errors.PeerError, match="lost"):
                    channel.send(b"x", timeout=5)
            server.start()
        with pair(server.address("/0/x")) as (a, b):
            a.send(b"hi")
            assert b.recv(timeout=5) == b"hi"


def test_connect_waits_for_the_server_too():
    with redis_server(private=True) as server:
        server.stop()
        timer = threading.Timer(0.3, server.start)
        timer.start()
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(server.address("/0/x"), timeout=20)))
        thread.start()
        timer.join()
        with ipckit.listen(server.address("/0/x")) as listener, listener.accept(timeout=20):
            thread.join()
            found[0].close()


def test_a_full_server_refuses_and_says_so():
    with redis_server(private=True, maxmemory=6 << 20) as server, pair(server.address("/0/x")) as (a, _):
        with pytest.raises(errors.ResourceLimit, match="OOM"):
            a.send_many([b"x" * 1_000_000] * 15, timeout=20)
        with pytest.raises(errors.ResourceLimit, match="OOM"):
            a.send(b"x", timeout=20)


def test_error_replies_have_a_place_in_the_tree():
    url = parse("redis://h/0/x")
    for text, kind in (
        ("NOPERM this user", errors.AccessDenied),
        ("WRONGPASS invalid", errors.AccessDenied),
        ("OOM command not allowed", errors.ResourceLimit),
        ("LOADING the dataset", errors.PeerError),
        ("ERR what", errors.IpcError),
    ):
        assert type(_redis_wire.map_redis(Exception(text), url, "send")) is kind
    assert type(_redis_wire.map_redis(redis.AuthenticationError("x"), url, "open")) is errors.AccessDenied
    assert type(_redis_wire.map_redis(redis.ConnectionError("x"), url, "open")) is errors.NothingListening


def test_what_is_no_redis_protocol():
    """Something else answers behind a port that was Redis when the connection was opened."""
    ours, theirs = socket.socketpair()

    class Connection:
        _sock = ours

        def disconnect(self):
            ours.close()

    wire = _redis_wire.Wire(parse("redis://h/0/x"), Connection(), 1)
    wire.tell(None, "PING")
    theirs.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    for _ in range(2):
        with pytest.raises(errors.PeerError):
            wire.pump()
    wire.close()
    theirs.close()


def test_a_reply_in_pieces_and_a_command_that_does_not_fit():
    ours, theirs = socket.socketpair()

    class Connection:
        _sock = ours

        def disconnect(self):
            ours.close()

    wire = _redis_wire.Wire(parse("redis://h/0/x"), Connection(), 1)
    answers = []
    body = os.urandom(3 << 20)
    wire.tell(answers.append, "SET", "k", body)
    wire.tell(answers.append, "GET", "k")
    wire.pump()
    assert wire.held
    got = b""
    theirs.setblocking(False)
    while wire.held or b"GET" not in got[-40:]:
        wire.pump()
        with contextlib.suppress(BlockingIOError):
            got += theirs.recv(1 << 20)
    assert body in got
    for byte in b"+OK\r\n$3\r\nabc\r\n":
        theirs.sendall(bytes([byte]))
        wire.pump()
    assert answers == [b"OK", b"abc"]
    assert wire.waiting == 0
    wire.close()
    theirs.close()


def test_asyncio_opens_without_blocking_the_loop(server, tmp_path):
    async def main():
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0/x"
            task = asyncio.create_task(aio.connect(url))
            ticks = 0
            while ticks < 20:
                begin = time.monotonic()
                await asyncio.sleep(0.01)
                assert time.monotonic() - begin < 1
                ticks += 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            silent.accept()[0].close()

    asyncio.run(main())
    until(lambda: not any(thread.name == "ipckit-open" for thread in threading.enumerate()))


def test_a_paused_process_keeps_its_name(url):
    code = "import sys, ipckit; l = ipckit.listen(sys.argv[1]); print('up', flush=True); c = l.accept(); c.send(b'hi'); l.close()"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, url], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(errors.AddressInUse):
            ipckit.listen(url)
        process.send_signal(signal.SIGCONT)
        with ipckit.connect(url, timeout=20) as channel:
            assert channel.recv(timeout=20) == b"hi"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
