"""ipckit.aio's primitives: tasks against tasks, threads and processes."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest

from ipckit import aio, errors, sync

from .test_sync import Child, Threads

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def until(true):
    while not true():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_one_task_at_a_time():
    async def main():
        lock, count = aio.Lock(), 0

        async def work():
            nonlocal count
            for _ in range(50):
                async with lock:
                    before = count
                    await asyncio.sleep(0)
                    count = before + 1

        await asyncio.gather(*[work() for _ in range(5)])
        assert count == 250
        assert not lock.locked()

    run(main())


@pytest.mark.parametrize("kind", ["Lock", "RLock"])
def test_waiting_does_not_block_the_loop(kind):
    async def main():
        lock = getattr(aio, kind)()
        got, let_go = threading.Event(), threading.Event()

        def hold():
            with lock._core:
                got.set()
                let_go.wait(20)

        holder = threading.Thread(target=hold)
        holder.start()
        got.wait(20)
        assert not await lock.acquire(False)
        assert not await lock.acquire(timeout=0.02)

        async def take():
            async with lock:
                return lock.owner().pid == os.getpid()

        waiter = asyncio.create_task(take())
        cancelled = asyncio.create_task(lock.acquire())
        await asyncio.sleep(0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert not waiter.done()
        let_go.set()
        assert await waiter
        with pytest.raises(errors.NotOwner):
            lock.release()
        holder.join()

    run(main())


def test_an_owner_that_dies():
    async def main():
        lock = aio.Lock()
        child = Child(lock._core.acquire)
        waiting = [asyncio.create_task(lock.acquire()) for _ in range(3)]
        await asyncio.sleep(0.02)
        child.kill()
        assert [type(e) for e in await asyncio.gather(*waiting, return_exceptions=True)] == [errors.OwnerDied] * 3
        with pytest.raises(ZeroDivisionError):  # noqa: PT012
            async with lock.recover() as abandoned:
                assert abandoned
                _ = 1 / 0
        assert lock.abandoned
        async with lock.recover():
            pass
        async with lock:
            assert lock.owner().pid == os.getpid()
        take = aio.Lock(on_owner_died="take")
        Child(take._core.acquire).kill()
        async with take:
            assert take.inherited

    run(main())


def test_a_task_may_hold_an_rlock_twice():
    async def main():
        lock = aio.RLock()
        async with lock, lock:
            other = asyncio.create_task(lock.acquire(timeout=0.02))
            assert not await other
        assert not lock.locked()

    run(main())


def test_semaphores_and_sides():
    async def main():
        semaphore = aio.Semaphore(1, leased=True)
        async with semaphore:
            assert not await semaphore.acquire(timeout=0.01)
            waiting = asyncio.create_task(semaphore.acquire())
            await until(lambda: semaphore._core._count(1, True) == 1)
        assert await waiting
        semaphore.release()
        plain = aio.Semaphore(0)
        waiting = asyncio.create_task(plain.acquire())
        await until(lambda: plain._core._count(1, True) == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        plain.release()
        assert plain.get_value() == 1
        lock = aio.RWLock()
        async with lock.read, lock.read:
            assert not await lock.write.acquire(timeout=0.01)
            writer = asyncio.create_task(lock.write.acquire())
            await until(lambda: lock._core._count(3, True) == 1)
        assert await writer
        assert not await lock.read.acquire(False)
        lock.write.release()
        Child(lock._core.write.acquire).kill()
        with pytest.raises(errors.OwnerDied):
            await lock.read.acquire()
        async with lock.recover() as abandoned:
            assert abandoned

    run(main())


@pytest.mark.parametrize("own", [True, False])
def test_conditions(own):
    async def main():
        condition, items = aio.Condition(None if own else aio.Lock()), []

        async def take():
            async with condition:
                await condition.wait_for(lambda: items, timeout=20)
                return items.pop()

        tasks = [asyncio.create_task(take()) for _ in range(3)]
        await until(lambda: condition.n_waiting == 3)
        tasks[0].cancel()
        await until(lambda: condition.n_waiting == 2)

        def give():  # from a thread, as another process would
            with condition._core:
                items.extend([1, 2])
                condition._core.notify(2)

        thread = Threads(give)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert sorted(results[1:]) == [1, 2]
        thread.join()
        async with condition:
            assert not await condition.wait(0.01)
        with pytest.raises(errors.NotOwner):
            condition.notify()

    run(main())


def test_events_and_barriers():
    async def main():
        event = aio.Event()
        waiting = [asyncio.create_task(event.wait()) for _ in range(3)]
        assert not await event.wait(0.01)
        event.set()
        event.clear()
        assert await asyncio.gather(*waiting) == [True] * 3
        ran = []
        barrier = aio.Barrier(3, lambda: ran.append(1))
        for _ in range(3):
            assert sorted(await asyncio.gather(*[barrier.wait() for _ in range(3)])) == [0, 1, 2]
        assert len(ran) == 3
        party = asyncio.create_task(barrier.wait())
        other = asyncio.create_task(barrier.wait())
        await until(lambda: barrier.n_waiting == 2)
        party.cancel()
        with pytest.raises(errors.BrokenBarrier):
            await other
        await asyncio.gather(party, return_exceptions=True)
        assert barrier.broken
        barrier.reset()
        with pytest.raises(errors.BrokenBarrier):
            await barrier.wait(0.01)

    run(main())


def test_in_a_forked_child():
    lock = aio.Lock()

    async def hold():
        async with lock:
            await asyncio.sleep(0)

    run(hold())
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        run(hold())
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_the_same_names():
    for name in sync.__all__:
        assert getattr(aio, name).__name__ == name
