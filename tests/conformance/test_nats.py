import secrets

import pytest
import trustme

from ipckit import Capabilities
from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract, broker
from ipckit.testing.conformance._base import SLACK
from ipckit.testing.servers import Server, nats_server


@pytest.fixture(scope="module")
def server():
    with broker(nats_server()) as running:
        yield running


class TestNats(ChannelContract):
    schemes = ("nats",)

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/contract.{secrets.token_hex(4)}")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    authority = trustme.CA()
    directory = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(directory / "key.pem")
    issued.cert_chain_pems[0].write_to_path(directory / "cert.pem")
    authority.cert_pem.write_to_path(directory / "ca.pem")
    with broker(
        nats_server(tls=(directory / "cert.pem", directory / "key.pem"), user="us", password="s/e:c")
    ) as running:
        yield running, str(directory / "ca.pem")


class TestNatsTls(ChannelContract):
    schemes = ("nats+tls",)

    @pytest.fixture
    def url(self, encrypted: tuple[Server, str]) -> str:
        server, authority = encrypted
        return server.address(f"/contract.{secrets.token_hex(4)}", cafile=authority)


@pytest.fixture(scope="module")
def roomy():
    """A server that takes 1 MiB and its headers in one payload."""
    with broker(nats_server(max_payload=8 << 20)) as running:
        yield running


class TestNatsQueue(QueueContract):
    schemes = ("nats", "nats+tls")  # the same over TLS: tests/unit/test_nats_queue.py

    @pytest.fixture
    def url(self, roomy: Server) -> str:
        return roomy.address(f"/queue-{secrets.token_hex(4)}", ack_wait="2s")

    @staticmethod
    def lease(capabilities: Capabilities) -> float:
        return 2.0 + SLACK


class TestNatsQueueLanes(QueueContract):
    schemes = ("nats",)

    @pytest.fixture
    def url(self, roomy: Server) -> str:
        return roomy.address(f"/queue-{secrets.token_hex(4)}", ack_wait="2s", lanes="3")

    @staticmethod
    def lease(capabilities: Capabilities) -> float:
        return 2.0 + SLACK


class TestNatsTopics(PubSubContract):
    schemes = ("nats", "nats+tls")

    @pytest.fixture
    def url(self, roomy: Server) -> str:
        return roomy.address(f"/topics-{secrets.token_hex(4)}")


class TestNatsCalls(RpcContract):
    schemes = ("nats", "nats+tls")

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/calls-{secrets.token_hex(4)}")
