import pytest
import trustme

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract, free_port

pytest.importorskip("grpc")


class TestGrpc(ChannelContract):
    schemes = ("grpc",)

    @pytest.fixture
    def url(self) -> str:
        return f"grpc://127.0.0.1:{free_port()}"


class TestGrpcUnix(ChannelContract):
    schemes = ("grpc+unix",)

    @pytest.fixture
    def url(self) -> str:
        return "grpc+unix://conformance"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(directory / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(directory / "both.pem")
    return directory


class TestGrpcTls(ChannelContract):
    schemes = ("grpcs",)

    @pytest.fixture
    def url(self, certificates) -> str:
        return f"grpcs://127.0.0.1:{free_port()}?ca={certificates}/ca.pem&cert={certificates}/both.pem"


class TestGrpcQueue(QueueContract):
    schemes = ("grpc",)

    @pytest.fixture
    def url(self) -> str:
        return f"grpc://127.0.0.1:{free_port()}"


class TestGrpcUnixQueue(QueueContract):
    schemes = ("grpc+unix",)

    @pytest.fixture
    def url(self) -> str:
        return "grpc+unix://conformance"


class TestGrpcTlsQueue(QueueContract):
    schemes = ("grpcs",)

    @pytest.fixture
    def url(self, certificates) -> str:
        return f"grpcs://127.0.0.1:{free_port()}?ca={certificates}/ca.pem&cert={certificates}/both.pem"


class TestGrpcTopics(PubSubContract):
    schemes = ("grpc",)

    @pytest.fixture
    def url(self) -> str:
        return f"grpc://127.0.0.1:{free_port()}"


class TestGrpcUnixTopics(PubSubContract):
    schemes = ("grpc+unix",)

    @pytest.fixture
    def url(self) -> str:
        return "grpc+unix://conformance"


class TestGrpcTlsTopics(PubSubContract):
    schemes = ("grpcs",)

    @pytest.fixture
    def url(self, certificates) -> str:
        return f"grpcs://127.0.0.1:{free_port()}?ca={certificates}/ca.pem&cert={certificates}/both.pem"


class TestGrpcCalls(RpcContract):
    schemes = ("grpc",)

    @pytest.fixture
    def url(self) -> str:
        return f"grpc://127.0.0.1:{free_port()}"


class TestGrpcUnixCalls(RpcContract):
    schemes = ("grpc+unix",)

    @pytest.fixture
    def url(self) -> str:
        return "grpc+unix://calls"


class TestGrpcTlsCalls(RpcContract):
    schemes = ("grpcs",)

    @pytest.fixture
    def url(self, certificates) -> str:
        both = f"cert={certificates}/both.pem"
        return f"grpcs://127.0.0.1:{free_port()}?ca={certificates}/ca.pem&{both}&client_ca={certificates}/ca.pem"
