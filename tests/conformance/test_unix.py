import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract


class TestUnix(ChannelContract):
    schemes = ("unix",)

    @pytest.fixture
    def url(self) -> str:
        return "unix://contract"


class TestUnixQueue(QueueContract):
    schemes = ("unix",)

    @pytest.fixture
    def url(self) -> str:
        return "unix://queue"


class TestUnixTopics(PubSubContract):
    schemes = ("unix",)

    @pytest.fixture
    def url(self) -> str:
        return "unix://contract"


class TestUnixCalls(RpcContract):
    schemes = ("unix",)

    @pytest.fixture
    def url(self) -> str:
        return "unix://contract"
