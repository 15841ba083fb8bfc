"""`Lock(url)` at a broker: the lock is yours for the time of a lease, renewed in the background while you hold it.

    with ipckit.sync.Lock("redis://host/orders?lease=10s") as lock:
        storage.write(data, fence=lock.token)      # the storage refuses a token smaller than the largest it has seen

A holder that is killed, stopped or cut off loses it when its lease runs out: the next one gets it, with a larger token. It learns
that itself, by its own clock: `lock.lost`, `lock.check()`, and `LeaseLost` out of `release` and the end of the `with` block.
What no such lock can promise stands in docs/howto/distributed-locks.md.

The verbs are steps (`_lease`); here is the shell for threads, in `leasedtasks` that for tasks. A thread that wants the lock first
waits for the *seat* in this object, so that threads that share one exclude each other; then one of them asks the broker. Short
holds cost no background work: one thread for the process (`_Keeper`) looks when renewals are due, and a hold that lives that long
gets a thread of its own, so that a broker that does not answer delays no other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from .. import errors
from .._leasing import Holder, Leasing
from .._spi import Steps
from .._url import Url, parse
from .._wait import Gate, Lane, no_timeout, run
from . import _lease
from ._lease import Holding, Lease

log = logging.getLogger("ipckit.sync")

_PATIENCE = 5.0  # seconds to open a connection for one who will not wait for the lock
_all: weakref.WeakSet[Leased] = weakref.WeakSet()
_parents: list[Leasing] = []  # in a forked child: what must not be taken apart here


def _shut(box: list[Leasing]) -> None:
    while box:
        box.pop().close()


class _Desk:
    """A connection to the broker, opened when it is first used, and where its callers wait."""

    def __init__(self, lock: Leased) -> None:
        self.box: list[Leasing] = []
        self.gate = Gate(lock.url, functools.partial(_shut, self.box))
        # passing: some of what is waited for lives for one step only.
        self.lane = Lane(self.gate, "lock", passing=True)
        self._open = functools.partial(lock._transport.leasing, lock.url, lock._place)
        self._options = lock._options

    def opening(self) -> Steps[Leasing]:
        if not self.box:
            try:
                leasing = yield from self._open(_lease.terms(self._options))
            except errors.Timeout as timeout:
                raise errors.NothingListening("no broker answered in time", url=self.gate.url) from timeout
            self.box.append(leasing)
        return self.box[0]

    def holder(self) -> Steps[Holder | None]:
        leasing = yield from self.opening()
        return (yield from leasing.holder())


class Leased:
    """What both shells have: what is known without asking the broker."""

    def __init__(self, url: str | Url) -> None:
        self.url = parse(url)
        self._transport, self._options, self._place = _lease.read(self.url)
        self._fresh()
        _all.add(self)

    def _fresh(self) -> None:
        self._lease = Lease(self._options.lease)
        self._desk = _Desk(self)
        self._window = _Desk(self)  # for looking: the desk may be waited at for long
        self._holding: Holding | None = None

    def _acquiring(self, wait: bool) -> Steps[bool]:
        if self._holding is None:
            leasing = yield from self._desk.opening()
            self._holding = Holding(leasing, self._lease, self.url, _lease.new_object())
        return (yield from self._holding.acquire(wait))

    def _renewing(self) -> Steps[bool]:
        holding = self._must_hold("renew")
        return (yield from holding.renew())

    def _must_hold(self, operation: str) -> Holding:
        if self._holding is None or self._lease.id is None:
            raise errors.NotOwner("this object does not hold the lock", url=self.url, operation=operation)
        return self._holding

    @property
    def token(self) -> int | None:
        """The fencing token of this hold: larger than that of every hold before. None: it is not held."""
        return self._lease.token

    @property
    def lost(self) -> bool:
        """The lock that this object held came to an end before it was given back. Asks our own clock, not the broker."""
        return self._lease.lost

    @property
    def remaining(self) -> float:
        """Seconds for which the lock is certainly ours unless it is renewed; 0 when it is lost, or not held."""
        return self._lease.remaining

    @property
    def inherited(self) -> bool:
        """Whoever held it before did not give it back: what it guards may be half done."""
        return self._lease.inherited

    def check(self) -> int:
        """The token, if the lock is still ours: to be asked before a step that cannot be undone.

        Raises: LeaseLost, NotOwner.
        """
        holding = self._must_hold("check")
        token = self._lease.token
        assert token is not None
        if self._lease.lost:
            raise holding.lost_error(token, "check")
        return token

    @property
    def native(self) -> Any:
        """What the transport shows of it; None before the first acquire."""
        return self._desk.box[0].native if self._desk.box else None

    def _close(self) -> None:
        if self._lease.id is not None and self._holding is not None:
            self._holding.leasing.withdraw(self._lease.id)
            self._lease.ended()
        self._desk.gate.close()
        self._window.gate.close()

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        if not hasattr(self, "_window") or _finalizing():
            return
        try:
            if self._lease.id is not None:
                warnings.warn(f"{self!r} was dropped, and is given back", ResourceWarning, source=self, stacklevel=1)
        finally:  # a warning may be an error
            self._close()

    def __reduce__(self) -> Any:
        return type(self), (self.url.reveal(),)  # another object of the same name, which does not hold it

    def __repr__(self) -> str:
        state = "not held by us" if self._lease.id is None else "lost" if self.lost else f"held, token {self.token}"
        return f"<{type(self).__name__} {self.url}: {state}>"


# -- threads ----------------------------------------------------------------------------------------------------------


class LeasedLock(Leased):
    """What `ipckit.sync.Lock` returns for the URL of a broker.

    Options of the URL: `lease=10s` (after which a holder that says nothing loses it), `renew=1`, and those of the connection.
    The thread that acquired it releases it. In a forked child the object is a new one, which does not hold it. A lock whose
    holder died is simply granted when the lease is over, with `inherited` true, as by `on_owner_died="take"`.
    """

    def _fresh(self) -> None:
        super()._fresh()
        self._seat = threading.Lock()
        self._thread = 0
        self._watched = False  # by the keeper
        self._stir: threading.Event | None = None  # ends the sleep of the thread that renews this hold

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Whether it got it within `timeout` seconds; without `block`, at the first asking. Ctrl-C ends the wait.

        Raises: NothingListening without a broker; Deadlock where this thread holds it and would wait for ever.
        """
        wait, timeout = patience_of(block, timeout)
        if wait and timeout is None and self._thread == threading.get_ident():
            raise errors.Deadlock("this thread holds it, and would wait for itself", url=self.url, operation="acquire")
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._seat.acquire(timeout=-1 if timeout is None else min(timeout, threading.TIMEOUT_MAX)):
            return False
        got = False
        try:
            left = left_for_broker(deadline, wait, self._holding is None)
            got = run(self._acquiring(wait), self._desk.lane, left)
        finally:
            if not got:
                self._seat.release()
        if got:
            self._thread = threading.get_ident()
            if self._options.renew:
                _keeper.watch(self)
        return got

    def release(self) -> None:
        """Give it back. Raises NotOwner; LeaseLost if the broker does not say that it was ours until now."""
        holding = self._must_hold("release")
        if self._thread != threading.get_ident():
            raise errors.NotOwner("another thread holds it", url=self.url, operation="release")
        # A renewal that gets no answer is in the lane for a third of a lease at most.
        patience = self._lease.remaining + self._lease.seconds / 3 + 1
        try:
            run(holding.release(), self._desk.lane, patience)
        finally:
            self._lease.ended()
            self._stand_up()

    def _stand_up(self) -> None:
        """Whoever had it has it no more: the next of our threads may ask for it."""
        thread, self._thread = self._thread, 0
        stir, self._stir = self._stir, None
        if stir is not None:
            stir.set()
        if thread:
            self._seat.release()

    def renew(self, timeout: float | None = None) -> bool:
        """Ask for another lease now; whether the lock is still ours. Raises NotOwner; Timeout: nobody knows."""
        self._must_hold("renew")
        return run(self._renewing(), self._desk.lane, timeout)

    def owner(self, timeout: float | None = None) -> Holder | None:
        """Who holds it, as the broker sees it; None if nobody does."""
        return run(self._window.holder(), self._window.lane, timeout)

    def locked(self, timeout: float | None = None) -> bool:
        """Somebody holds it, as the broker sees it: a glance."""
        return self.owner(timeout) is not None

    def close(self) -> None:
        """Give it back if it is held, and end the connection; who waits here raises Closed. One that is thrown away is closed."""
        # Who holds it waits at the broker for a renewal at most; who waits for the lock is woken by this.
        with self._desk.lane.mutex if self._lease.id is not None else contextlib.nullcontext():
            self._close()
        self._stand_up()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except errors.IpcError as failure:
            also(failure, error)

    def _renew_in_background(self, id: str) -> None:
        stir = self._stir = threading.Event()
        renewing = threading.Thread(
            target=_renew_while_held, args=(weakref.ref(self), id, stir), name="ipckit-renew", daemon=True
        )
        renewing.start()

    def _renew_once(self) -> None:
        lease = self._lease
        try:
            run(self._renewing(), self._desk.lane, max(min(lease.seconds / 3, lease.remaining), 0.001))
        except errors.NotOwner:
            return  # released meanwhile
        except errors.IpcError as error:
            log.debug("%s: not renewed yet: %s", self.url, error)
        if lease.id is not None and lease.lost:
            log.warning("%s: the lease (token %s) is lost", self.url, lease.token)


def patience_of(block: bool, timeout: float | None) -> tuple[bool, float | None]:
    """Whether to wait, and for how many seconds. As multiprocessing has it: a negative timeout is 0."""
    if timeout is not None and math.isnan(timeout):
        raise no_timeout()
    wait = block and (timeout is None or timeout > 0)
    return wait, timeout if wait else 0


def left_for_broker(deadline: float | None, wait: bool, opening: bool) -> float | None:
    """Seconds for the broker. Who will not wait for the lock waits for one answer: `Leasing.take` knows how long."""
    if not wait:
        return _PATIENCE if opening else None
    return None if deadline is None else max(deadline - time.monotonic(), 0)


def also(failure: errors.IpcError, error: BaseException | None) -> None:
    """At the end of a `with` block: what went wrong inside is worth more than that the lock was lost as well."""
    if error is None:
        raise failure
    error.add_note(f"and then: {failure}")


def _renew_while_held(ref: weakref.ref[LeasedLock], id: str, stir: threading.Event) -> None:
    while (lock := ref()) is not None and lock._lease.id == id and not lock._lease.lost:
        pause = lock._lease.due - _lease.clock()
        if pause <= 0:
            lock._renew_once()
        del lock
        if pause > 0:
            stir.wait(pause)


class _Keeper:
    """Looks when the holds of this process are due for renewal. Its thread ends when it finds none."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._locks = weakref.WeakSet[LeasedLock]()
        self._thread: threading.Thread | None = None

    def watch(self, lock: LeasedLock) -> None:
        """After each acquire; most find that they are watched since the one before."""
        if lock._watched:  # SYNC POINT: keeper. First held, then this look ...
            return
        with self._changed:
            lock._watched = True
            self._locks.add(lock)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ipckit-keeper", daemon=True)
                self._thread.start()
            else:
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                pause = self._look()
                if pause is None:
                    self._thread = None
                    return
                self._changed.wait(pause)

    def _look(self) -> float | None:
        """Seconds until the next is due; None: nothing has been held lately."""
        pause = None
        for lock in tuple(self._locks):
            lock._watched = False  # SYNC POINT: keeper. ... here the other way round.
            id = lock._lease.id
            left = lock._lease.due - _lease.clock()
            if left > 0:  # also one that is not held now: most are taken again before that
                lock._watched = True
                pause = left if pause is None else min(pause, left)
                continue
            self._locks.discard(lock)
            if id is not None:
                lock._renew_in_background(id)
        return pause


_keeper = _Keeper()


def _in_child_of_fork() -> None:
    """What is held is held by the parent; here each object begins anew, without the parent's connections."""
    global _keeper
    _keeper = _Keeper()
    for lock in tuple(_all):
        for desk in (lock._desk, lock._window):
            for leasing in desk.box:
                leasing.abandon()
            _parents.extend(desk.box)
        lock._fresh()


os.register_at_fork(after_in_child=_in_child_of_fork)
