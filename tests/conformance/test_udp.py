import socket

import pytest

from ipckit.testing.conformance import ChannelContract, free_port


class TestUdp(ChannelContract):
    schemes = ("udp",)

    @pytest.fixture
    def url(self) -> str:
        return f"udp://127.0.0.1:{free_port(socket.SOCK_DGRAM)}"
