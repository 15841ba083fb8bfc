import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract


class TestPipe(ChannelContract):
    schemes = ("pipe",)

    @pytest.fixture
    def url(self) -> str:
        return "pipe://"


class TestPipeQueue(QueueContract):
    schemes = ("pipe",)

    @pytest.fixture
    def url(self) -> str:
        return "pipe://"


class TestPipeTopics(PubSubContract):
    schemes = ("pipe",)

    @pytest.fixture
    def url(self) -> str:
        return "pipe://"


class TestPipeCalls(RpcContract):
    schemes = ("pipe",)

    @pytest.fixture
    def url(self) -> str:
        return "pipe://"
