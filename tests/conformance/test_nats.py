import secrets

import pytest
import trustme

from ipckit.testing.conformance import ChannelContract, broker
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
