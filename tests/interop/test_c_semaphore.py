"""A C program and we share a semaphore: semaphore.c, sem_open and nothing of ours."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from ipckit import aio
from ipckit.sync import Semaphore

pytest.importorskip("posix_ipc")
SOURCE = Path(__file__).with_name("semaphore.c")


@pytest.fixture(scope="session")
def program(compiler, tmp_path_factory) -> str:
    built = str(tmp_path_factory.mktemp("c") / "semaphore")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", built], check=True, timeout=60)
    return built


def test_each_waits_for_the_other(program, run):
    name = f"ipckit-c-{os.getpid()}"
    partner = run(program, f"/{name}")
    partner.say("wait\n")
    assert partner.line() == "have it"  # it has made it, with one unit
    ours = Semaphore(7, f"posix+sem://{name}")
    try:
        assert not ours.acquire(timeout=0.01)
        partner.say("post\n")
        assert ours.acquire(timeout=20)
        partner.say("wait\n")
        ours.release()
        assert partner.line() == "gave it"
        assert partner.line() == "have it"

        async def main():
            waiting = asyncio.create_task(aio.Semaphore(0, f"posix+sem://{name}").acquire())
            await asyncio.sleep(0.01)
            partner.say("post\n")
            assert await asyncio.wait_for(waiting, 20)

        asyncio.run(main())
        partner.finish()
    finally:
        ours.unlink()
