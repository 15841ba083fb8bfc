"""The primitives of ipckit.sync by themselves; what holds for all of them is in the conformance suite."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest

from ipckit import errors
from ipckit.sync import Barrier, BoundedSemaphore, Condition, Event, Lock, RLock, RWLock, Semaphore

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(path))
    return path


class Child:
    """A forked process that has done something, and lives until it is killed."""

    def __init__(self, act):
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(30)
            try:
                act()
                os.write(tell, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(tell)
        assert os.read(ready, 1) == b"x"
        os.close(ready)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def outcome(act):
    try:
        return act()
    except errors.IpcError as error:
        return type(error)


class Threads:
    """Run `act` on several threads; `join` gives what came of each."""

    def __init__(self, *acts):
        self.results = []
        self.threads = [threading.Thread(target=lambda a=act: self.results.append(outcome(a))) for act in acts]
        for thread in self.threads:
            thread.start()

    def join(self):
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()
        return self.results


def until(true):
    """Give others the processor until something is so."""
    for _ in range(20_000):
        if true():
            return
        threading.Event().wait(0.001)
    raise AssertionError("it never came to be so")


# -- Lock, RLock ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Lock, RLock])
class TestMutex:
    def test_one_at_a_time(self, kind):
        lock, count = kind(), 0

        def work():
            nonlocal count
            for _ in range(500):
                with lock:
                    before = count
                    os.sched_yield()
                    count = before + 1

        Threads(*[work] * 4).join()
        assert count == 2000

    def test_says_who_holds_it(self, kind):
        lock = kind()
        assert lock.owner() is None
        with lock:
            owner = lock.owner()
            assert owner.pid == os.getpid()
            assert owner.tid == threading.get_native_id()
            assert abs(owner.since - time.time()) < 10
            assert lock.locked()
        assert not lock.locked()

    def test_only_the_owner_releases(self, kind):
        lock = kind()
        with pytest.raises(errors.NotOwner):
            lock.release()
        lock.acquire()
        assert Threads(lock.release).join() == [errors.NotOwner]
        pid = os.fork()
        if pid == 0:
            os._exit(7 if outcome(lock.release) is errors.NotOwner and not lock.acquire(False) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        lock.release()

    def test_times_out(self, kind):
        lock = kind()
        with lock:
            assert Threads(lambda: lock.acquire(timeout=0.02)).join() == [False]
            assert Threads(lambda: lock.acquire(False)).join() == [False]
            assert Threads(lambda: lock.acquire(True, -1)).join() == [False]
        assert lock.acquire(block=True, timeout=None)
        lock.release()
        with pytest.raises(TypeError):
            lock.acquire(patience=1)
        with pytest.raises(TypeError):
            lock.acquire(True, "soon")
        assert not lock.locked()

    def test_a_dead_owner_is_told_to_all_until_repaired(self, kind):
        lock = kind()
        child = Child(lock.acquire)
        waiting = Threads(*[lock.acquire] * 3)
        assert lock.owner().pid == child.pid
        child.kill()
        assert waiting.join() == [errors.OwnerDied] * 3
        with pytest.raises(errors.OwnerDied) as told, lock:
            raise AssertionError("let in")
        assert told.value.pid == child.pid
        assert lock.abandoned
        assert lock.owner() is None
        with pytest.raises(ZeroDivisionError), lock.recover():  # noqa: PT012
            assert Threads(lock.acquire).join() == [errors.OwnerDied]
            _ = 1 / 0
        assert lock.abandoned
        with lock.recover() as abandoned:
            assert abandoned
        assert not lock.abandoned
        with lock.recover() as abandoned:
            assert not abandoned
        with lock:
            pass

    def test_two_repair_one_after_the_other(self, kind):
        lock = kind()
        Child(lock.acquire).kill()

        def repair():
            with lock.recover(timeout=20) as abandoned:
                return abandoned

        with lock.recover():
            second = Threads(repair)
            assert Threads(lambda: lock.recover(timeout=0.01).__enter__()).join() == [errors.Timeout]
        assert second.join() == [False]

    def test_taken_from_the_dead(self, kind):
        lock = kind(on_owner_died="take")
        Child(lock.acquire).kill()
        with lock:
            assert lock.inherited
        with lock:
            assert not lock.inherited

    def test_a_thread_that_ends_is_dead(self, kind):
        lock = kind()
        assert Threads(lock.acquire).join() == [True]
        assert outcome(lock.acquire) is errors.OwnerDied

    def test_an_option_that_does_not_exist(self, kind):
        with pytest.raises(errors.BadOption):
            kind(on_owner_died="ignore")


def test_a_lock_that_one_holds_oneself():
    lock = Lock()
    with lock:
        assert not lock.acquire(False)
        assert not lock.acquire(timeout=0.01)
        with pytest.raises(errors.Deadlock):
            lock.acquire()
    assert not lock.locked()


def test_an_rlock_counts():
    lock = RLock()
    with lock, lock:
        assert lock.acquire()
        lock.release()
        assert Threads(lambda: lock.acquire(False)).join() == [False]
    assert Threads(lambda: (lock.acquire(False), lock.release())).join() == [(True, None)]


def test_ctrl_c_ends_the_wait():
    lock = Lock()
    child = Child(lock.acquire)
    timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        lock.acquire()
    timer.join()
    child.kill()


def test_locks_let_go_of_in_any_order():
    locks = [Lock() for _ in range(20)]
    for lock in locks:
        lock.acquire()
    for lock in locks[::2] + locks[::-1][::2]:
        lock.release()
    assert not any(lock.locked() for lock in locks)


def test_a_held_lock_that_is_dropped_keeps_its_memory():
    for _ in range(100):
        Lock().acquire()
    rest = Lock("shm://rest")
    Threads(lambda: Lock("shm://rest").acquire() and None).join()
    assert outcome(rest.acquire) is errors.OwnerDied


def test_more_than_the_kernel_looks_after():
    def hold():
        locks = [Lock() for _ in range(260)]
        try:
            for lock in locks:
                lock.acquire()
        finally:
            for lock in locks:
                if lock.owner():
                    lock.release()

    assert Threads(hold).join() == [errors.ResourceLimit]


# -- names ------------------------------------------------------------------------------------------------------------

KINDS = [Lock, RLock, Semaphore, BoundedSemaphore, RWLock, Condition, Event]


@pytest.mark.parametrize("kind", KINDS)
def test_named_objects_are_private_files(kind, runtime_dir):
    thing = kind(url="shm://thing")
    (path,) = runtime_dir.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    other = kind(url="shm://thing")
    assert pickle.loads(pickle.dumps(other)).url == thing.url
    thing.unlink()
    thing.unlink()
    assert not list(runtime_dir.iterdir())


def test_one_name_one_kind():
    _lock = Lock("shm://thing")
    with pytest.raises(errors.ProtocolError, match="it is a Lock"):
        Semaphore(url="shm://thing")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"x" * 4096, bytes(65536), bytes(1 << 20)])
def test_damaged_files_are_refused(content, runtime_dir):
    path = runtime_dir / "thing.sync"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(errors.ProtocolError):
        Lock("shm://thing")


def test_files_that_others_can_reach_are_refused(runtime_dir):
    path = runtime_dir / "thing.sync"
    Lock("shm://thing")
    path.chmod(0o666)
    with pytest.raises(errors.AccessDenied):
        Lock("shm://thing")
    path.rename(runtime_dir / "elsewhere")
    path.symlink_to(runtime_dir / "elsewhere")
    with pytest.raises(errors.AccessDenied):
        Lock("shm://thing")


@pytest.mark.parametrize("url", ["tcp://localhost:1", "shm://", "shm://a/b", "shm://a?size=1", "lock"])
def test_urls_that_lead_nowhere(url):
    with pytest.raises((errors.AddressError, errors.ConfigError)):
        Lock(url)


def test_makers_race_for_one_name():
    start = threading.Barrier(8)

    def make():
        start.wait()
        return Semaphore(0, "shm://raced")

    made = Threads(*[make] * 8).join()
    made[0].release(8)
    assert [thing.acquire(False) for thing in made] == [True] * 8


@pytest.mark.parametrize("kind", KINDS)
def test_anonymous_objects_go_only_to_children(kind):
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(kind())


def test_descriptors_are_given_back():
    before = len(os.listdir("/proc/self/fd"))
    for kind in KINDS:
        kind()
        kind(url=f"shm://{kind.__name__}")
    assert len(os.listdir("/proc/self/fd")) == before


# -- the others -------------------------------------------------------------------------------------------------------


def test_semaphores_count():
    semaphore = Semaphore(2)
    with semaphore, semaphore:
        assert semaphore.get_value() == 0
        assert not semaphore.acquire(False)
        assert not semaphore.acquire(timeout=0.01)
    semaphore.release(3)
    assert semaphore.get_value() == 5
    with pytest.raises(ValueError, match="n must be"):
        semaphore.release(0)
    with pytest.raises(ValueError, match="initial"):
        Semaphore(-1)
    bounded = BoundedSemaphore(1)
    with pytest.raises(ValueError, match="too many"):
        bounded.release()


def test_a_semaphore_serves_in_order():
    semaphore, served = Semaphore(0), []
    waiting = []
    for i in range(5):
        waiting.append(Threads(lambda i=i: (semaphore.acquire(), served.append(i))))
        until(lambda i=i: semaphore._count(1, True) == i + 1)
    for i in range(5):
        semaphore.release()
        waiting[i].join()
    assert served == [0, 1, 2, 3, 4]


def test_leased_units_come_back_from_the_dead():
    semaphore = Semaphore(2, leased=True)
    children = [Child(semaphore.acquire), Child(semaphore.acquire)]
    waiting = Threads(semaphore.acquire, semaphore.acquire)
    until(lambda: semaphore._count(1, True) == 2)
    for child in children:
        child.kill()
    assert waiting.join() == [True, True]
    assert semaphore.acquire(timeout=20)  # those threads have ended as well
    with pytest.raises(errors.NotOwner):
        semaphore.release(2)


def test_readers_share_and_writers_do_not():
    lock = RWLock()
    with lock.read:
        assert Threads(lambda: lock.read.acquire(False), lambda: lock.write.acquire(False)).join().count(True) == 1
        with pytest.raises(errors.Deadlock):
            lock.write.acquire()
    with lock.write:
        assert Threads(lambda: lock.read.acquire(timeout=0.01)).join() == [False]
        with pytest.raises(errors.Deadlock):
            lock.read.acquire()
    with pytest.raises(errors.NotOwner):
        lock.write.release()
    assert lock.owners() == []


def test_a_waiting_writer_stops_new_readers_but_not_those_who_read():
    lock = RWLock()
    with lock.read:
        writer = Threads(lambda: lock.write.acquire(timeout=20) and lock.write.release())
        until(lambda: lock._count(3, True) == 1)
        assert Threads(lambda: lock.read.acquire(False)).join() == [False]
        with lock.read:
            pass
    assert writer.join() == [None]


def test_dead_readers_are_out_and_dead_writers_abandon():
    lock = RWLock()
    child = Child(lock.read.acquire)
    writer = Threads(lambda: lock.write.acquire() and lock.write.release())
    child.kill()
    assert writer.join() == [None]
    child = Child(lock.write.acquire)
    waiting = Threads(lock.read.acquire, lock.write.acquire)
    child.kill()
    assert waiting.join() == [errors.OwnerDied] * 2
    assert lock.abandoned
    with pytest.raises(ZeroDivisionError), lock.recover():
        _ = 1 / 0
    assert outcome(lock.read.acquire) is errors.OwnerDied
    with lock.recover() as abandoned:
        assert abandoned
    with lock.recover() as abandoned:
        assert not abandoned
    with lock.read:
        pass


@pytest.mark.parametrize("lock", [None, Lock, RLock])
def test_conditions(lock):
    condition, items = Condition(lock and lock()), []

    def take():
        with condition:
            assert condition.wait_for(lambda: items, timeout=20)
            return items.pop()

    takers = Threads(take, take)
    until(lambda: condition.n_waiting == 2)
    with condition:
        items.extend([1, 2])
        condition.notify_all()
    assert sorted(takers.join()) == [1, 2]
    with condition:
        assert not condition.wait(timeout=0.01)
        assert not condition.wait_for(list, timeout=0.01)
    for act in (condition.notify, condition.notify_all, condition.wait):
        with pytest.raises(errors.NotOwner):
            act()


def test_a_condition_lets_go_of_all_levels():
    condition = Condition()
    with condition, condition:
        waker = Threads(lambda: condition.acquire() and (condition.notify(), condition.release()))
        assert condition.wait(20)
        assert waker.join() == [(None, None)]
        condition.release()
        condition.acquire()
    assert condition.owner() is None


def test_a_notification_of_the_dead_goes_to_the_next():
    condition = Condition()

    def wait():
        with condition:
            return condition.wait(20)

    children = [0, 0]
    for i in range(2):
        children[i] = os.fork()
        if children[i] == 0:
            signal.alarm(30)
            wait()
            os._exit(1)
        until(lambda i=i: condition.n_waiting == i + 1)
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    waiting = Threads(wait)
    until(lambda: condition.n_waiting == 2)
    with condition:
        condition.notify()  # the second child has it now, and cannot take the lock
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    assert waiting.join() == [True]


def test_a_waiter_whose_lock_is_abandoned_comes_back_without_it():
    condition = Condition()

    def wait():
        with condition:
            condition.wait(20)

    waiting = Threads(wait)
    until(lambda: condition.n_waiting == 1)
    child = Child(lambda: (condition.acquire(), condition.notify()))
    child.kill()
    assert waiting.join() == [errors.OwnerDied]
    with condition.recover():
        pass
    assert not condition.abandoned


def test_a_handler_that_raises_ends_a_wait_with_the_lock_held():
    condition = Condition()
    with condition:
        interrupt = Threads(
            lambda: until(lambda: condition.n_waiting == 1) or os.kill(os.getpid(), signal.SIGINT)
        )  # the wait lets go of the lock, and only this thread runs handlers
        with pytest.raises(KeyboardInterrupt):
            condition.wait()
        assert condition.owner().tid == threading.get_native_id()
        assert condition.n_waiting == 0
        interrupt.join()


def test_barriers():
    ran = []
    barrier = Barrier(3, lambda: ran.append(barrier.n_waiting), 20)
    for _ in range(3):
        assert sorted(Threads(*[barrier.wait] * 3).join()) == [0, 1, 2]
    assert ran == [2, 2, 2]
    assert barrier.parties == 3
    waiting = Threads(barrier.wait)
    until(lambda: barrier.n_waiting == 1)
    barrier.abort()
    assert waiting.join() == [errors.BrokenBarrier]
    with pytest.raises(threading.BrokenBarrierError):
        barrier.wait()
    barrier.reset()
    with pytest.raises(errors.BrokenBarrier):
        barrier.wait(0.01)
    assert barrier.broken
    barrier.reset()
    waiting = Threads(barrier.wait)
    until(lambda: barrier.n_waiting == 1)
    barrier.reset()
    assert waiting.join() == [errors.BrokenBarrier]
    assert not barrier.broken


def test_a_party_that_comes_and_does_not_wait_breaks_the_barrier():
    for patience in (0, -1):
        barrier = Barrier(2)
        waiting = Threads(barrier.wait)
        until(lambda barrier=barrier: barrier.n_waiting == 1)
        assert outcome(lambda barrier=barrier: Barrier.wait(barrier, 0)) == 1  # the last need not wait
        waiting.join()
        assert outcome(lambda barrier=barrier, patience=patience: barrier.wait(patience)) is errors.BrokenBarrier
        assert barrier.broken


def test_an_action_that_fails_breaks_the_barrier():
    barrier = Barrier(2, lambda: 1 / 0)
    waiting = Threads(barrier.wait)
    until(lambda: barrier.n_waiting == 1)
    with pytest.raises(ZeroDivisionError):
        barrier.wait()
    assert waiting.join() == [errors.BrokenBarrier]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_party_breaks_the_barrier(victim):
    barrier = Barrier(4)
    pids = []
    for i in range(2):
        pids.append(os.fork())
        if pids[i] == 0:
            signal.alarm(30)
            os._exit(5 if outcome(barrier.wait) is errors.BrokenBarrier else 1)
        until(lambda i=i: barrier.n_waiting == i + 1)
    waiting = Threads(barrier.wait)
    until(lambda: barrier.n_waiting == 3)
    os.kill(pids[victim], signal.SIGKILL)
    assert waiting.join() == [errors.BrokenBarrier]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes[1 - victim] == 5


def test_events():
    event = Event()
    assert not event.wait(0.01)
    waiting = Threads(*[lambda: event.wait(20)] * 3)
    event.set()
    assert waiting.join() == [True] * 3
    assert event.is_set()
    event.clear()
    assert not event.is_set()


# -- to children ------------------------------------------------------------------------------------------------------


def use_all(lock, semaphore, rwlock, condition, event, barrier):
    with lock, semaphore, rwlock.write, condition:
        condition.notify_all()
    barrier.wait(20)
    event.set()
    os._exit(7 if lock.owner() is None else 1)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_get_them(method):
    context = multiprocessing.get_context(method)
    things = Lock(), Semaphore(1, leased=True), RWLock(), Condition(), Event(), Barrier(2)
    process = context.Process(target=use_all, args=things)
    with things[3]:
        process.start()
        assert things[3].wait(30)
    things[5].wait(20)
    assert things[4].wait(20)
    process.join()
    assert process.exitcode == 7
