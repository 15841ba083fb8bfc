"""Who waits for something to happen: what Condition, Event and Barrier promise, also when one of those who wait dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ipckit import errors

from ._locking import SHORT
from ._parties import HANG
from ._seats import Seat, Seated, Where, until


class MeetingContracts(Seated):
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
