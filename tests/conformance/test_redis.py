from collections.abc import Iterator
from uuid import uuid4

import pytest

from ipckit.testing.conformance import ChannelContract
from ipckit.testing.servers import Server, redis_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with redis_server() as server:
        yield server


class TestRedis(ChannelContract):
    schemes = ("redis", "redis+unix", "rediss")

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/0/contract-{uuid4().hex}")
