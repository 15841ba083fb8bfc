"""The contracts that every transport keeps, as tests. A transport's own test is a class and a URL:

    from ipckit.testing.conformance import ChannelContract

    class TestMyTransport(ChannelContract):
        @pytest.fixture
        def url(self) -> str:
            return "my://somewhere"

Every contract runs from a thread and from an event loop, against a peer in this process and in a spawned one. What is
skipped is what the transport's `Capabilities` do not declare, and nothing else.
"""

import pytest

for _name in (
    "_base",
    "_messages",
    "_waiting",
    "_ending",
    "_naming",
    "_programs",
    "_queueing",
    "queue",
    "pubsub",
    "rpc",
    "_services",
    "_seats",
    "_locking",
    "_meeting",
    "_dropin",
):
    pytest.register_assert_rewrite(f"{__name__}.{_name}")

from .channel import ChannelContract, broker, free_port  # noqa: E402 - the rewriting has to be announced first
from .pubsub import PubSubContract  # noqa: E402
from .queue import QueueContract  # noqa: E402
from .rpc import RpcContract  # noqa: E402
from .sync import SyncContract  # noqa: E402

__all__ = ["ChannelContract", "PubSubContract", "QueueContract", "RpcContract", "SyncContract", "broker", "free_port"]
