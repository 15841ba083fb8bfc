import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract, free_port


class TestZmqTcp(ChannelContract):
    schemes = ("zmq+tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"zmq+tcp://127.0.0.1:{free_port()}"


class TestZmqIpc(ChannelContract):
    schemes = ("zmq+ipc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+ipc://conformance"


class TestZmqInproc(ChannelContract):
    schemes = ("zmq+inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+inproc://conformance"


class TestZmqTcpQueue(QueueContract):
    schemes = ("zmq+tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"zmq+tcp://127.0.0.1:{free_port()}"


class TestZmqIpcQueue(QueueContract):
    schemes = ("zmq+ipc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+ipc://conformance"


class TestZmqInprocQueue(QueueContract):
    schemes = ("zmq+inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+inproc://conformance"


class TestZmqTcpTopics(PubSubContract):
    schemes = ("zmq+tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"zmq+tcp://127.0.0.1:{free_port()}"


class TestZmqIpcTopics(PubSubContract):
    schemes = ("zmq+ipc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+ipc://conformance"


class TestZmqInprocTopics(PubSubContract):
    schemes = ("zmq+inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+inproc://conformance"


# PUSH/PULL and PUB/SUB themselves, which promise less (see their capabilities).


class TestZmqTcpNativeQueue(QueueContract):
    schemes = ("zmq+tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"zmq+tcp://127.0.0.1:{free_port()}?native=on"


class TestZmqIpcNativeQueue(QueueContract):
    schemes = ("zmq+ipc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+ipc://conformance?native=on"


class TestZmqInprocNativeQueue(QueueContract):
    schemes = ("zmq+inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+inproc://conformance?native=on"


class TestZmqTcpNativeTopics(PubSubContract):
    schemes = ("zmq+tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"zmq+tcp://127.0.0.1:{free_port()}?native=on"


class TestZmqIpcNativeTopics(PubSubContract):
    schemes = ("zmq+ipc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+ipc://conformance?native=on"


class TestZmqInprocNativeTopics(PubSubContract):
    schemes = ("zmq+inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+inproc://conformance?native=on"


class TestZmqTcpCalls(RpcContract):
    schemes = ("zmq+tcp",)

    @pytest.fixture
    def url(self) -> str:
        return f"zmq+tcp://127.0.0.1:{free_port()}"


class TestZmqIpcCalls(RpcContract):
    schemes = ("zmq+ipc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+ipc://conformance"


class TestZmqInprocCalls(RpcContract):
    schemes = ("zmq+inproc",)

    @pytest.fixture
    def url(self) -> str:
        return "zmq+inproc://conformance"
