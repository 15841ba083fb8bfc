"""Calls to a group of servers, through NATS and through Redis; the contract of calls has one server."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import ipckit
from ipckit import errors
from ipckit.rpc import using
from ipckit.testing.conformance import broker
from ipckit.testing.servers import Server, nats_server, redis_server


class Order(msgspec.Struct):
    item: str
    qty: int


class Shop(ipckit.Service):
    def __init__(self) -> None:
        self.free = threading.Event()
        self.holding = 0

    def add(self, a: int, b: int = 1) -> int:
        return a + b

    def order(self, order: Order) -> Order:
        return order

    def echo(self, data: bytes) -> bytes:
        return data

    def fail(self) -> None:
        raise ValueError("so\nit is")

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    def total(self, numbers: Iterator[int]) -> int:
        return sum(numbers)

    def pid(self) -> int:
        return os.getpid()

    @ipckit.rpc(inline=False)
    def hold(self) -> int:
        self.holding += 1
        self.free.wait(30)
        return os.getpid()

    @ipckit.rpc(idempotent=True, inline=False)
    def hold_again(self) -> int:
        return self.hold()


@pytest.fixture(scope="module", params=["nats", "redis"])
def running(request: pytest.FixtureRequest) -> Iterator[Server]:
    with broker(nats_server() if request.param == "nats" else redis_server(private=True)) as server:
        yield server


def address(server: Server) -> str:
    name = f"shop-{secrets.token_hex(4)}"
    return server.address(f"/{name}" if server.product == "nats-server" else f"/0/{name}")


@pytest.fixture
def url(running: Server) -> str:
    return address(running)


def eventually(true: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_two_servers_share_the_calls_and_one_may_leave(url: str) -> None:
    with ipckit.Server(url, Shop()) as first, ipckit.client(url, Shop) as shop:
        with ipckit.Server(url, Shop()) as second:
            for number in range(200):
                assert shop.add(number, 1) == number + 1
            assert first.stats()["calls"] > 20
            assert second.stats()["calls"] > 20
            stop = threading.Event()
            failures: list[BaseException] = []

            def call() -> None:
                try:
                    while not stop.is_set():
                        assert shop.add(1, 2) == 3
                except BaseException as error:
                    failures.append(error)

            thread = threading.Thread(target=call)
            thread.start()
            second.shutdown()
            for number in range(50):
                assert shop.add(number, 1) == number + 1
            stop.set()
            thread.join(20)
            assert failures == []
        assert list(shop.count(1000)) == list(range(1000))


def test_streams_go_where_their_call_is(url: str) -> None:
    with ipckit.Server(url, Shop()), ipckit.Server(url, Shop()), ipckit.client(url, Shop) as shop:
        for _ in range(5):
            assert shop.total(iter(range(100))) == 4950
            assert list(shop.count(100)) == list(range(100))


def test_pushes_of_every_server_come_those_of_later_ones_too(url: str) -> None:
    with ipckit.Server(url, Shop()) as first, ipckit.client(url) as client:
        subscription = client.subscribe(Order)
        with ipckit.Server(url, Shop()) as second:
            eventually(lambda: second.broadcast(Order("second", 2)) == 1 or pump(client))
            eventually(lambda: first.broadcast(Order("first", 1)) == 1)
            found = {subscription.recv(10).item for _ in range(2)}
            assert found == {"first", "second"}


def pump(client: ipckit.Client) -> bool:
    client.call("shop", "add", 1)
    return False


def test_large_values_go_in_parts(url: str) -> None:
    data = secrets.token_bytes(3 << 20)
    with ipckit.Server(url, Shop()), ipckit.Server(url, Shop()), ipckit.client(url, Shop) as shop:
        assert shop.echo(data) == data
        with pytest.raises(errors.MessageTooLarge):
            shop.echo(bytes(17 << 20))
        assert shop.add(1, 2) == 3


KILLED = """
import sys, ipckit
from tests.unit.test_group_calls import Shop
server = ipckit.Server(sys.argv[1], Shop())
print("ready", flush=True)
server.wait()
"""


def test_a_killed_server_takes_its_own_calls_only(url: str) -> None:
    """One of two: its calls end at once, and those that may be repeated are taken by the other."""
    with ipckit.Server(url, ours := Shop()), ipckit.client(url, Shop) as shop:
        command = [sys.executable, "-c", KILLED, url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=os.getcwd()) as other:
            try:
                assert other.stdout is not None
                assert other.stdout.readline() == b"ready\n"
                seen: list[object] = []

                def call(name: str) -> None:
                    try:
                        seen.append(getattr(shop, name)())
                    except errors.IpcError as error:
                        seen.append(type(error).__name__)

                threads = [
                    threading.Thread(target=call, args=(name,))
                    for name in ("hold", "hold", "hold_again", "hold_again") * 4
                ]
                for thread in threads:
                    thread.start()
                eventually(lambda: ours.holding > 0 and shop.add(1) == 2)
                eventually(lambda: len({shop.pid() for _ in range(20)}) == 2)
                held = ours.holding
                other.send_signal(signal.SIGKILL)
                eventually(lambda: seen.count("PeerDied") + ours.holding == len(threads))
                ours.free.set()
                for thread in threads:
                    thread.join(20)
            finally:
                other.kill()
        assert 0 < held < len(threads)
        assert set(seen) <= {os.getpid(), "PeerDied"}
        assert seen.count("PeerDied") <= 8
        assert shop.add(1, 1) == 2


@pytest.mark.parametrize("start", [nats_server, redis_server])
def test_both_sides_outlive_the_broker(start: Callable[..., object]) -> None:
    with broker(start(private=True)) as private:  # type: ignore[arg-type]
        url = address(private)
        with ipckit.Server(url, Shop()), ipckit.client(url, Shop, timeout=30) as shop:
            assert shop.add(1) == 2
            private.kill()
            private.start()
            again(lambda: shop.add(2) == 3)


def test_nothing_is_left_in_redis() -> None:
    import redis

    with broker(redis_server(private=True)) as private:
        url = address(private)
        with ipckit.Server(url, Shop()), ipckit.client(url, Shop) as shop:
            assert list(shop.count(10)) == list(range(10))
            assert shop.total(iter(range(10))) == 45
            command = [sys.executable, "-c", KILLED, url]
            with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=os.getcwd()) as other:
                assert other.stdout is not None
                assert other.stdout.readline() == b"ready\n"
                eventually(lambda: shop.pid() == other.pid)
                other.kill()
        with ipckit.Server(url, Shop()), redis.Redis.from_url(private.url) as direct:  # it clears away what is dead
            eventually(lambda: len(direct.keys("*:box:*")) == 1)
            for key in direct.keys("*"):
                assert direct.pttl(key) > 0
                assert b":calls" not in key or direct.xlen(key) == 0
        with redis.Redis.from_url(private.url) as direct:
            eventually(lambda: direct.keys("*") == [])


def test_a_call_that_no_server_took_leaves_redis_with_its_client() -> None:
    import redis

    with broker(redis_server(private=True)) as private, redis.Redis.from_url(private.url) as direct:
        url = address(private)
        command = [sys.executable, "-c", KILLED, url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=os.getcwd()) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            try:
                with ipckit.client(url, Shop) as shop:
                    assert shop.add(1) == 2
                    other.send_signal(signal.SIGSTOP)
                    eventually(lambda: Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
                    for _ in range(3):
                        with pytest.raises(errors.DeadlineExceeded):
                            using(shop, timeout=0.05).add(1)
                (calls,) = direct.keys("*:calls")
                # Only what the server has been given, in the midst of something, is left.
                eventually(lambda: direct.xlen(calls) == direct.xpending(calls, "servers")["pending"] < 3)
            finally:
                other.kill()
        with pytest.raises(errors.NothingListening):
            ipckit.client(url, Shop, timeout=0.1)


def test_a_redis_that_forgot_everything_is_joined_again(caplog: pytest.LogCaptureFixture) -> None:
    """FLUSHALL, or a replica that was behind: the keys are gone, the connections are not."""
    import redis

    with broker(redis_server(private=True)) as private, redis.Redis.from_url(private.url) as direct:
        url = address(private)
        with ipckit.Server(url, Shop()), ipckit.client(url, Shop, timeout=30) as shop:
            assert shop.add(1) == 2
            direct.flushall()
            again(lambda: shop.add(2) == 3)
        assert "connecting again" in caplog.text


def again(call: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            assert call()
            return
        except errors.PeerError:
            assert time.monotonic() < until


def test_a_server_that_is_full_says_so_to_every_call(url: str) -> None:
    """Through a broker its calls come with a client that has been greeted by another server."""
    with ipckit.Server(url, max_connections=1) as full, ipckit.client(url) as first:
        full.expose("shop", Shop())
        assert first.call("shop", "add", 1) == 2
        with pytest.raises(errors.TargetBusy, match="1 connections already"):
            ipckit.client(url, Shop, timeout=20)
        with ipckit.Server(url, Shop()) as roomy, ipckit.client(url, Shop) as second, ipckit.client(url) as listening:
            subscription = listening.subscribe(Order)  # of who has room
            seen = set()
            for number in range(100):
                try:
                    seen.add(second.add(number) == number + 1)
                except errors.TargetBusy:
                    seen.add("busy")
            assert seen == {True, "busy"}
            assert roomy.broadcast(Order("tea", 1)) == 1
            assert subscription.recv(20) == Order("tea", 1)
        assert first.call("shop", "add", 1) == 2
        assert full.stats()["connections_active"] == 1
        assert 3 <= full.stats()["connections_refused"] <= 110  # and nobody tries again and again


def test_nobody_there_is_said(url: str) -> None:
    with pytest.raises(errors.NothingListening, match="nobody serves"):
        ipckit.client(url, Shop, timeout=0.3)
