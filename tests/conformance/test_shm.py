import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract


class TestShm(ChannelContract):
    schemes = ("shm",)

    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"


class TestShmQueue(QueueContract):
    schemes = ("shm",)

    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"


class TestShmTopics(PubSubContract):
    schemes = ("shm",)

    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"


class TestShmCalls(RpcContract):
    schemes = ("shm",)

    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"
