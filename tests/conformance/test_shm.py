import pytest

from ipckit.testing.conformance import ChannelContract


class TestShm(ChannelContract):
    schemes = ("shm",)

    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"
