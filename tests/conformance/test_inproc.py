from uuid import uuid4

import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract


class TestInproc(ChannelContract):
    schemes = ("inproc",)

    @pytest.fixture
    def url(self) -> str:
        return f"inproc://{uuid4().hex}"


class TestInprocQueue(QueueContract):
    schemes = ("inproc",)

    @pytest.fixture
    def url(self) -> str:
        return f"inproc://{uuid4().hex}"


class TestInprocTopics(PubSubContract):
    schemes = ("inproc",)

    @pytest.fixture
    def url(self) -> str:
        return f"inproc://{uuid4().hex}"


class TestInprocCalls(RpcContract):
    schemes = ("inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "inproc://contract"
