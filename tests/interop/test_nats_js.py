"""The nats package of Node.js, a client of micro services that does not know us: it lists our servers, and calls them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ipckit
from ipckit.testing.conformance import broker
from ipckit.testing.servers import nats_server

SCRIPT = Path(__file__).with_name("nats_client.js")


class Shop(ipckit.Service):
    def add(self, a: int, b: int) -> int:
        return a + b

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)


def test_it_lists_and_calls_two_instances(
    node: str, packages: Callable[..., Path], run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "NODE_PATH", str(packages("nats@^2.29")))
    with broker(nats_server()) as nats:
        url = nats.address("/shops.eu")  # dots are not for the name of a service
        with ipckit.Server(url, Shop()) as one, ipckit.Server(url, Shop()) as two:
            found = json.loads(run(node, str(SCRIPT), nats.url, "shops_eu").line())
            assert len(set(found.pop("ids"))) == 2
            assert found.pop("everybody").count("shops_eu") == 2
            assert sum(found["counts"]) == 41
            assert all(found.pop("counts"))
            assert found == {
                "endpoints": ["shop_add"],  # a stream is not for one request
                "sums": list(range(1, 41)),
                "refused": ["400", "$: object missing required field a"],
            }
            assert one.stats()["calls"] + two.stats()["calls"] == 41
