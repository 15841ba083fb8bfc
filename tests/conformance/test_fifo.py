from uuid import uuid4

import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract


class TestFifo(ChannelContract):
    schemes = ("fifo",)

    @pytest.fixture
    def url(self) -> str:
        return f"fifo://contract-{uuid4().hex}"


class TestFifoQueue(QueueContract):
    schemes = ("fifo",)

    @pytest.fixture
    def url(self) -> str:
        return "fifo://queue"


class TestFifoTopics(PubSubContract):
    schemes = ("fifo",)

    @pytest.fixture
    def url(self) -> str:
        return "fifo://topics"


class TestFifoCalls(RpcContract):
    schemes = ("fifo",)

    @pytest.fixture
    def url(self) -> str:
        return f"fifo://contract-{uuid4().hex}"
