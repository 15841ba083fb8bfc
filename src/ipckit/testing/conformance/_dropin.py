"""In the place of multiprocessing's: the same programs have the same results, and anonymous objects go to children."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import pytest

import ipckit.aio
import ipckit.sync

from ._parties import HANG, ShellName
from ._seats import WHERE, Seat, Seated, Where


class DropInContracts(Seated):
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
