from uuid import uuid4

import pytest

from ipckit.testing.conformance import ChannelContract


class TestMq(ChannelContract):
    schemes = ("mq",)

    @pytest.fixture
    def url(self) -> str:
        return f"mq://contract-{uuid4().hex}?depth=8&frame=2048"  # all queues of a user share one small budget
