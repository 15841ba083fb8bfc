import pytest

from ipckit.testing.conformance import SyncContract


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside other threads
class TestShm(SyncContract):
    @pytest.fixture
    def url(self) -> str:
        return "shm://contract"
