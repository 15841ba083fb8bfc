import itertools
import os
import socket

import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, free_port

_groups = itertools.count(1)


class TestUdp(ChannelContract):
    schemes = ("udp",)

    @pytest.fixture
    def url(self) -> str:
        return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"


class TestUdpGroupTopics(PubSubContract):
    @pytest.fixture
    def url(self) -> str:
        number = next(_groups)
        return f"udp://239.255.{os.getpid() % 256}.{number % 256}:{free_port(socket.SOCK_DGRAM)}?interface=127.0.0.1"


class TestUdpTopics(PubSubContract):
    @pytest.fixture
    def url(self) -> str:
        return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
