from uuid import uuid4

import pytest

from ipckit.testing.conformance import ChannelContract


class TestFifo(ChannelContract):
    schemes = ("fifo",)

    @pytest.fixture
    def url(self) -> str:
        return f"fifo://contract-{uuid4().hex}"
