from collections.abc import Iterator
from contextlib import suppress
from uuid import uuid4

import pytest

import ipckit
from ipckit import errors
from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract


class TestMq(ChannelContract):
    schemes = ("mq",)

    @pytest.fixture
    def url(self) -> str:
        return f"mq://contract-{uuid4().hex}?depth=8&frame=2048"  # all queues of a user share one small budget


class TestMqQueue(QueueContract):
    schemes = ("mq",)

    @pytest.fixture
    def url(self) -> str:
        return f"mq://queue-{uuid4().hex}?depth=8&frame=2048"

    @pytest.fixture(autouse=True)
    def emptied(self, url: str, runtime_dir: str) -> Iterator[None]:
        """What a contract leaves is kept by the kernel: take it out, and the last one removes the queue."""
        yield
        with ipckit.receiver(url) as rest, suppress(errors.Timeout):
            while True:
                rest.recv(0)


class TestMqTopics(PubSubContract):
    schemes = ("mq",)

    @pytest.fixture
    def url(self) -> str:
        return f"mq://topics-{uuid4().hex}?depth=8&frame=2048"


class TestMqCalls(RpcContract):
    schemes = ("mq",)

    @pytest.fixture
    def url(self) -> str:
        return f"mq://contract-{uuid4().hex}?depth=8&frame=2048"
