from collections.abc import Iterator
from uuid import uuid4

import pytest

from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract, broker
from ipckit.testing.servers import Server, redis_server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with broker(redis_server(private=True)) as running:
        yield running


class TestRedis(ChannelContract):
    schemes = ("redis", "rediss")  # the same over TLS: tests/unit/test_redis.py

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/0/contract-{uuid4().hex}")


class TestRedisUnix(ChannelContract):
    schemes = ("redis+unix",)

    @pytest.fixture
    def url(self, server: Server) -> str:
        return f"redis+unix://{server.socket}?name=contract-{uuid4().hex}"


class TestRedisQueue(QueueContract):
    schemes = ("redis", "redis+unix", "rediss")

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/0/queue-{uuid4().hex}")


class TestRedisQueueLanes(QueueContract):
    schemes = ("redis",)

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/0/queue-{uuid4().hex}", lanes="3")


class TestRedisTopics(PubSubContract):
    schemes = ("redis", "redis+unix", "rediss")

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/0/topics-{uuid4().hex}")


class TestRedisCalls(RpcContract):
    schemes = ("redis", "redis+unix", "rediss")

    @pytest.fixture
    def url(self, server: Server) -> str:
        return server.address(f"/0/calls-{uuid4().hex}")
