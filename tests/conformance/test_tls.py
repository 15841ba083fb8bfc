from pathlib import Path

import pytest
import trustme

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract, free_port


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    ca.cert_pem.write_to_path(directory / "ca.pem")
    return directory


class TestTls(ChannelContract):
    schemes = ("tls",)

    @pytest.fixture
    def url(self, certificate: Path) -> str:
        return f"tls://127.0.0.1:{free_port()}?ca={certificate}/ca.pem&cert={certificate}/server.pem"


class TestTlsQueue(QueueContract):
    schemes = ("tls",)

    @pytest.fixture
    def url(self, certificate: Path) -> str:
        return f"tls://127.0.0.1:{free_port()}?ca={certificate}/ca.pem&cert={certificate}/server.pem"


class TestTlsTopics(PubSubContract):
    schemes = ("tls",)

    @pytest.fixture
    def url(self, certificate: Path) -> str:
        return f"tls://127.0.0.1:{free_port()}?ca={certificate}/ca.pem&cert={certificate}/server.pem"


class TestTlsCalls(RpcContract):
    schemes = ("tls",)

    @pytest.fixture
    def url(self, certificate: Path) -> str:
        return f"tls://127.0.0.1:{free_port()}?ca={certificate}/ca.pem&cert={certificate}/server.pem"
