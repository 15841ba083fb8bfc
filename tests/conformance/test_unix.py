import pytest

from ipckit.testing.conformance import ChannelContract


class TestUnix(ChannelContract):
    schemes = ("unix",)

    @pytest.fixture
    def url(self) -> str:
        return "unix://contract"
