"""Calls over NATS from clients that are no ipckit's. Groups of servers: test_group_calls."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator

import nats
import pytest
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats
from tests.unit.test_group_calls import Shop

import ipckit
import ipckit.aio
from ipckit.rpc import _micro
from ipckit.testing.conformance import broker
from ipckit.testing.servers import Server, nats_server


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with broker(nats_server()) as server:
        yield server


@pytest.fixture
def url(running: Server) -> str:
    return running.address(f"/shop-{secrets.token_hex(4)}")


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


class Words(ipckit.Service):
    def repeat(self, text: str, times: int) -> str:
        return text * times

    def shout(self, text: str, times: int) -> None:
        raise ValueError(text * times)


def test_an_answer_that_nats_does_not_take_fails_its_own_call(url: str) -> None:
    """The NATS server breaks with who sends more than its max_payload, and with it every call would be lost."""
    name = url.rpartition("/")[2]
    with ipckit.Server(url, Words(), Shop()), ipckit.client(url, Shop) as shop:
        answer = request(url, f"{name}.words.repeat", b'{"text": "x", "times": 2000000}')
        assert answer.headers is not None
        assert answer.headers["Nats-Service-Error-Code"] == "413"
        answer = request(url, f"{name}.words.shout", b'{"text": "x\\u0000", "times": 1000000}')
        assert answer.headers is not None
        assert answer.headers["Nats-Service-Error"].startswith("ValueError: xxx")
        assert shop.add(1, 2) == 3
        stats = ServiceStats.from_dict(json.loads(request(url, f"$SRV.STATS.{name}").data))
        assert {each.name: each.num_errors for each in stats.endpoints if each.num_requests} == {
            "words_repeat": 1,
            "words_shout": 1,
        }


def test_only_what_stock_clients_can_name_is_counted_and_listed(url: str) -> None:
    name = url.rpartition("/")[2]
    with ipckit.Server(url) as server:
        server.expose("with a space", Shop())
        server.expose("a_b", Shop())
        request(url, f"{name}.a_b.Order", b'{"item": "tea", "qty": 2}')  # by the message, and counted for the method
        request(url, f"{name}.a.b_order")  # another's, though the names look alike
        stats = ServiceStats.from_dict(json.loads(request(url, f"$SRV.STATS.{name}").data))
        found = {each.name: each for each in stats.endpoints}
        assert {each.partition("_")[0] for each in found} == {"a"}
        assert (found["a_b_order"].num_requests, found["a_b_order"].num_errors) == (1, 0)
        assert server.stats()["connections_active"] == 0  # they are no connections


@pytest.mark.parametrize(
    ("version", "semantic"),
    [("1.2.3", "1.2.3"), ("0.1.dev3+g1234.d2", "0.1.0"), ("2", "2.0.0"), ("1.2.3.4rc1", "1.2.3")],
)
def test_the_version_is_semantic(version: str, semantic: str) -> None:
    assert _micro._semantic(version) == semantic
