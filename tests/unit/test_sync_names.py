"""Several Python objects over one thing, things that are held without an object, and other PID namespaces."""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import struct

import pytest

from ipckit import aio, errors, sync
from ipckit.cli import main
from ipckit.sync import Condition, Lock, RLock, RWLock, Semaphore, _deadlock

from .test_sync import Child, Threads, outcome, runtime_dir, until  # noqa: F401 - a fixture
from .test_sync_tasks import until as come_to

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread


# -- two objects, one lock ----------------------------------------------------------------------------------------------


def test_taken_by_one_object_and_released_by_another():
    """The kernel's list of what a thread holds leads through the words, by address: a second address would break it there."""
    first = Lock("shm://first")

    def hold():
        one, other = Lock("shm://both"), Lock("shm://both")
        first.acquire()
        one.acquire()
        other.release()
        other.acquire()

    Child(hold).kill()
    assert outcome(Lock("shm://both").acquire) is errors.OwnerDied
    assert outcome(lambda: first.acquire(timeout=20)) is errors.OwnerDied


def test_slots_too():
    first = RWLock("shm://first")

    def hold():
        one, other = RWLock("shm://both"), RWLock("shm://both")
        first.write.acquire()
        one.read.acquire()
        other.read.release()
        other.write.acquire()

    Child(hold).kill()
    assert outcome(RWLock("shm://both").read.acquire) is errors.OwnerDied
    assert outcome(lambda: first.read.acquire(timeout=20)) is errors.OwnerDied


def test_one_who_holds_it_by_another_object_is_told():
    lock = Lock("shm://mine")
    with lock, pytest.raises(errors.Deadlock):
        Lock("shm://mine").acquire()
    outer = RLock("shm://again")
    with outer, RLock("shm://again"):
        pass
    assert not outer.locked()


# -- held, without an object ----------------------------------------------------------------------------------------------


def test_what_is_held_stays_though_no_object_is_left(capsys):
    Lock("shm://forgotten").acquire()
    Semaphore(1, "shm://unit", leased=True).acquire()
    assert main(["gc", "--abandoned"]) == 0
    assert outcome(lambda: Threads(lambda: Lock("shm://forgotten").acquire(False)).join()) == [False]
    Lock("shm://forgotten").release()
    Semaphore(1, "shm://unit", leased=True).release()
    capsys.readouterr()
    assert main(["gc"]) == 0
    told = capsys.readouterr().out
    assert "forgotten" in told
    assert "unit" in told


def test_no_descriptor_is_lost_by_that():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Lock("shm://forgotten").acquire()
        Lock("shm://forgotten").release()
        Lock().acquire()
    assert len(os.listdir("/proc/self/fd")) == before


# -- other namespaces -----------------------------------------------------------------------------------------------------

_NAMESPACE_AT = 40  # sync_layout.h


def _move(path, inode):
    with open(path, "r+b") as file:
        file.seek(_NAMESPACE_AT)
        file.write(struct.pack("=Q", inode))


def test_another_pid_namespace_is_refused_while_it_is_there(runtime_dir):  # noqa: F811
    path = runtime_dir / "there.sync"
    ours = os.stat("/proc/self/ns/pid").st_ino
    lock = Lock("shm://there")
    assert struct.unpack_from("=Q", path.read_bytes(), _NAMESPACE_AT) == (ours,)
    _move(path, ours + 1)  # as if a container had made it and had it open
    with pytest.raises(errors.Unsupported, match="PID namespace"):
        Lock("shm://there")
    del lock
    with Lock("shm://there"):  # nobody of that one is left
        assert struct.unpack_from("=Q", path.read_bytes(), _NAMESPACE_AT) == (ours,)
    _move(path, 0)  # one who did not know
    with Lock("shm://there"):
        pass


def test_a_condition_travels_with_its_lock():
    """What arrives beside it is the lock that it lets go of."""

    async def main():
        lock = aio.Lock("shm://lock")
        arrived, condition = pickle.loads(pickle.dumps((lock, aio.Condition(lock, "shm://condition"))))
        async with arrived:
            condition.notify()
            assert not await condition.wait(0)

    asyncio.run(main())
    lock = Lock("shm://lock")
    arrived, condition = pickle.loads(pickle.dumps((lock, Condition(lock, "shm://condition"))))
    with arrived:
        condition.notify()
        assert not condition.wait(0)


# -- who died -------------------------------------------------------------------------------------------------------------


def test_who_waits_hears_which_process_had_the_lock():
    """Also where the lock is not the Condition's own."""

    async def main():
        lock = aio.Lock()
        condition = aio.Condition(lock)
        async with condition:
            waiting = asyncio.ensure_future(condition.wait(20))
            await come_to(lambda: condition.n_waiting)
            child = await asyncio.to_thread(Child, lock._core.acquire)
            child.kill()
            with pytest.raises(errors.OwnerDied) as died:
                await waiting
            assert died.value.pid == child.pid
            raise died.value

    with pytest.raises(errors.OwnerDied):
        asyncio.run(main())
    lock = Lock()
    condition = Condition(lock)
    pids = []

    def wait():
        try:
            with condition:
                condition.wait(20)
        except errors.OwnerDied as died:
            pids.append(died.pid)

    waiting = Threads(wait)
    until(lambda: condition.n_waiting == 1)
    child = Child(lock.acquire)
    child.kill()
    waiting.join()
    assert pids == [child.pid]


def test_the_note_of_a_dead_waiter_whose_number_is_anothers(tmp_path, monkeypatch):
    note = tmp_path / "77"
    note.write_text('[1, 77, 5, 1, "Lock", [3]]')

    def theirs(pid, number):
        raise PermissionError

    monkeypatch.setattr(_deadlock.os, "kill", theirs)
    assert _deadlock._read(note) is None
    assert not note.exists()


# -- what a user gets wrong, and sees -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Condition, aio.Condition])
@pytest.mark.parametrize("lock", [Semaphore(), "shm://x", object()])
def test_a_condition_over_something_else(make, lock, runtime_dir):  # noqa: F811
    with pytest.raises(TypeError, match="Lock or RLock of ipckit"):
        make(lock, "shm://condition")
    assert list(runtime_dir.iterdir()) == []


@pytest.mark.parametrize("url", ["shm://x", "redis://127.0.0.1/x"])
@pytest.mark.parametrize("make", [Lock, aio.Lock])
def test_what_to_do_about_the_dead_is_checked(make, url):
    with pytest.raises(errors.BadOption, match="'raise' or 'take'"):
        make(url, on_owner_died="shrug")


def test_recovery_inside_of_a_held_rlock_repairs_nothing():
    lock = RLock(on_owner_died="take")
    Threads(lock.acquire).join()
    with lock:
        assert lock.inherited
        recovery = lock.recover()
        assert not recovery.__enter__()
        recovery.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert lock.owner() is not None
    assert not lock.abandoned


@pytest.mark.parametrize("name", sync.__all__)
def test_tasks_have_the_same_methods(name):
    ours, theirs = getattr(sync, name), getattr(aio, name)
    missing = {each for each in dir(ours) if not each.startswith("_")} - set(dir(theirs))
    assert missing <= {"url"}
    for each in ("acquire", "release", "wait", "wait_for", "notify", "set", "resize"):
        if callable(getattr(ours, each, None)):
            signatures = (list(inspect.signature(getattr(cls, each)).parameters) for cls in (ours, theirs))
            assert next(signatures) == next(signatures), each
