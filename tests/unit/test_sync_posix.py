"""Semaphores of the operating system: posix+sem://. What a C program sees of them is tested in tests/interop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import threading
import time

import pytest

from ipckit import aio, errors
from ipckit.sync import BoundedSemaphore, Lock, Semaphore

posix_ipc = pytest.importorskip("posix_ipc")


def until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def url():
    name = f"ipckit-test-{os.getpid()}-{os.urandom(4).hex()}"
    yield f"posix+sem://{name}"
    with contextlib.suppress(posix_ipc.ExistentialError):
        posix_ipc.unlink_semaphore("/" + name)


def test_units_are_counted_by_name(url):
    first, second = Semaphore(2, url), Semaphore(9, url)  # the maker's count holds
    assert first.get_value() == second.get_value() == 2
    with first:
        until(lambda: second.acquire(False))
        assert not first.acquire(False)
        assert not first.acquire(timeout=0.01)
        assert not first.acquire(True, 0)
        second.release()
    third = pickle.loads(pickle.dumps(first))
    third.release(3)
    until(lambda: first.get_value() == 5)  # the thread that waited for the timeout may have one in its hands
    first.unlink()
    first.unlink()
    fresh = Semaphore(0, url)
    assert fresh.get_value() == 0
    until(lambda: first.get_value() == 5)
    assert os.stat("/dev/shm/sem." + fresh.url.name).st_mode & 0o777 == 0o600
    assert "0 free" in repr(fresh)


def test_what_it_cannot_be_is_refused(url):
    for make in (lambda: BoundedSemaphore(1, url), lambda: Semaphore(1, url, leased=True)):
        with pytest.raises(errors.Unsupported):
            make()
    with pytest.raises(errors.BadOption):
        Semaphore(1, url + "?x=1")
    with pytest.raises(errors.BadUrl):
        Semaphore(1, "posix+sem://a/b")
    with pytest.raises(errors.UnknownScheme):
        Semaphore(1, "tcp://127.0.0.1:1")
    with pytest.raises(errors.UnknownScheme):
        Lock(url)
    with pytest.raises(ValueError):
        Semaphore(-1, url)
    with pytest.raises(ValueError):
        Semaphore(1, url).acquire(timeout=float("nan"))
    assert Semaphore(1, url).acquire(timeout=-1)
    assert not Semaphore(1, url).acquire(timeout=-1)
    with pytest.raises(ValueError):
        Semaphore(1, url).release(0)


def test_another_users_is_refused(url, monkeypatch):
    Semaphore(1, url)
    uid = os.geteuid()
    os.chown("/dev/shm/sem." + url.rpartition("/")[2], 12345, -1) if uid == 0 else monkeypatch.setattr(
        os, "geteuid", lambda: uid + 1
    )
    with pytest.raises(errors.AccessDenied):
        Semaphore(1, url)


def test_a_signal_ends_the_wait_or_only_interrupts_it(url):
    semaphore = Semaphore(0, url)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        for timeout in (None, 20):
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Stop):
                semaphore.acquire(timeout=timeout)
            timer.join()
        signal.signal(signal.SIGUSR1, lambda *_: semaphore.release())
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        assert semaphore.acquire()
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    until(lambda: semaphore.get_value() == 0)


def test_tasks_wait_in_turn_and_a_cancelled_one_loses_no_unit(url):
    async def main():
        semaphore = aio.Semaphore(0, url)
        other = Semaphore(0, url)
        assert not await semaphore.acquire(False)
        assert not await semaphore.acquire(timeout=0.01)
        order = []

        async def wait(number):
            async with semaphore:
                order.append(number)

        tasks = [asyncio.create_task(wait(number)) for number in range(4)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        other.release()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[1], asyncio.CancelledError)
        assert order == [0, 2, 3]
        # A cancellation and a unit at the same moment, again and again: at the end every unit is there.
        for _ in range(100):
            assert await semaphore.acquire()
            task = asyncio.create_task(semaphore.acquire())
            await asyncio.sleep(0)
            other.release()
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            else:
                semaphore.release()

    asyncio.run(asyncio.wait_for(main(), 40))
    until(lambda: Semaphore(0, url).get_value() == 1)
