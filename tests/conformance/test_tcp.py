import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract, free_port


class TestTcp(ChannelContract):
    schemes = ("tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"tcp://127.0.0.1:{free_port()}"


class TestTcpQueue(QueueContract):
    schemes = ("tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"tcp://127.0.0.1:{free_port()}"


class TestTcpTopics(PubSubContract):
    schemes = ("tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"tcp://127.0.0.1:{free_port()}"


class TestTcpCalls(RpcContract):
    schemes = ("tcp",)

    @pytest.fixture
    def url(self) -> str:
        return "tcp://127.0.0.1:0"
