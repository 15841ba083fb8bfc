import itertools
import os
import signal
import socket

import pytest

import ipckit
from ipckit.testing.conformance import ChannelContract, PubSubContract, free_port
from ipckit.testing.conformance._parties import HANG, Local
from ipckit.testing.conformance._process import Process, Remote
from ipckit.testing.conformance._queueing import publish, take
from ipckit.testing.conformance.queue import numbered, values

_groups = itertools.count(1)


class TestUdp(ChannelContract):
    schemes = ("udp",)

    @pytest.fixture
    def url(self) -> str:
        return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"


class BestEffort(PubSubContract):
    """What the contract asks of reliable transports only, in a form that a few datagrams inside one machine can keep."""

    def test_killed_ones_cost_nobody(
        self, here: Local, spawned: Remote, process: Process, neighbour: Local, url: str
    ) -> None:
        publisher, (_, alive) = self.gather(here, [spawned, neighbour], url)
        process.kill()
        publisher.run(publish, [(value, "t") for value in numbered(50)]).result(HANG)
        assert values(alive.run(take, 50).result(HANG)) == numbered(50)

    def test_a_killed_publisher_is_replaced(
        self, here: Local, spawned: Remote, process: Process, neighbour: Local, url: str
    ) -> None:
        """Its address is free at once, and who waits finds the next one."""
        first = spawned.open("publisher", url, timeout=10).result(HANG)
        subscriber = neighbour.open("subscriber", url, timeout=10).result(HANG)
        first.call("wait_for_subscribers", 1, 10)
        first.run(publish, [(b"1", "t")]).result(HANG)
        assert values(subscriber.run(take, 1).result(HANG)) == [b"1"]
        process.kill()
        second = here.open("publisher", url, timeout=10).result(HANG)
        receiving = subscriber.run(take, 1)
        second.call("wait_for_subscribers", 1, 20)
        second.run(publish, [(b"2", "t")]).result(HANG)
        assert values(receiving.result(HANG)) == [b"2"]

    def test_a_stopped_subscriber_is_not_dead(self, here: Local, spawned: Remote, process: Process, url: str) -> None:
        publisher, (subscriber,) = self.gather(here, [spawned], url)
        process.signal(signal.SIGSTOP)
        try:
            publisher.run(publish, [(value, "t") for value in numbered(50)]).result(HANG)
        finally:
            process.signal(signal.SIGCONT)
        assert values(subscriber.run(take, 50).result(HANG)) == numbered(50)
        assert publisher.call("stats")["subscribers"] == 1


class TestUdpGroupTopics(BestEffort):
    schemes = ("udp",)

    @pytest.fixture
    def url(self) -> str:
        number = next(_groups)
        return f"udp://239.255.{os.getpid() % 256}.{number % 256}:{free_port(socket.SOCK_DGRAM)}?interface=127.0.0.1"


class TestUdpTopics(BestEffort):
    schemes = ("udp",)

    @pytest.fixture
    def url(self) -> str:
        return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"


def test_calls_are_refused_with_the_reason() -> None:
    with pytest.raises(ipckit.errors.Unsupported, match="a call that is never answered"):
        ipckit.Server("udp://127.0.0.1:0")
    with pytest.raises(ipckit.errors.Unsupported, match="a call that is never answered"):
        ipckit.client("udp://127.0.0.1:1")
