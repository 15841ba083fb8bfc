"""A fresh interpreter that opens one end of a contender, and runs the loops of `measure` and `paced` when told.

    python -m ipckit.bench.worker        JSON, one object a line: orders on standard input, reports on standard output

An order is for one side, or for both where both live here (threads of one process):

    {"sides": ["echo"], "shell": "sync", "opener": "ipckit.bench.raw:unix", "address": ..., "cpus": {...}, ...}
    {"to": "drive", "address": ...}      what the side that opens first announced
    {"to": null, "measure": {...}}       a Job
    {"to": null, "close": true}

An audience (sides `echo.0`, `echo.1` ...) is as many processes, forked before anything is opened or started, for the price
of one interpreter; this one then only hands on the orders. When the parent is gone, however it went, standard input ends,
and so do all of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from time import process_time_ns, thread_time_ns
from typing import Any, TextIO

from ..errors import IpcError, MissingDependency, ResourceLimit
from . import paced
from .measure import Job, ameasure, measure
from .wires import End, Side

Order = dict[str, Any]
_CLOSING = 10  # seconds that an audience may take to close


def main() -> None:
    """Serve orders until `close`, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    setup: Order = json.loads(sys.stdin.readline())
    if len(setup.get("sides", ())) > 1 and "drive" not in setup["sides"]:
        setup = _audience(setup)
    post = _Post()
    _pin(set(setup["cpus"].values()), whole_process=True)
    if "floor" in setup:
        _floor(setup, post)
    elif setup["shell"] == "aio":
        asyncio.run(_aserve(setup, post))
    else:
        _serve(setup, post)
    os._exit(0)  # the ends are closed; the thread that reads the orders is still in read()


# -- orders and reports -------------------------------------------------------------------------------------------


class _Post:
    """Standard output, kept for reports alone: what a library prints goes to standard error."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._mutex = threading.Lock()

    def report(self, side: str, **facts: object) -> None:
        with self._mutex:
            self._out.write(json.dumps({"side": side, **facts}) + "\n")

    def failed(self, side: str, error: BaseException) -> None:
        if isinstance(error, IpcError):
            text = f"{type(error).__name__}: {error.message}"
            self.report(side, failed=text, hint=error.hint, absent=isinstance(error, MissingDependency | ResourceLimit))
        else:
            self.report(side, failed=f"{type(error).__name__}: {error}".strip(": "), hint=None, absent=False)


def _deliver(to: dict[str, Callable[[Order], object]]) -> None:
    """A thread that reads the orders: it sleeps in read() while we measure, and ends us when there is no parent."""

    def read() -> None:
        for line in sys.stdin:
            order = json.loads(line)
            for side, put in to.items():
                if order["to"] in (None, _role(side)):
                    put(order)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()


def _role(side: str) -> Side:
    return "drive" if side == "drive" else "echo"


def _audience(setup: Order) -> Order:
    """In each of so many children: its own setup. Here: orders go on to all of them, until the last one has ended."""
    with suppress(ImportError):  # whoever opens it will say so
        for module in setup["preload"]:
            import_module(module)
    _opener(setup)
    inboxes: list[int] = []
    for side in setup["sides"]:
        reading, writing = os.pipe()
        if os.fork() == 0:
            for inbox in (*inboxes, writing):
                os.close(inbox)
            os.dup2(reading, 0)
            os.close(reading)
            sys.stdin = os.fdopen(0, closefd=False)
            return {**setup, "sides": [side]}
        os.close(reading)
        inboxes.append(writing)
    signal.signal(signal.SIGCHLD, lambda *_: os._exit(1))  # one has died: with our ends of the pipes the others go too
    for line in sys.stdin:
        if "close" in line:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.alarm(_CLOSING)
        for inbox in inboxes:
            os.write(inbox, line.encode())
        if "close" in line:
            for _ in inboxes:
                os.wait()
            os._exit(0)
    os._exit(1)


# -- where to run -------------------------------------------------------------------------------------------------


def _pin(cpus: set[int], *, whole_process: bool) -> None:
    """Bind this thread, or every thread that there is by now, to these CPUs, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        return
    for task in os.listdir("/proc/self/task") if whole_process else ["0"]:
        with suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task), cpus)


def _settle(side: str, setup: Order) -> None:
    """Once the end is open: a process that may run on one CPU only would have chosen not to spin."""
    alone = len(setup["sides"]) == 1
    _pin({setup["cpus"][_role(side)]}, whole_process=alone)


def _opener(setup: Order) -> Callable[[End], Any]:
    module, _, name = setup["opener"].partition(":")
    found: Callable[[End], Any] = getattr(import_module(module), name)
    return found


def _end(side: str, setup: Order, announced: Order | None, post: _Post) -> End:
    return End(
        _role(side),
        setup["address"] if announced is None or setup["descriptors"] else announced["address"],
        lambda where: post.report(side, listening=where),
        tuple(setup["descriptors"]),
        setup["options"],
        setup["loop"],
        setup["audience"],
    )


def _pace(setup: Order) -> paced.Pace | None:
    if not setup["pace"]:
        return None
    alone = len(setup["sides"]) == 1  # else the others' time is in the process's
    inward, outward = setup["pace"]
    return paced.Pace(inward, outward, setup["audience"], process_time_ns if alone else thread_time_ns)


@contextmanager
def _reporting(side: str, post: _Post) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, it is the parent that must hear it
        post.failed(side, error)


# -- one thread for each side -------------------------------------------------------------------------------------


def _serve(setup: Order, post: _Post) -> None:
    inboxes: dict[str, queue.SimpleQueue[Order]] = {side: queue.SimpleQueue() for side in setup["sides"]}
    opener = _opener(setup)
    _deliver({side: inbox.put for side, inbox in inboxes.items()})
    *others, last = inboxes.items()
    threads = [threading.Thread(target=_side, args=(side, opener, setup, inbox, post)) for side, inbox in others]
    for thread in threads:
        thread.start()
    _side(last[0], opener, setup, last[1], post)
    for thread in threads:
        thread.join()


def _side(side: Any, opener: Callable[[End], Any], setup: Order, inbox: queue.SimpleQueue[Order], post: _Post) -> None:
    with _reporting(side, post):
        announced = None if _role(side) == setup["first"] else inbox.get()
        with opener(_end(side, setup, announced, post)) as wire:
            _settle(side, setup)
            pace = _pace(setup)
            post.report(side, open=True)
            while "measure" in (order := inbox.get()):
                job = Job(**order["measure"])
                taken = paced.measure(_role(side), wire, job, pace) if pace else measure(_role(side), wire, job)
                post.report(side, result=taken)
        post.report(side, closed=True)


# -- one task for each side ---------------------------------------------------------------------------------------


async def _aserve(setup: Order, post: _Post) -> None:
    loop = asyncio.get_running_loop()
    inboxes: dict[str, asyncio.Queue[Order]] = {side: asyncio.Queue() for side in setup["sides"]}
    opener = _opener(setup)
    _deliver({side: _putter(loop, inbox) for side, inbox in inboxes.items()})
    await asyncio.gather(*(_aside(side, opener, setup, inbox, post) for side, inbox in inboxes.items()))


def _putter(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Order]) -> Callable[[Order], object]:
    return lambda order: loop.call_soon_threadsafe(inbox.put_nowait, order)


async def _aside(
    side: Any, opener: Callable[[End], Any], setup: Order, inbox: asyncio.Queue[Order], post: _Post
) -> None:
    with _reporting(side, post):
        announced = None if _role(side) == setup["first"] else await inbox.get()
        async with opener(_end(side, setup, announced, post)) as wire:
            _settle(side, setup)
            pace = _pace(setup)
            post.report(side, open=True)
            while "measure" in (order := await inbox.get()):
                job = Job(**order["measure"])
                if pace:
                    taken = await paced.ameasure(_role(side), wire, job, pace)
                else:
                    taken = await ameasure(_role(side), wire, job)
                post.report(side, result=taken)
        post.report(side, closed=True)


# -- the C floor: both ends in one call ---------------------------------------------------------------------------


def _floor(setup: Order, post: _Post) -> None:
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    _deliver({"drive": inbox.put})
    mechanism, cpus = setup["floor"], (setup["cpus"]["drive"], setup["cpus"]["echo"])
    with _reporting("drive", post):
        from .._native import floor, floor_throughput

        post.report("drive", open=True)
        while "measure" in (order := inbox.get()):
            job = Job(**order["measure"])
            with _reporting("drive", post):  # a mechanism does not carry every size: that ends this job only
                if job.kind == "trips":
                    result = {"samples": floor(mechanism, job.size, job.count, cpus), "timer": 0}
                else:
                    took = floor_throughput(mechanism, job.size, job.count, cpus)
                    result = {"started": 0, "ended": took, "received": job.count}
                post.report("drive", result=result)
        post.report("drive", closed=True)


if __name__ == "__main__":
    main()
