"""@grpc/grpc-js, the gRPC of Node.js that does not know us: it calls our servers, and ours call its server, by the file that
`ipckit contract export --proto` writes.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.rpc import current, using

pytest.importorskip("grpc")
from ipckit.rpc.protobuf import schema_of

HERE = Path(__file__).parent
PACKAGES = ("@grpc/grpc-js@^1.13", "@grpc/proto-loader@^0.8")


class Order(msgspec.Struct):
    item: str
    qty: int = 1


class Receipt(msgspec.Struct):
    lines: list[Order]
    total: int


class Shop(ipckit.Service):
    def __init__(self) -> None:
        self.over = threading.Event()

    def price(self, item: str, qty: int = 1) -> int:
        return len(item) * qty

    def order(self, order: Order) -> Receipt:
        return Receipt([order], order.qty * 3)

    def count(self, n: int) -> Iterator[int]:
        try:
            yield from range(n)
        finally:
            if n > 1000:
                self.over.set()

    def total(self, orders: Iterator[Order]) -> int:
        return sum(order.qty for order in orders)

    def scaled(self, numbers: Iterator[int], by: int) -> Iterator[int]:
        for number in numbers:
            yield number * by

    def fail(self) -> None:
        raise ValueError("so")

    def who(self) -> dict[str, str]:
        return dict(current().metadata)

    def hold(self) -> None:
        while not current().cancelled:
            self.over.wait(0.01)


@pytest.fixture(scope="module")
def modules(packages: Callable[..., Path]) -> Path:
    return packages(*PACKAGES)


@pytest.fixture
def proto(tmp_path: Path) -> Path:
    path = tmp_path / "shop.proto"
    path.write_text(schema_of(Shop, "shop").text())
    return path


@pytest.fixture(autouse=True)
def node_path(modules: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "NODE_PATH", str(modules))


CALLED = {
    "price": 3,
    "priced": 15,
    "receipt": {"lines": [{"item": "tea", "qty": 2}], "total": 6},
    "count": [0, 1, 2, 3],
    "total": 5,
    "scaled": [3, 6],
    "who": "node",
    "failure": [2, "so", 1],  # UNKNOWN
    "late": 4,  # DEADLINE_EXCEEDED
    "cancelled": 1,
}


def without_ours(found: dict) -> dict:
    """proto-loader names what an optional field belongs to."""
    for line in found.get("receipt", {}).get("lines", ()):
        line.pop("_qty", None)
    return found


def test_it_calls_a_server_of_threads(node: str, run: Callable, proto: Path) -> None:
    shop = Shop()
    with ipckit.Server("grpc://127.0.0.1:0", shop) as server:
        program = run(node, str(HERE / "grpc_client.js"), str(server.url.host.port), str(proto))
        assert without_ours(json.loads(program.line(50))) == CALLED
        assert shop.over.wait(20)  # cancelling reached the generator


def test_it_calls_a_server_of_a_loop(node: str, run: Callable, proto: Path) -> None:
    async def main() -> None:
        shop = Shop()
        async with ipckit.aio.Server("grpc://127.0.0.1:0", shop) as server:
            program = run(node, str(HERE / "grpc_client.js"), str(server.url.host.port), str(proto))
            assert without_ours(json.loads(await asyncio.to_thread(program.line, 50))) == CALLED
            assert await asyncio.to_thread(shop.over.wait, 20)

    asyncio.run(main())


def test_its_server_is_called_by_contract(node: str, run: Callable, proto: Path) -> None:
    program = run(node, str(HERE / "grpc_server.js"), str(proto))
    url = f"grpc://127.0.0.1:{program.line()}"
    with ipckit.client(url, Shop) as shop:
        assert (shop.price("tea"), shop.price("tea", 2)) == (3, 6)
        assert shop.order(Order("tea", 2)) == Receipt([Order("tea", 2)], 6)
        assert list(shop.count(3)) == [0, 1, 2]
        assert shop.total(iter([Order("a", 2), Order("b", 3)])) == 5
        assert list(shop.scaled(iter([1, 2]), 3)) == [3, 6]
        assert using(shop, metadata={"who": "me"}).who() == {"who": "me"}
        with pytest.raises(errors.RemoteError, match="no such thing") as caught:
            shop.fail()
        assert caught.value.type == "NOT_FOUND"
        with pytest.raises(errors.DeadlineExceeded):
            using(shop, timeout=0.2).hold()

    async def main() -> None:
        async with await ipckit.aio.client(url, Shop) as shop:
            assert await shop.price("tea") == 3
            assert [each async for each in shop.scaled(iter([1, 2]), 3)] == [3, 6]

    asyncio.run(main())
    program.finish()
