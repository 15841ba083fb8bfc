"""The clock for what goes one way: from a sender to receivers, with a pipe beside it by which they tell that they have it.

    turns    one thread sends a message, receives it and acknowledges it: what the calls cost, without anybody's wake-up
    hops     one message at a time from process to process: from before the send to after the receive
    stream   messages as fast as they go, until the last receiver has the last one
    burst    a few that nothing has to wait for, then a rest: what sending costs the sender, whoever listens

The clock of all processes is one (CLOCK_MONOTONIC), so a hop is the difference of two readings. Each measurement begins with
messages that are not counted: `?`, again and again until every receiver has told that it hears, then `!`. That
is what lets a subscription arrive that was asked for and not yet known to the publisher.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

from .measure import Job, timer_cost, undisturbed
from .wires import AsyncWire, Side, Wire

KINDS = ("turns", "hops", "stream", "burst")

_AGAIN = 0.02  # seconds between two `?`
_LOST = 1.0  # seconds after which a hop that may get lost was


@dataclass(frozen=True, slots=True)
class Pace:
    """The pipe: a byte from each receiver.

    Attributes:
        inward, outward: its descriptors.
        audience: the receivers.
        cpu: the clock of what sending costs the sender, in nanoseconds.
    """

    inward: int
    outward: int
    audience: int
    cpu: Callable[[], int]

    def tell(self) -> None:
        os.write(self.outward, b".")

    def heard(self, timeout: float | None = None) -> int:
        """How many have told, waiting for one at least; 0: the time is up."""
        poller = select.poll()
        poller.register(self.inward, select.POLLIN)
        if not poller.poll(None if timeout is None else timeout * 1000):
            return 0
        return len(os.read(self.inward, 4096))

    def all_told(self) -> None:
        told = 0
        while told < self.audience:
            told += self.heard()

    async def aheard(self, timeout: float | None = None) -> int:
        """`heard`, awaited."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self.inward, _wake, ready)
        try:
            await asyncio.wait_for(ready, timeout)
        except TimeoutError:
            return 0
        finally:
            loop.remove_reader(self.inward)
        return len(os.read(self.inward, 4096))

    async def aall_told(self) -> None:
        told = 0
        while told < self.audience:
            told += await self.aheard()


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def measure(side: Side, wire: Wire, job: Job, pace: Pace) -> dict[str, Any]:
    """This end's half of the job, on this thread."""
    payload = bytes(job.size)
    with undisturbed():
        if job.kind == "turns":
            return _turns(wire, payload, job) if side == "drive" else {}
        if side == "drive":
            _call(wire, pace)
            return _GIVE[job.kind](wire, payload, job, pace)
        _hear(wire, pace)
        return _TAKE[job.kind](wire, job, pace)


def _turns(wire: Wire, payload: bytes, job: Job) -> dict[str, Any]:
    turn = wire.turn
    assert turn is not None
    samples = [0] * job.count
    cost = timer_cost()
    turn(payload)
    before = perf_counter_ns()
    for i in range(job.count):
        turn(payload)
        after = perf_counter_ns()
        samples[i] = after - before
        before = after
    return {"samples": [max(sample - cost, 1) for sample in samples], "timer": cost}


def _call(wire: Wire, pace: Pace) -> None:
    told = 0
    while told < pace.audience:
        wire.send(b"?")
        if wire.flush is not None:
            wire.flush()
        told += pace.heard(_AGAIN)
    wire.send(b"!")
    if wire.flush is not None:
        wire.flush()


def _hear(wire: Wire, pace: Pace) -> None:
    while wire.recv() != b"?":  # what a lossy flow before left
        pass
    pace.tell()
    while wire.recv() == b"?":  # until `!`, or the first message if that one got lost
        pass


def _give_hops(wire: Wire, payload: bytes, job: Job, pace: Pace) -> dict[str, Any]:
    send, flush = wire.send, wire.flush
    sent = [0] * job.count
    for i in range(job.count):
        while True:
            sent[i] = perf_counter_ns()
            send(payload)
            if flush is not None:
                flush()
            if pace.heard(_LOST if job.lossy else None):
                break
    return {"sent": sent}


def _take_hops(wire: Wire, job: Job, pace: Pace) -> dict[str, Any]:
    recv = wire.recv
    got = [0] * job.count
    for i in range(job.count):
        recv()
        got[i] = perf_counter_ns()
        pace.tell()
    return {"got": got}


def _give_stream(wire: Wire, payload: bytes, job: Job, pace: Pace) -> dict[str, Any]:
    started = perf_counter_ns()
    if job.batch > 1:
        assert wire.send_many is not None
        frames = [payload] * job.batch
        for _ in range(job.count // job.batch):
            wire.send_many(frames)
    else:
        send = wire.send
        for _ in range(job.count):
            send(payload)
    if wire.flush is not None:
        wire.flush()
    return {"started": started}


def _take_stream(wire: Wire, job: Job, pace: Pace) -> dict[str, Any]:
    total = job.count // job.batch * job.batch
    if job.lossy:
        return _take_what_comes(wire, total)
    left = total
    if wire.recv_many is not None and job.batch > 1:
        while left:
            left -= len(wire.recv_many(left))
    else:
        recv = wire.recv
        for _ in range(total):
            recv()
    return {"ended": perf_counter_ns(), "received": total}


def _take_what_comes(wire: Wire, total: int) -> dict[str, Any]:
    recv = wire.recv_soon or wire.recv
    received, ended = 0, perf_counter_ns()
    try:
        while received < total:
            recv()
            ended = perf_counter_ns()
            received += 1
    except TimeoutError:
        pass
    return {"ended": ended, "received": received}


def _give_burst(wire: Wire, payload: bytes, job: Job, pace: Pace) -> dict[str, Any]:
    send, flush = wire.send, wire.flush
    burst = range(job.batch)
    samples = []
    spent = -pace.cpu()
    for _ in range(job.count // job.batch):
        started = perf_counter_ns()
        for _ in burst:
            send(payload)
        if flush is not None:
            flush()
        samples.append((perf_counter_ns() - started) / job.batch)
        pace.all_told()
    spent += pace.cpu()
    return {"samples": samples, "cpu": spent / (len(samples) * job.batch)}


def _take_burst(wire: Wire, job: Job, pace: Pace) -> dict[str, Any]:
    for _ in range(job.count // job.batch):
        if job.lossy:
            _take_what_comes(wire, job.batch)
        else:
            for _ in range(job.batch):
                wire.recv()
        pace.tell()
    return {}


_GIVE = {"hops": _give_hops, "stream": _give_stream, "burst": _give_burst}
_TAKE = {"hops": _take_hops, "stream": _take_stream, "burst": _take_burst}


# -- the same, awaited --------------------------------------------------------------------------------------------


async def ameasure(side: Side, wire: AsyncWire, job: Job, pace: Pace) -> dict[str, Any]:
    """This end's half of the job, on the running loop."""
    payload = bytes(job.size)
    with undisturbed():
        if job.kind == "turns":
            return await _aturns(wire, payload, job) if side == "drive" else {}
        if side == "drive":
            await _acall(wire, pace)
            return await _AGIVE[job.kind](wire, payload, job, pace)
        await _ahear(wire, pace)
        return await _ATAKE[job.kind](wire, job, pace)


async def _aturns(wire: AsyncWire, payload: bytes, job: Job) -> dict[str, Any]:
    turn = wire.turn
    assert turn is not None
    samples = [0] * job.count
    cost = timer_cost()
    await turn(payload)
    before = perf_counter_ns()
    for i in range(job.count):
        await turn(payload)
        after = perf_counter_ns()
        samples[i] = after - before
        before = after
    return {"samples": [max(sample - cost, 1) for sample in samples], "timer": cost}


async def _acall(wire: AsyncWire, pace: Pace) -> None:
    told = 0
    while told < pace.audience:
        await wire.send(b"?")
        if wire.flush is not None:
            await wire.flush()
        told += await pace.aheard(_AGAIN)
    await wire.send(b"!")
    if wire.flush is not None:
        await wire.flush()


async def _ahear(wire: AsyncWire, pace: Pace) -> None:
    while await wire.recv() != b"?":
        pass
    pace.tell()
    while await wire.recv() == b"?":
        pass


async def _agive_hops(wire: AsyncWire, payload: bytes, job: Job, pace: Pace) -> dict[str, Any]:
    send, flush = wire.send, wire.flush
    sent = [0] * job.count
    for i in range(job.count):
        sent[i] = perf_counter_ns()
        await send(payload)
        if flush is not None:
            await flush()
        await pace.aheard()
    return {"sent": sent}


async def _atake_hops(wire: AsyncWire, job: Job, pace: Pace) -> dict[str, Any]:
    recv = wire.recv
    got = [0] * job.count
    for i in range(job.count):
        await recv()
        got[i] = perf_counter_ns()
        pace.tell()
    return {"got": got}


async def _agive_stream(wire: AsyncWire, payload: bytes, job: Job, pace: Pace) -> dict[str, Any]:
    started = perf_counter_ns()
    if job.batch > 1:
        assert wire.send_many is not None
        frames = [payload] * job.batch
        for _ in range(job.count // job.batch):
            await wire.send_many(frames)
    else:
        send = wire.send
        for _ in range(job.count):
            await send(payload)
    if wire.flush is not None:
        await wire.flush()
    return {"started": started}


async def _atake_stream(wire: AsyncWire, job: Job, pace: Pace) -> dict[str, Any]:
    total = job.count // job.batch * job.batch
    left = total
    if wire.recv_many is not None and job.batch > 1:
        while left:
            left -= len(await wire.recv_many(left))
    else:
        recv = wire.recv
        for _ in range(total):
            await recv()
    return {"ended": perf_counter_ns(), "received": total}


async def _agive_burst(wire: AsyncWire, payload: bytes, job: Job, pace: Pace) -> dict[str, Any]:
    send, flush = wire.send, wire.flush
    burst = range(job.batch)
    samples = []
    spent = -pace.cpu()
    for _ in range(job.count // job.batch):
        started = perf_counter_ns()
        for _ in burst:
            await send(payload)
        if flush is not None:
            await flush()
        samples.append((perf_counter_ns() - started) / job.batch)
        await pace.aall_told()
    spent += pace.cpu()
    return {"samples": samples, "cpu": spent / (len(samples) * job.batch)}


async def _atake_burst(wire: AsyncWire, job: Job, pace: Pace) -> dict[str, Any]:
    for _ in range(job.count // job.batch):
        for _ in range(job.batch):
            await wire.recv()
        pace.tell()
    return {}


_AGIVE = {"hops": _agive_hops, "stream": _agive_stream, "burst": _agive_burst}
_ATAKE = {"hops": _atake_hops, "stream": _atake_stream, "burst": _atake_burst}
