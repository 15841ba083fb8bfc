"""`SyncContract`: what every primitive of `ipckit.sync` and `ipckit.aio` promises, against a party in a thread, and in a forked,
a spawned and a fork server's process.

    from ipckit.testing.conformance import SyncContract

    class TestShm(SyncContract):
        @pytest.fixture
        def url(self) -> str:
            return "shm://contract"

Nothing passes or fails by time, but that a timeout is never early, and that what hangs is a failure.
"""

from ._dropin import DropInContracts
from ._locking import LockingContracts
from ._meeting import MeetingContracts

__all__ = ["SyncContract"]


class SyncContract(LockingContracts, MeetingContracts, DropInContracts):
    """A subclass brings `url`, a name that nobody uses."""
