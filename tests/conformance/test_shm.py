import pytest

from ipckit.testing.conformance import ChannelContract, QueueContract


class TestShm(ChannelContract):
    schemes = ("shm",)

    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"


class TestShmQueue(QueueContract):
    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"
