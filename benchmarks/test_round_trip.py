"""A 64-byte round trip on every transport, beside the raw client and the C floors of the same mechanism."""

from __future__ import annotations

import pytest

from ipckit import errors
from ipckit._registry import open_transport
from ipckit._url import parse
from ipckit.bench.crew import Plan
from ipckit.bench.measure import Job
from ipckit.bench.patterns.channel import CHANNEL


def contenders():
    """(group, server, plan) of each, named as the table names them."""
    for case in CHANNEL:
        for shell in ("sync", "aio") if case.awaited else ("sync",):
            group = case.scheme + (" aio" if shell == "aio" else "")
            for variant in case.variants:
                yield pytest.param(
                    group, case, case.ours(variant, shell), id=f"{group}-ipckit {variant.options}".strip()
                )
            for floor in dict.fromkeys(floor for variant in case.variants for floor in variant.floors):
                yield pytest.param(group, case, Plan(f"floor:{floor}"), id=f"{group}-C {floor}")
            rival = case.rival(shell)
            if rival:
                yield pytest.param(group, case, rival, id=f"{group}-raw {case.raw.name_in(shell)}")


@pytest.mark.parametrize(("group", "case", "plan"), [*contenders()])
def test_round_trip_of_64_bytes(measured, group, case, plan):
    try:
        open_transport(parse(case.scheme + "://x"))
    except errors.MissingDependency as missing:
        pytest.skip(str(missing))
    measured(plan, Job("trips", 64, 300), f"{group}: round trip of 64 B", case.server)
