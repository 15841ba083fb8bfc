"""pytest-benchmark on the bench's own workers: `pytest benchmarks/ --benchmark-only`.

The time is taken in the workers, which are fresh, pinned processes, as in `ipckit bench`; what pytest-benchmark is given is
a clock that advances by what they measured. So its statistics, `--benchmark-save` and `--benchmark-compare` all work, and
this process is not part of the figure. Nothing passes or fails by time.
"""

from __future__ import annotations

import os
import secrets

import pytest

from ipckit import errors
from ipckit.bench import certificate
from ipckit.bench.crew import Crew, Plan
from ipckit.bench.machine import choose_cpus
from ipckit.bench.measure import Job
from ipckit.testing.servers import nats_server, redis_server

_elapsed = 0.0


def _clock() -> float:
    return _elapsed


def pytest_collection_modifyitems(items):
    for item in items:
        if "measured" in item.fixturenames:
            item.add_marker(pytest.mark.benchmark(timer=_clock), append=False)


@pytest.fixture(scope="session")
def servers():
    """The URL of a server, started when it is first asked for."""
    running = {}

    def start(which):
        if which not in running:
            context = {"redis": redis_server, "nats": nats_server}[which]()
            try:
                running[which] = (context, context.__enter__().url)
            except errors.MissingDependency as missing:
                if os.environ.get("CI"):
                    raise
                pytest.skip(str(missing))
        return running[which][1]

    yield start
    for context, _ in running.values():
        context.__exit__(None, None, None)


@pytest.fixture
def measured(benchmark, tmp_path, servers):
    """`measured(plan, job, group, server)`: seconds for one round trip (turn, hop, publish), or for one message of a flow."""
    certificate.write(tmp_path)

    def run(plan: Plan, job: Job, group: str, server: str | None = None, rounds: int = 20) -> None:
        places = {"dir": str(tmp_path), "name": f"bench{secrets.token_hex(4)}"}
        if server is not None:
            places[server] = servers(server)
        benchmark.group = group
        with Crew(plan.at(**places), choose_cpus(), {"IPCKIT_RUNTIME_DIR": str(tmp_path / "run")}) as crew:
            crew.launch()
            crew.open()

            def once() -> None:
                global _elapsed
                taken = crew.do(job, 30)
                if "samples" in taken:
                    _elapsed += sum(taken["samples"]) / len(taken["samples"]) / 1e9
                else:
                    everybody_has = max(taken["received"] / plan.audience, 1)
                    _elapsed += (taken["ended"] - taken["started"]) / everybody_has / 1e9

            benchmark.pedantic(once, rounds=rounds, warmup_rounds=3)

    return run
