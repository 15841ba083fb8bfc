"""`SyncContract`: what every primitive of `ipckit.sync` and `ipckit.aio` promises, against a party in a thread, and in a forked,
a spawned and a fork server's process.

    from ipckit.testing.conformance import SyncContract

    class TestShm(SyncContract):
        @pytest.fixture
        def url(self) -> str:
            return "shm://contract"

Nothing passes or fails by time, but that a timeout is never early, and that what hangs is a failure.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ipckit.aio
import ipckit.sync
from ipckit import errors

from ._parties import HANG, ShellName
from ._seats import WHERE, Seat, Seats, Where, until

_seats = Seats()
atexit.register(_seats.close)

MUTEXES = ["Lock", "RLock"]
SHORT = 0.03  # seconds of patience that a contract wastes


class SyncContract:
    """A subclass brings `url`, a name that nobody uses."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError("a conformance class has a fixture `url`")

    @pytest.fixture(autouse=True)
    def runtime_dir(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        path = tempfile.mkdtemp(prefix="ipckit-")
        monkeypatch.setenv("IPCKIT_RUNTIME_DIR", path)
        yield path
        shutil.rmtree(path, ignore_errors=True)

    @pytest.fixture(params=["sync", "async"])
    def shell(self, request: pytest.FixtureRequest) -> ShellName:
        name: ShellName = request.param
        return name

    @pytest.fixture
    def seat(self, shell: ShellName, runtime_dir: str) -> Iterator[Callable[[Where], Seat]]:
        """Seats as they are asked for, with the same shell and runtime directory as this test."""
        taken: list[Seat] = []

        def sit(where: Where) -> Seat:
            taken.append(_seats.take(shell, where))
            taken[-1].do("clear")
            taken[-1].do("environ", IPCKIT_RUNTIME_DIR=runtime_dir)
            return taken[-1]

        yield sit
        for one in taken:
            _seats.give_back(one)

    @pytest.fixture
    def here(self, seat: Callable[[Where], Seat]) -> Seat:
        return seat("thread")

    @pytest.fixture(params=WHERE)
    def there(self, seat: Callable[[Where], Seat], request: pytest.FixtureRequest) -> Seat:
        return seat(request.param)

    @pytest.fixture(params=WHERE[1:])
    def far(self, seat: Callable[[Where], Seat], request: pytest.FixtureRequest) -> Seat:
        """In another process, which can be killed while it waits."""
        return seat(request.param)

    @pytest.fixture
    def counter(self, runtime_dir: str) -> str:
        path = os.path.join(runtime_dir, "counter")
        with open(path, "wb") as file:
            file.write(b"0")
        return path

    @staticmethod
    def share(kind: str, *args: Any, seats: tuple[Seat, ...], **named: Any) -> None:
        """All open the object `x`."""
        for one in seats:
            one.do("make", "x", kind, *args, **named)

    # -- all of them -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", [*MUTEXES, "Semaphore", "RWLock"])
    def test_one_at_a_time(self, kind: str, here: Seat, there: Seat, url: str, counter: str) -> None:
        self.share(kind, url=url, seats=(here, there))
        path = "x.write" if kind == "RWLock" else "x"
        hammering = [one.start("hammer", path, counter, 40) for one in (here, there)]
        for each in hammering:
            each.result(HANG)
        with open(counter, encoding="ascii") as file:
            assert file.read() == "80"

    @pytest.mark.parametrize("kind", [*MUTEXES, "Semaphore", "RWLock"])
    def test_nobody_is_passed_over_for_ever(self, kind: str, here: Seat, there: Seat, url: str, counter: str) -> None:
        """Whoever waits is overtaken a few times: a mutex hands over to one that lost it once, the others go by arrival."""
        self.share(kind, url=url, seats=(here, there))
        path = "x.write" if kind == "RWLock" else "x"
        hammering = [one.start("hammer", path, counter, 40, 0.0005) for one in (here, there)]
        assert max(each.result(HANG) for each in hammering) < 40  # all at once would be 40

    @pytest.mark.parametrize("kind", [*MUTEXES, "Semaphore", "RWLock", "Event"])
    def test_patience_ends_and_not_before(self, kind: str, here: Seat, there: Seat, url: str) -> None:
        self.share(kind, url=url, seats=(here, there))
        path = {"RWLock": "x.write.acquire", "Event": "x.wait"}.get(kind, "x.acquire")
        if kind != "Event":
            there.call(path)
        args = (True,) if kind != "Event" else ()
        got, took = here.do("timed", path, *args, SHORT)
        assert got is False
        assert took >= SHORT
        if kind != "Event":
            assert here.call(path, False) is False
            assert here.call(path, True, -1) is False
            there.call(path.replace("acquire", "release"))
            assert here.call(path, True, HANG) is True
            here.call(path.replace("acquire", "release"))

    @pytest.mark.parametrize("kind", [*MUTEXES, "Semaphore", "RWLock"])
    def test_who_waits_gets_it(self, kind: str, here: Seat, there: Seat, url: str) -> None:
        self.share(kind, url=url, seats=(here, there))
        path = "x.write" if kind == "RWLock" else "x"
        here.call(f"{path}.acquire")
        waiting = there.start("call", f"{path}.acquire")
        here.call(f"{path}.release")
        assert waiting.result(HANG) is True
        assert here.call(f"{path}.acquire", False) is False
        there.call(f"{path}.release")

    @pytest.mark.parametrize("shell", ["async"], indirect=True)
    @pytest.mark.parametrize("kind", [*MUTEXES, "Semaphore", "RWLock"])
    def test_a_cancelled_task_takes_nothing_with_it(self, kind: str, here: Seat, there: Seat, url: str) -> None:
        self.share(kind, url=url, seats=(here, there))
        path = "x.write" if kind == "RWLock" else "x"
        there.call(f"{path}.acquire")
        assert here.do("cancelled", f"{path}.acquire") == "cancelled"
        there.call(f"{path}.release")
        assert there.call(f"{path}.acquire", True, HANG) is True
        there.call(f"{path}.release")
        assert here.call(f"{path}.acquire", False) is True
        here.call(f"{path}.release")

    # -- Lock, RLock -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", MUTEXES)
    def test_who_holds_it(self, kind: str, here: Seat, there: Seat, url: str) -> None:
        self.share(kind, url=url, seats=(here, there))
        assert here.call("x.owner") is None
        before = time.time()
        there.call("x.acquire")
        pid, since, _ = here.call("x.owner")
        assert pid == there.pid
        assert before - 1 < since < time.time() + 1
        assert here.call("x.locked")
        with pytest.raises(errors.NotOwner):
            here.call("x.release")
        there.call("x.release")
        assert here.call("x.owner") is None
        with pytest.raises(errors.NotOwner):
            there.call("x.release")

    @pytest.mark.parametrize("kind", MUTEXES)
    def test_a_forked_child_does_not_hold_it(self, kind: str, here: Seat, url: str) -> None:
        self.share(kind, url=url, seats=(here,))
        here.call("x.acquire")
        assert here.do("forked", "x.release") == "NotOwner"
        here.call("x.release")

    @pytest.mark.parametrize("kind", MUTEXES)
    def test_a_dead_owner(self, kind: str, here: Seat, there: Seat, seat: Callable[[Where], Seat], url: str) -> None:
        third = seat("thread")
        self.share(kind, url=url, seats=(here, there, third))
        there.call("x.acquire")
        waiting = here.start("call", "x.acquire")
        third.call("x.locked")
        pid = there.pid
        there.die()
        with pytest.raises(errors.OwnerDied) as told:
            waiting.result(HANG)
        assert told.value.pid == pid
        for one in (here, third):  # everyone, and nobody holds it
            with pytest.raises(errors.OwnerDied):
                one.do("enter", "x")
            with pytest.raises(errors.NotOwner):
                one.call("x.release")
        assert here.call("x.abandoned")
        assert here.call("x.owner") is None
        assert here.do("enter", "x.recover", HANG) is True
        with pytest.raises(errors.OwnerDied):
            third.call("x.acquire")
        here.do("leave", fail=True)
        assert third.call("x.abandoned")
        with pytest.raises(errors.OwnerDied):
            third.call("x.acquire")
        third.do("enter", "x.recover", HANG)
        repairing = here.start("enter", "x.recover", HANG)
        third.do("leave")
        assert repairing.result(HANG) is False  # nothing is left to do
        here.do("leave")
        assert third.call("x.acquire", True, HANG) is True
        third.call("x.release")
        assert not here.call("x.abandoned")

    def test_on_owner_died_take(self, here: Seat, there: Seat, url: str) -> None:
        self.share("Lock", url=url, on_owner_died="take", seats=(here, there))
        there.call("x.acquire")
        waiting = here.start("call", "x.acquire")
        there.die()
        assert waiting.result(HANG) is True
        assert here.call("x.inherited") is True
        here.call("x.release")
        assert here.call("x.acquire") is True
        assert here.call("x.inherited") is False
        here.call("x.release")

    def test_an_rlock_counts(self, here: Seat, there: Seat, url: str) -> None:
        self.share("RLock", url=url, seats=(here, there))
        here.call("x.acquire")
        assert here.call("x.acquire", False) is True
        here.call("x.release")
        assert there.call("x.acquire", False) is False
        here.call("x.release")
        assert there.call("x.acquire", False) is True
        there.call("x.release")

    @pytest.mark.parametrize("shell", ["sync"], indirect=True)
    @pytest.mark.parametrize("kind", [*MUTEXES, "RWLock"])
    def test_a_deadlock_is_told_to_one(self, kind: str, here: Seat, there: Seat, url: str) -> None:
        for one in (here, there):
            one.do("make", "a", "Lock", url, debug=True)
            one.do("make", "b", kind, f"{url}-b", debug=True)
        path = "b.write.acquire" if kind == "RWLock" else "b.acquire"
        here.call("a.acquire")
        there.call(path)
        crossing = {here: here.start("call", path), there: there.start("call", "a.acquire")}
        until(lambda: any(each.done() for each in crossing.values()))
        told = next(one for one, each in crossing.items() if each.done())
        with pytest.raises(errors.Deadlock):
            crossing[told].result()
        mine, theirs = "a.release", path.replace("acquire", "release")
        told.call(mine if told is here else theirs)
        other = there if told is here else here
        assert crossing[other].result(HANG) is True
        other.call(mine)
        other.call(theirs)

    # -- Semaphore ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("kind", ["Semaphore", "BoundedSemaphore"])
    def test_a_semaphore_counts(self, kind: str, here: Seat, there: Seat, url: str) -> None:
        self.share(kind, 2, url, seats=(here, there))
        assert [here.call("x.acquire", False), there.call("x.acquire", False)] == [True, True]
        assert here.call("x.get_value") == 0
        assert there.call("x.acquire", False) is False
        here.call("x.release")
        there.call("x.release")  # a unit has no owner
        assert here.call("x.get_value") == 2
        if kind == "Semaphore":
            here.call("x.release", 2)
            assert there.call("x.get_value") == 4
        else:
            with pytest.raises(ValueError):
                here.call("x.release")

    def test_leased_units_come_back(self, here: Seat, there: Seat, url: str) -> None:
        self.share("Semaphore", 1, url, leased=True, seats=(here, there))
        there.call("x.acquire")
        with pytest.raises(errors.NotOwner):
            here.call("x.release")
        waiting = here.start("call", "x.acquire")
        there.die()
        assert waiting.result(HANG) is True
        assert here.call("x.get_value") == 0
        here.call("x.release")
        assert here.call("x.get_value") == 1

    def test_a_dead_waiter_leaves_the_queue(self, here: Seat, far: Seat, url: str) -> None:
        self.share("Semaphore", 1, url, seats=(here, far))
        here.call("x.acquire")
        far.start("call", "x.acquire").add_done_callback(lambda future: future.exception())
        here.do("timed", "x.acquire", True, SHORT)  # behind it, or before
        far.die()
        here.call("x.release")
        assert here.call("x.acquire", True, HANG) is True
        here.call("x.release")

    # -- RWLock ------------------------------------------------------------------------------------------------------

    def test_readers_share(self, here: Seat, there: Seat, url: str) -> None:
        self.share("RWLock", url, seats=(here, there))
        here.call("x.read.acquire")
        assert there.call("x.read.acquire", False) is True
        there.call("x.read.release")
        writing = there.start("call", "x.write.acquire")
        here.call("x.read.release")
        assert writing.result(HANG) is True
        assert here.call("x.read.acquire", False) is False
        assert [owner[0] for owner in here.call("x.owners")] == [there.pid]
        with pytest.raises(errors.NotOwner):
            here.call("x.write.release")
        there.call("x.write.release")

    def test_a_dead_reader_is_out(self, here: Seat, there: Seat, url: str) -> None:
        self.share("RWLock", url, seats=(here, there))
        there.call("x.read.acquire")
        writing = here.start("call", "x.write.acquire")
        there.die()
        assert writing.result(HANG) is True
        here.call("x.write.release")
        assert not here.call("x.abandoned")

    @pytest.mark.parametrize("side", ["read", "write"])
    def test_a_dead_writer_abandons(self, side: str, here: Seat, there: Seat, url: str) -> None:
        self.share("RWLock", url, seats=(here, there))
        there.call("x.write.acquire")
        waiting = here.start("call", f"x.{side}.acquire")
        there.die()
        with pytest.raises(errors.OwnerDied):
            waiting.result(HANG)
        assert here.do("enter", "x.recover", HANG) is True
        here.do("leave", fail=True)
        with pytest.raises(errors.OwnerDied):
            here.do("enter", f"x.{side}")
        here.do("enter", "x.recover", HANG)
        here.do("leave")
        assert here.call(f"x.{side}.acquire", False) is True
        here.call(f"x.{side}.release")

    # -- Condition ---------------------------------------------------------------------------------------------------

    @pytest.fixture(params=["own", "Lock", "RLock"])
    def conditional(self, request: pytest.FixtureRequest, url: str) -> Callable[..., None]:
        """Have all open the condition `x`, with its own lock or another."""

        def make(*seats: Seat) -> None:
            for one in seats:
                if request.param == "own":
                    one.do("make", "x", "Condition", None, url)
                else:
                    one.do("make", "l", request.param, f"{url}-lock")
                    one.do("make", "x", "Condition", ("thing", "l"), url)

        return make

    def test_waiters_are_notified(self, conditional: Any, here: Seat, there: Seat) -> None:
        conditional(here, there)
        with pytest.raises(errors.NotOwner):
            here.call("x.wait", 0)
        with pytest.raises(errors.NotOwner):
            here.call("x.notify")
        for verb in ("notify", "notify_all"):
            there.call("x.acquire")
            waiting = there.start("call", "x.wait")
            until(lambda: here.call("x.n_waiting") == 1)
            here.call("x.acquire")
            here.call(f"x.{verb}")
            assert not waiting.done()  # it needs the lock
            here.call("x.release")
            assert waiting.result(HANG) is True
            got, took = there.do("timed", "x.wait", SHORT)
            assert got is False
            assert took >= SHORT
            there.call("x.release")

    def test_whoever_waits_hears_of_a_dead_holder(self, conditional: Any, here: Seat, there: Seat) -> None:
        conditional(here, there)
        here.call("x.acquire")
        waiting = here.start("call", "x.wait")
        until(lambda: there.call("x.n_waiting") == 1)
        there.call("x.acquire")
        there.die()
        with pytest.raises(errors.OwnerDied):
            waiting.result(HANG)
        with pytest.raises(errors.NotOwner):
            here.call("x.release")
        here.do("enter", "x.recover", HANG)
        here.do("leave")
        here.call("x.acquire")
        here.call("x.release")

    def test_a_dead_waiter_costs_nothing(
        self, conditional: Any, here: Seat, far: Seat, seat: Callable[[Where], Seat]
    ) -> None:
        third = seat("thread")
        conditional(here, far, third)
        for one in (far, third):
            one.call("x.acquire")
            waiting = one.start("call", "x.wait")
            until(lambda one=one: here.call("x.n_waiting") == (1 if one is far else 2))  # type: ignore[misc]
        here.call("x.acquire")
        far.die()
        here.call("x.notify")  # not to the dead
        here.call("x.release")
        assert waiting.result(HANG) is True
        third.call("x.release")

    @pytest.mark.parametrize("shell", ["async"], indirect=True)
    def test_a_cancelled_waiter_holds_the_lock_again(self, conditional: Any, here: Seat, there: Seat) -> None:
        conditional(here, there)
        assert here.do("cancelled_in_wait", "x") == "cancelled, and held the lock"
        assert there.call("x.acquire", True, HANG) is True
        there.call("x.release")

    # -- Event -------------------------------------------------------------------------------------------------------

    def test_events(self, here: Seat, there: Seat, url: str) -> None:
        self.share("Event", url, seats=(here, there))
        waiting = there.start("call", "x.wait")
        assert not here.call("x.is_set")
        here.call("x.set")
        assert waiting.result(HANG) is True
        assert there.call("x.is_set")
        assert there.call("x.wait", 0) is True
        there.call("x.clear")
        assert here.call("x.wait", 0) is False

    # -- Barrier -----------------------------------------------------------------------------------------------------

    def test_all_pass_together(self, here: Seat, there: Seat, url: str) -> None:
        self.share("Barrier", 2, url=url, seats=(here, there))
        for _ in range(3):
            waiting = there.start("call", "x.wait")
            assert {here.call("x.wait"), waiting.result(HANG)} == {0, 1}
        assert here.call("x.parties") == 2
        assert here.call("x.n_waiting") == 0

    def test_who_loses_patience_breaks_it(self, here: Seat, there: Seat, url: str) -> None:
        self.share("Barrier", 2, url=url, seats=(here, there))
        got, took = there.do("timed", "x.wait", SHORT)
        assert (got, here.call("x.broken")) == ("BrokenBarrier", True)
        assert took >= SHORT
        with pytest.raises(errors.BrokenBarrier):
            here.call("x.wait")
        here.call("x.reset")
        waiting = there.start("call", "x.wait")
        until(lambda: here.call("x.n_waiting") == 1)
        here.call("x.abort")
        with pytest.raises(errors.BrokenBarrier):
            waiting.result(HANG)

    def test_a_dead_party_breaks_it(self, here: Seat, far: Seat, seat: Callable[[Where], Seat], url: str) -> None:
        third = seat("thread")
        self.share("Barrier", 3, url=url, seats=(here, far, third))
        far.start("call", "x.wait").add_done_callback(lambda future: future.exception())
        until(lambda: here.call("x.n_waiting") == 1)
        waiting = third.start("call", "x.wait")
        until(lambda: here.call("x.n_waiting") == 2)
        far.die()
        with pytest.raises(errors.BrokenBarrier):
            waiting.result(HANG)
        with pytest.raises(errors.BrokenBarrier):
            here.call("x.wait")
        here.call("x.reset")
        waiting = third.start("call", "x.wait")
        until(lambda: here.call("x.n_waiting") == 1)
        third_of_all = seat("thread")
        third_of_all.do("make", "x", "Barrier", 3, url=url)
        last = third_of_all.start("call", "x.wait")
        assert {here.call("x.wait"), waiting.result(HANG), last.result(HANG)} == {0, 1, 2}

    # -- to children, and for multiprocessing's ----------------------------------------------------------------------

    @pytest.mark.parametrize("where", WHERE[1:])
    def test_anonymous_ones_go_to_children(self, shell: ShellName, where: Where) -> None:
        api = ipckit.sync if shell == "sync" else ipckit.aio
        kinds: dict[str, tuple[Any, ...]] = {"Lock": (), "RLock": (), "RWLock": (), "Event": (), "Barrier": (2,)}
        kinds |= {"Semaphore": (1,), "BoundedSemaphore": (1,), "Condition": ()}
        things = {kind: getattr(api, kind)(*args) for kind, args in kinds.items()}
        ours, theirs = Seat(shell, "thread", things), Seat(shell, where, things)
        for path in ("Lock", "RLock", "RWLock.write", "Semaphore", "BoundedSemaphore", "Condition"):
            ours.call(f"{path}.acquire")
            assert theirs.call(f"{path}.acquire", False) is False
            ours.call(f"{path}.release")
            assert theirs.call(f"{path}.acquire", False) is True
            theirs.call(f"{path}.release")
        theirs.call("Event.set")
        assert ours.call("Event.is_set")
        meeting = theirs.start("call", "Barrier.wait")
        assert {ours.call("Barrier.wait"), meeting.result(HANG)} == {0, 1}
        ours.close()
        theirs.close()

    @pytest.mark.parametrize(
        "kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition", "Event", "Barrier"]
    )
    def test_in_the_place_of_multiprocessings(self, kind: str) -> None:
        """The same program, the same results."""
        assert PROGRAMS[kind](getattr(ipckit.sync, kind)) == PROGRAMS[kind](getattr(multiprocessing, kind))


def _mutex(make: Any) -> list[Any]:
    lock = make()
    did = [lock.acquire(), lock.release(), lock.acquire(True), lock.release(), lock.acquire(block=True, timeout=1)]
    did += [_elsewhere(lambda: lock.acquire(False)), _elsewhere(lambda: lock.acquire(True, 0.01)), lock.release()]
    with lock:
        did.append(_elsewhere(lambda: lock.acquire(False, None)))
    return [*did, lock.acquire(False), lock.release()]


def _semaphore(make: Any) -> list[Any]:
    semaphore = make(2)
    did = [semaphore.acquire(), semaphore.acquire(block=False), semaphore.acquire(timeout=0.01), semaphore.get_value()]
    did += [
        semaphore.release(),
        semaphore.release(),
        semaphore.get_value(),
        make().get_value(),
        make(value=3).get_value(),
    ]
    with semaphore as entered:
        did += [entered, semaphore.get_value()]
    try:
        semaphore.release()
    except ValueError:
        did.append("too many")
    return did


def _condition(make: Any) -> list[Any]:
    condition, box = make(), [0]

    def produce() -> None:
        with condition:
            box[0] = 1
            condition.notify()
            condition.notify_all()

    thread = threading.Thread(target=produce)
    with condition as entered:
        did = [entered, condition.wait(0.01), condition.wait_for(lambda: False, timeout=0.01)]
        thread.start()
        did.append(condition.wait_for(lambda: box[0] == 1, timeout=HANG))
    thread.join()
    return [*did, condition.acquire(), condition.release()]


def _event(make: Any) -> list[Any]:
    event = make()
    return [event.is_set(), event.wait(0.01), event.set(), event.is_set(), event.wait(), event.clear(), event.is_set()]


def _barrier(make: Any) -> list[Any]:
    ran: list[int] = []
    barrier = make(2, lambda: ran.append(1), timeout=HANG)
    other: list[int] = []
    thread = threading.Thread(target=lambda: other.append(barrier.wait()))
    thread.start()
    mine = barrier.wait()
    thread.join()
    did: list[Any] = [sorted([mine, *other]), ran, barrier.parties, barrier.n_waiting, barrier.broken]
    barrier.abort()
    try:
        barrier.wait()
    except threading.BrokenBarrierError:
        did.append(barrier.broken)
    barrier.reset()
    return [*did, barrier.broken]


def _elsewhere(act: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(act()))
    thread.start()
    thread.join()
    return results[0]


PROGRAMS: dict[str, Callable[[Any], list[Any]]] = {
    "Lock": _mutex,
    "RLock": _mutex,
    "Semaphore": _semaphore,
    "BoundedSemaphore": _semaphore,
    "Condition": _condition,
    "Event": _event,
    "Barrier": _barrier,
}
