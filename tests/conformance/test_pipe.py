import pytest

from ipckit.testing.conformance import ChannelContract


class TestPipe(ChannelContract):
    schemes = ("pipe",)

    @pytest.fixture
    def url(self) -> str:
        return "pipe://"
