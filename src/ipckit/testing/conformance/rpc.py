"""`RpcContract`: one service, called over the transport in all its shapes; what goes wrong has the right name at the caller."""

from __future__ import annotations

import pytest

from ipckit import Capabilities

from . import _services as services
from ._base import SLACK, Contract, eventually
from ._parties import HANG, End, Local, Party
from ._process import Process, Remote
from ._services import Shop, Sold


class RpcContract(Contract):
    """A subclass brings the fixture `url`: an address that nobody else uses."""

    @pytest.fixture(autouse=True)
    def has_calls(self, capabilities: Capabilities) -> None:
        self.needs("rpc" in capabilities.patterns, "rpc")

    def meeting(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> tuple[End, End]:
        """Their server, and our client of it: at an address, or at the two ends of a pair."""
        if capabilities.listen:
            server = self.serving(there, url)
            return server, here.open("client", server.url, timeout=10).result(HANG)
        pair = self.meet(here, there, url, capabilities)
        server = there.open("Server", pair.there).result(HANG)
        server.call("expose", "shop", Shop())
        return server, here.open("client", pair.here, timeout=10).result(HANG)

    @staticmethod
    def serving(party: Party, url: str) -> End:
        server = party.open("Server", url, timeout=10).result(HANG)
        server.call("expose", "shop", Shop())
        return server

    @pytest.fixture
    def client(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> End:
        """Ours, of a server that is theirs."""
        return self.meeting(here, there, url, capabilities)[1]

    def test_the_four_shapes(self, client: End) -> None:
        once = [5, 3, 7, True, [], 499500, 0, True]
        assert client.run(services.four_shapes, 1000).result(HANG) == once * 2

    def test_without_a_contract(self, client: End) -> None:
        result = client.run(services.untyped).result(HANG)
        assert result == (5, 3, {"item": "tea", "total": 4}, [0, 1, 2], 6)

    def test_errors(self, client: End) -> None:
        found = client.run(services.failing).result(HANG)
        assert found["fail"] == ("RemoteError", "so", "ValueError")
        assert found["odd"][2].endswith("_services.Odd")
        assert found["afail"] == found["fail"]
        assert found["stream"] == ("RemoteError", "enough", "ValueError")
        assert found["argument"][:2] == ("SchemaError", "$.order.qty: expected int, got str")
        assert found["result"][:2] == ("SchemaError", "$: expected int, got str")
        assert found["method"][0] == "UnknownMethod"
        assert found["target"][0] == "UnknownTarget"

    def test_deadlines_travel(self, client: End) -> None:
        assert [each[0] for each in client.run(services.late).result(HANG)] == ["DeadlineExceeded"] * 2

    def test_a_stream_left_early_is_closed(self, client: End) -> None:
        assert client.run(services.left_early).result(HANG)

    def test_a_slow_reader_holds_its_producer_only(self, client: End) -> None:
        """A window and what is on its way in the link, and not more."""
        given, later = client.run(services.held_back).result(HANG)
        assert 0 < given == later < 2000

    def test_metadata(self, client: End) -> None:
        told, atold, other = client.run(services.metadata).result(HANG)
        assert told == atold == {"traceparent": "00-1-2-01", "who": "me"}
        assert other == {"a": "b"}

    def test_many_callers_at_once(self, client: End) -> None:
        assert client.run(services.many, 20, 30).result(HANG) == 600

    def test_an_incompatible_contract_is_refused_when_it_is_connected(self, client: End) -> None:
        text = client.run(services.expect_other).result(HANG)
        assert "add.a: string is written, integer is read" in text
        assert client.run(services.add, 1, 2).result(HANG) == 3

    def test_pushes_reach_the_subscribers_of_their_type(
        self, here: Local, there: Party, url: str, capabilities: Capabilities
    ) -> None:
        server, client = self.meeting(here, there, url, capabilities)
        pending = client.run(services.pushes, 3)
        assert eventually(lambda: server.call("broadcast", Sold("first", 0)) == 1 or pending.done())
        server.call("broadcast", services.Order("of another type", 1))
        for number in (1, 2):
            server.call("broadcast", Sold("tea", number))
        assert pending.result(HANG) == [Sold("first", 0), Sold("tea", 1), Sold("tea", 2)]
        assert server.call("broadcast", services.Order("of another type", 1)) == 0

    def test_a_dead_server_ends_its_calls_at_once_and_the_client_stays_good(
        self, here: Local, process: Process, spawned: Remote, url: str, capabilities: Capabilities
    ) -> None:
        server, client = self.meeting(here, spawned, url, capabilities)
        assert client.run(services.add, 1, 2).result(HANG) == 3
        held = [client.run(services.hold) for _ in range(3)]
        assert eventually(lambda: server.call("stats")["in_flight"] >= 3)
        process.kill()
        for each in held:
            assert each.result(capabilities.death_bound + SLACK)[0] == "PeerDied"
        if capabilities.listen:
            again = self.serving(here, server.url)
            assert client.run(services.add, 2, 3).result(HANG) == 5
            again.call("shutdown", 0)
