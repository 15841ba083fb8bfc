"""Who waits for whom: what Lock, RLock, Semaphore, BoundedSemaphore and RWLock promise while their holders live, and after."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from ipckit import errors

from ._parties import HANG
from ._seats import Seat, Seated, Where, until

MUTEXES = ["Lock", "RLock"]
SHORT = 0.03  # seconds of patience that a contract wastes


class LockingContracts(Seated):
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
