"""The slow subscriber's benchmark, with fewer messages, for what is no matter of time: exact accounts, bounded memory."""

from __future__ import annotations

import pytest
from benchmarks import slow_subscriber

MESSAGES = 20_000


@pytest.mark.parametrize("scheme", ["unix", "shm"])
def test_a_slow_subscriber_costs_no_memory_and_every_message_is_accounted_for(scheme, monkeypatch, tmp_path):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))
    run = slow_subscriber.measure(f"{scheme}://slow", MESSAGES, other=0.002)
    assert run.balances()
    assert run.fast.received == MESSAGES
    assert run.other.received + run.other.dropped == MESSAGES
    assert run.growth <= 0.10


def test_accounts_that_do_not_balance_are_seen():
    whole = slow_subscriber.Account(received=10, dropped=0, wrong=0, seconds=1)
    behind = slow_subscriber.Account(received=4, dropped=6, wrong=0, seconds=1)
    run = slow_subscriber.Run(published=10, dropped=6, rss=(100, 105), fast=whole, other=behind)
    assert run.balances()
    assert run.growth == pytest.approx(0.05)
    for published, dropped, wrong in ((11, 6, 0), (10, 5, 0), (10, 6, 1)):
        slow = slow_subscriber.Account(received=4, dropped=6, wrong=wrong, seconds=1)
        assert not slow_subscriber.Run(published, dropped, (100, 105), whole, slow).balances()
