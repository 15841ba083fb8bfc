"""Publish/subscribe on a Redis Stream, and what the server must be for all of it: synced, watched by Sentinels."""

import asyncio
import contextlib
import queue
import re
import ssl
import subprocess
import threading
import time

import pytest

import ipckit
from ipckit import aio, errors
from ipckit._url import parse
from ipckit.testing.conformance import free_port
from ipckit.testing.servers import redis_server

redis = pytest.importorskip("redis")


@pytest.fixture(scope="module")
def server():
    with redis_server(private=True) as server:
        yield server


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url, protocol=2) as client:
        yield client


@pytest.fixture
def name(tmp_path):
    return re.sub(r"\W", "_", tmp_path.name)


@pytest.fixture
def address(server, name):
    return lambda **options: server.address(f"/0/{name}", **options)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def nothing(subscriber, seconds=0.2):
    with pytest.raises(errors.Timeout):
        subscriber.recv(timeout=seconds)


def test_patterns_are_matched_here(address):
    with (
        ipckit.publisher(address()) as news,
        ipckit.subscriber(address()) as everything,
        ipckit.subscriber(address(), topics=["eu.*", "us.>"]) as some,
    ):
        topics = ["eu.paris", "eu.paris.north", "us.ny.nyc", "", "asia"]
        for topic in topics:
            news.publish(topic.encode(), topic=topic, headers={"traceparent": "t"})
        got = [everything.recv(timeout=5) for _ in topics]
        assert [message.topic for message in got] == topics
        assert got[0].headers == {"traceparent": "t"}
        assert [some.recv(timeout=5).topic for _ in range(2)] == ["eu.paris", "us.ny.nyc"]
        nothing(some)


def test_each_group_gets_each_message_once(address, client, name):
    with contextlib.ExitStack() as stack:
        news = stack.enter_context(ipckit.publisher(address()))
        members = {
            group: [
                stack.enter_context(ipckit.subscriber(address(prefetch="1"), group=group, topics=["a"]))
                for _ in range(2)
            ]
            for group in ("x", "y")
        }
        news.wait_for_subscribers(4, timeout=5)
        news.publish_many([b"%d" % number for number in range(20)], topic="a")
        news.publish(b"other", topic="b")
        for pair in members.values():
            got = []
            while len(got) < 20:
                for member in pair:
                    with contextlib.suppress(errors.Timeout):
                        got.append(member.recv(timeout=0.02).value)
            assert sorted(got) == sorted(b"%d" % number for number in range(20))
            for member in pair:
                nothing(member, 0.1)
        until(lambda: all(group["pending"] == 0 for group in client.xinfo_groups(name)))


def test_late_subscribers(address):
    with ipckit.publisher(address()) as news:
        news.publish(b"1")
        with (
            ipckit.subscriber(address(replay="all")) as late,
            ipckit.subscriber(address(replay="all"), group="late") as group,
            ipckit.subscriber(address()) as new,
        ):
            news.publish(b"2")
            assert [late.recv(timeout=5).value for _ in range(2)] == [b"1", b"2"]
            assert [group.recv(timeout=5).value for _ in range(2)] == [b"1", b"2"]
            assert new.recv(timeout=5).value == b"2"


def test_what_was_trimmed_is_counted_exactly(address):
    with (
        ipckit.publisher(address(maxlen="10"), on_full="drop_old") as news,
        ipckit.subscriber(address(prefetch="1")) as slow,
    ):
        assert news.publish_many([b"%d" % number for number in range(100)]) == 100
        received, gaps = [], 0
        while received[-1:] != [b"149"]:
            message = slow.recv(timeout=5)
            received.append(message.value)
            gaps += message.gap
            if len(received) == 3:
                news.publish_many([b"%d" % number for number in range(100, 150)])
        assert gaps > 0
        assert len(received) + gaps == 150
        assert slow.stats()["dropped"] == gaps


def test_who_comes_late_missed_nothing(address):
    with ipckit.publisher(address(maxlen="5"), on_full="drop_old") as news:
        news.publish_many([b"%d" % number for number in range(20)])
        with ipckit.subscriber(address(replay="all")) as late, ipckit.subscriber(address()) as new:
            assert [late.recv(timeout=5).gap for _ in range(5)] == [0] * 5
            news.publish(b"20")
            assert new.recv(timeout=5).gap == 0


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        ({}, {"on_full": "error"}),
        ({}, {"on_full": "drop_new"}),
        ({}, {"on_full": "drop_old"}),
        ({"maxlen": "5"}, {}),
        ({"maxage": "1h"}, {"on_full": "block"}),
        ({}, {"retain": 1}),
    ],
)
def test_what_cannot_be_kept_is_refused(address, options, terms):
    with pytest.raises(errors.Unsupported):
        ipckit.publisher(address(**options), **terms)


def test_subscribers_come_and_go(address, client, name):
    with ipckit.publisher(address()) as news:
        with pytest.raises(errors.Timeout):
            news.wait_for_subscribers(1, timeout=0.1)
        for _ in range(3):
            with ipckit.subscriber(address()), ipckit.subscriber(address(), group="g"):
                news.wait_for_subscribers(2, timeout=5)
                assert news.stats()["subscribers"] == 2
        with ipckit.subscriber(address()):
            until(lambda: news._outlet.subscribers() == 1)
    assert client.hlen(f"ipckit:{{{name}}}:readers") <= 3, "who comes strikes off who is gone"


def test_a_subscriber_goes_on_where_it_was(address, client, name):
    with ipckit.publisher(address()) as news, ipckit.subscriber(address()) as reader:
        for number in range(10):
            news.publish(b"%d" % number)
            if number % 3 == 0:
                client.client_kill_filter(_type="normal", skipme=True)
        assert [reader.recv(timeout=10).value for _ in range(10)] == [b"%d" % number for number in range(10)]
        assert news.stats()["reconnects"] > 0
        nothing(reader)
    assert client.xlen(name) == 10


def test_awaited(address):
    async def main():
        async with await aio.publisher(address()) as news, await aio.subscriber(address()) as reader:
            await news.wait_for_subscribers(1, timeout=5)
            await asyncio.gather(*(news.publish(b"%d" % number) for number in range(50)))
            tasks = [asyncio.create_task(reader.recv(timeout=5)) for _ in range(50)]
            got = [message.value for message in await asyncio.gather(*tasks)]
            assert sorted(got) == sorted(b"%d" % number for number in range(50))

    asyncio.run(main())


# -- the server -------------------------------------------------------------------------------------------------------


def test_fsync_always_is_checked(address):
    for open_ in (ipckit.sender, ipckit.receiver, ipckit.publisher, ipckit.subscriber):
        with pytest.raises(errors.Unsupported, match="before it syncs") as refused:
            open_(address(fsync="always"))
        assert "appendfsync always" in refused.value.hint


def test_fsync_always_is_accepted_and_checked_again():
    with redis_server(private=True, appendonly=True, appendfsync="always") as server:
        url = server.address("/0/x", fsync="always")
        with ipckit.sender(url) as jobs, ipckit.receiver(url) as work:
            jobs.send(b"1")
            assert work.recv(timeout=5).value == b"1"
            with redis.Redis.from_url(server.url) as client:
                client.config_set("appendfsync", "everysec")
                client.client_kill_filter(_type="normal", skipme=True)
                with pytest.raises(errors.Unsupported):
                    jobs.send(b"2", timeout=5)


def test_a_restart_loses_nothing_and_is_told(caplog):
    with redis_server(private=True, appendonly=True, appendfsync="always") as server:
        url = server.address("/0/x")
        with (
            ipckit.sender(url) as jobs,
            ipckit.receiver(url, ack="manual") as work,
            ipckit.publisher(url.replace("/x", "/y")) as news,
            ipckit.subscriber(url.replace("/x", "/y")) as reader,
        ):
            jobs.send_many([b"0", b"1", b"2"])
            held = work.recv(timeout=5)
            server.kill()
            server.start()
            held.ack()
            assert [work.recv(timeout=10).value for _ in range(2)] == [b"1", b"2"]
            jobs.send(b"3", timeout=10)
            assert work.recv(timeout=10).value == b"3"
            news.publish(b"n", timeout=10)
            assert reader.recv(timeout=10).value == b"n"
            for end in (jobs, work, news, reader):
                assert end.stats()["reconnects"] >= 1
        assert "connecting again" in caplog.text


def test_the_password_stays_out_of_the_log(caplog):
    with redis_server(private=True, password="hunter2") as server:
        with ipckit.sender(server.address("/0/x")) as jobs:
            server.kill()
            server.start()
            jobs.send(b"x", timeout=10)
        wrong = server.address("/0/x").replace("hunter2", "guess")
        with pytest.raises(errors.AccessDenied):
            ipckit.receiver(wrong)
    assert "connecting again" in caplog.text
    assert "hunter2" not in caplog.text


@contextlib.contextmanager
def encrypted(server, directory):
    """A port that speaks TLS, and passes on to the server: its binary may be built without."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    target = parse(server.url).host

    async def copy(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def passing(reader, writer):
        back, forth = await asyncio.open_connection(target.name, target.port)
        await asyncio.gather(copy(reader, forth), copy(back, writer))

    async def main():
        async with await asyncio.start_server(passing, "127.0.0.1", 0, ssl=context) as listening:
            opened.put((asyncio.get_running_loop(), listening.sockets[0].getsockname()[1], over := asyncio.Event()))
            await over.wait()

    opened = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    loop, port, over = opened.get(timeout=10)
    try:
        yield f"rediss://127.0.0.1:{port}", str(directory / "ca.pem")
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the proxy's broken connections
def test_over_tls(server, tmp_path, client, name):
    with encrypted(server, tmp_path) as (place, authority):
        url = f"{place}/0/{name}?ca={authority}"
        with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as work:
            for round_ in range(3):
                jobs.send_many([b"x" * size for size in (0, 1, 100_000, 1_000_000)], timeout=20)
                for size in (0, 1, 100_000, 1_000_000):
                    message = work.recv(timeout=20)
                    assert len(message.value) == size, round_
                    message.ack()
                client.client_kill_filter(_type="normal", skipme=True)
            assert jobs.stats()["reconnects"] + work.stats()["reconnects"] > 0
        with pytest.raises(errors.IpcError):
            ipckit.sender(f"{place}/0/{name}", timeout=10)
    assert client.xlen(name) == 12


@contextlib.contextmanager
def running(binary, directory, number, *lines):
    """One more server with a configuration of its own: a replica, a Sentinel."""
    port = free_port()
    file = directory / f"{number}.conf"
    place = directory / str(number)
    place.mkdir()
    file.write_text("\n".join([f"port {port}", "bind 127.0.0.1", f"dir {place}", 'save ""', *lines, ""]))
    mode = ["--sentinel"] if any(line.startswith("sentinel") for line in lines) else []
    process = subprocess.Popen([binary, str(file), *mode], stdout=subprocess.DEVNULL)
    with process:
        try:
            with redis.Redis(port=port) as client:

                def answers():
                    with contextlib.suppress(redis.ConnectionError):
                        return client.ping()

                until(answers)
                yield port, client
        finally:
            process.kill()


@pytest.mark.timeout(120)
def test_sentinels_lead_to_the_new_master(tmp_path):
    with redis_server(private=True) as server, contextlib.ExitStack() as stack:
        assert server.binary
        port = parse(server.url).host.port
        _, replica = stack.enter_context(running(server.binary, tmp_path, 1, f"replicaof 127.0.0.1 {port}"))
        until(lambda: replica.info("replication")["master_link_status"] == "up")
        watch, sentinel = stack.enter_context(
            running(
                server.binary,
                tmp_path,
                2,
                f"sentinel monitor main 127.0.0.1 {port} 1",
                "sentinel down-after-milliseconds main 500",
                "sentinel failover-timeout main 3000",
            )
        )
        until(lambda: sentinel.sentinel_master("main")["num-slaves"] == 1)
        url = f"redis://127.0.0.1:{watch}/0/jobs?sentinel=main"
        with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as work:
            jobs.send(b"before")
            work.recv(timeout=5).ack()
            until(lambda: replica.xlen("jobs") == 1)
            server.kill()
            jobs.send(b"after", timeout=60)
            until(lambda: replica.info("replication")["role"] == "master")
            message = work.recv(timeout=30)
            assert message.value == b"after"
            message.ack()
        with pytest.raises(errors.NothingListening):
            ipckit.sender(url.replace("=main", "=other"), timeout=0.5)
        with pytest.raises(errors.BadUrl):
            ipckit.sender("redis://a,b/0/jobs")
