"""Calls over NATS: a group of servers, and the clients that are no ipckit's."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import msgspec
import nats
import pytest
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.testing.conformance import broker
from ipckit.testing.servers import Server, nats_server


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


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with broker(nats_server()) as server:
        yield server


@pytest.fixture
def url(running: Server) -> str:
    return running.address(f"/shop-{secrets.token_hex(4)}")


def eventually(true: object) -> None:
    until = time.monotonic() + 20
    while not true():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.005)


# -- stock clients ---------------------------------------------------------------------------------------------------------


async def ask(url: str, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> nats.aio.msg.Msg:
    client = await nats.connect(url.rpartition("/")[0])
    try:
        return await client.request(subject, body, timeout=10, headers=headers)
    finally:
        await client.close()


def request(url: str, subject: str, body: bytes = b"", headers: dict[str, str] | None = None) -> nats.aio.msg.Msg:
    return asyncio.run(ask(url, subject, body, headers))


def test_a_stock_client_lists_and_calls(url: str) -> None:
    name = url.rpartition("/")[2]
    with ipckit.Server(url, Shop()) as server:
        ping = ServicePing.from_dict(json.loads(request(url, f"$SRV.PING.{name}").data))
        info = ServiceInfo.from_dict(json.loads(request(url, f"$SRV.INFO.{name}.{ping.id}").data))
        assert {each.subject for each in info.endpoints} >= {f"{name}.shop.add", f"{name}.shop.order"}
        assert f"{name}.shop.count" not in {each.subject for each in info.endpoints}  # a stream is not for one request
        assert request(url, f"{name}.shop.add", b'{"a": 2, "b": 3}').data == b"5"
        assert request(url, f"{name}.shop.add", b'{"a": 2}').data == b"3"
        assert json.loads(request(url, f"{name}.shop.order", b'{"item": "tea", "qty": 2}').data) == {
            "item": "tea",
            "qty": 2,
        }
        assert request(url, f"{name}.shop.Order", b'{"item": "tea", "qty": 2}').data
        stats = ServiceStats.from_dict(json.loads(request(url, f"$SRV.STATS.{name}").data))
        (add,) = [each for each in stats.endpoints if each.name == "shop_add"]
        assert (add.num_requests, add.num_errors) == (2, 0)
        assert server.stats()["calls"] >= 4


@pytest.mark.parametrize(
    ("call", "body", "code", "text"),
    [
        ("shop.add", b'{"a": "x"}', "400", "$.a: expected int"),
        ("shop.add", b"{", "400", "json"),
        ("shop.fail", b"", "500", "ValueError: so it is"),
        ("shop.nothing", b"", "404", "no method"),
        ("nobody.add", b"", "404", "nothing is exposed"),
        ("shop.count", b'{"n": 1}', "404", "not for one request"),
        ("ipckit.targets", b"", "404", "not for one request"),
    ],
)
def test_a_stock_client_is_told_what_is_wrong(url: str, call: str, body: bytes, code: str, text: str) -> None:
    with ipckit.Server(url, Shop()):
        answer = request(url, f"{url.rpartition('/')[2]}.{call}", body)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == code
    assert text in answer.headers["Nats-Service-Error"]


def test_the_deadline_of_a_stock_client_travels(url: str) -> None:
    with ipckit.Server(url, shop := Shop()):
        answer = request(url, f"{url.rpartition('/')[2]}.shop.hold", b"", {"Ipckit-Timeout": "0.05"})
        shop.free.set()
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == "504"


def test_rubbish_costs_nobody_anything(url: str) -> None:
    name = url.rpartition("/")[2]

    async def rubbish() -> None:
        client = await nats.connect(url.rpartition("/")[0])
        for place in ("call", "all", "news"):
            for payload in (b"", b"x", b"\x00" * 5, b"\x00\xff\xff\xff\xff" + b"x" * 40, secrets.token_bytes(60)):
                for reply in ("", "_INBOX.me", f"ipckit.rpc.{name}.to.ffff.s"):
                    await client.publish(f"ipckit.rpc.{name}.{place}", payload, reply)
        await client.close()

    with ipckit.Server(url, Shop()), ipckit.client(url, Shop) as shop:
        asyncio.run(rubbish())
        assert shop.add(1, 2) == 3
        assert list(shop.count(3)) == [0, 1, 2]


# -- the group -------------------------------------------------------------------------------------------------------------


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
from tests.unit.test_nats_calls import Shop
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

                threads = [threading.Thread(target=call, args=(name,)) for name in ("hold", "hold_again") * 8]
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
        assert set(seen) == {os.getpid(), "PeerDied"}
        assert seen.count("PeerDied") <= 8
        assert shop.add(1, 1) == 2


def test_both_sides_outlive_the_broker() -> None:
    with broker(nats_server(private=True)) as private:
        url = private.address("/shop")
        with ipckit.Server(url, Shop()), ipckit.client(url, Shop, timeout=30) as shop:
            assert shop.add(1) == 2
            private.kill()
            private.start()
            until = time.monotonic() + 30
            while True:
                try:
                    assert shop.add(2) == 3
                    break
                except errors.PeerError:
                    assert time.monotonic() < until
