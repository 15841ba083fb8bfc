"""For every test below: `-n auto` starts three workers for each core, because tests of waiting mostly wait."""

from __future__ import annotations

import os


def pytest_xdist_auto_num_workers() -> int:
    return 3 * len(os.sched_getaffinity(0))
