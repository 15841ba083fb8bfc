"""For every test below.

Nothing is decided by a clock: Hypothesis has no deadline. `-n auto` starts two workers for each core, because tests of
waiting mostly wait.
"""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ipckit", deadline=None)
settings.load_profile("ipckit")


def pytest_xdist_auto_num_workers() -> int:
    return 2 * len(os.sched_getaffinity(0))
