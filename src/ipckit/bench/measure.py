"""The clock: loops that time round trips and one-way flows, each in a sync and an async form.

The two ends run the two halves of a measurement. Each half begins with one round trip that is not counted, so that both
are there when the clock starts. The cost of reading the clock is measured here, and taken off each single round trip;
where a round trip is not much longer than that, the caller asks for batches, and the clock is read once for many. Garbage
collection is off while the clock runs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import perf_counter_ns
from typing import Any, Literal

from .stats import median
from .wires import AsyncWire, Side, Wire

Kind = Literal["trips", "flow", "turns", "hops", "stream", "burst"]


@dataclass(frozen=True, slots=True)
class Job:
    """One measurement, the same for both ends.

    Attributes:
        kind: `trips`, there and back, one at a time; `flow`, one way, as fast as it goes; the others are in `paced`.
        size: bytes of each message.
        count: how many are timed.
        batch: of trips: how many between two looks at the clock. Of a flow: how many in one `send_many`; 1 uses `send`.
        lossy: of a flow: what does not come within `QUIET` seconds is lost.
    """

    kind: Kind
    size: int
    count: int
    batch: int = 1
    lossy: bool = False


@contextmanager
def undisturbed() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what is there now stays: the next collection looks at the new objects only
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@cache
def timer_cost(rounds: int = 2000) -> int:
    """Nanoseconds that one look at the clock adds to a sample: the loop below, with nothing in it."""
    samples = [0] * rounds
    before = perf_counter_ns()
    for i in range(rounds):
        after = perf_counter_ns()
        samples[i] = after - before
        before = after
    return int(median(samples))


def measure(side: Side, wire: Wire, job: Job) -> dict[str, Any]:
    """This end's half of the job, on this thread."""
    payload = bytes(job.size)
    with undisturbed():
        if job.kind == "trips":
            return _drive_trips(wire, payload, job) if side == "drive" else _echo_trips(wire, job)
        return _drive_flow(wire, payload, job) if side == "drive" else _take_flow(wire, job)


def _drive_trips(wire: Wire, payload: bytes, job: Job) -> dict[str, Any]:
    send, recv = wire.send, wire.recv
    samples = [0] * (job.count // job.batch)
    cost = timer_cost()
    send(payload)
    answer = recv()
    if len(answer) != len(payload):
        raise ValueError(f"sent {len(payload)} bytes, got {len(answer)} back")
    if job.batch == 1:
        before = perf_counter_ns()
        for i in range(len(samples)):
            send(payload)
            recv()
            after = perf_counter_ns()
            samples[i] = after - before
            before = after
        return {"samples": [max(sample - cost, 1) for sample in samples], "timer": cost}
    batch = range(job.batch)
    for i in range(len(samples)):
        before = perf_counter_ns()
        for _ in batch:
            send(payload)
            recv()
        samples[i] = perf_counter_ns() - before
    return {"samples": [max(sample - cost, 1) / job.batch for sample in samples], "timer": cost}


def _echo_trips(wire: Wire, job: Job) -> dict[str, Any]:
    rounds = job.count // job.batch * job.batch + 1
    if wire.echo is not None:
        wire.echo(rounds)
        return {}
    send, recv = wire.send, wire.recv
    for _ in range(rounds):
        send(recv())
    return {}


def _drive_flow(wire: Wire, payload: bytes, job: Job) -> dict[str, Any]:
    send = wire.send
    send(b"?")
    wire.recv()
    if job.batch > 1:
        assert wire.send_many is not None
        send_many = wire.send_many
        frames = [payload] * job.batch
        started = perf_counter_ns()
        for _ in range(job.count // job.batch):
            send_many(frames)
    else:
        started = perf_counter_ns()
        for _ in range(job.count):
            send(payload)
    if wire.flush is not None:
        wire.flush()
    return {"started": started}


def _take_flow(wire: Wire, job: Job) -> dict[str, Any]:
    if wire.echo is not None:
        wire.echo(1)
    else:
        wire.send(wire.recv())
    total = job.count // job.batch * job.batch
    if wire.drain is not None:
        return {"ended": wire.drain(total), "received": total}
    if job.lossy:
        return _take_what_comes(wire, total)
    if job.batch > 1:
        assert wire.recv_many is not None
        recv_many = wire.recv_many
        left = total
        while left:
            left -= len(recv_many(left))
    else:
        recv = wire.recv
        for _ in range(total):
            recv()
    return {"ended": perf_counter_ns(), "received": total}


def _take_what_comes(wire: Wire, total: int) -> dict[str, Any]:
    recv = wire.recv_soon or wire.recv
    received = 0
    ended = perf_counter_ns()
    try:
        while received < total:
            recv()
            ended = perf_counter_ns()  # for each, as any may be the last
            received += 1
    except TimeoutError:
        pass
    return {"ended": ended, "received": received}


# -- the same, awaited --------------------------------------------------------------------------------------------


async def ameasure(side: Side, wire: AsyncWire, job: Job) -> dict[str, Any]:
    """This end's half of the job, on the running loop."""
    payload = bytes(job.size)
    with undisturbed():
        if job.kind == "trips":
            return await (_adrive_trips(wire, payload, job) if side == "drive" else _aecho_trips(wire, job))
        return await (_adrive_flow(wire, payload, job) if side == "drive" else _atake_flow(wire, job))


async def _adrive_trips(wire: AsyncWire, payload: bytes, job: Job) -> dict[str, Any]:
    send, recv = wire.send, wire.recv
    samples = [0] * job.count
    cost = timer_cost()
    await send(payload)
    answer = await recv()
    if len(answer) != len(payload):
        raise ValueError(f"sent {len(payload)} bytes, got {len(answer)} back")
    before = perf_counter_ns()
    for i in range(job.count):
        await send(payload)
        await recv()
        after = perf_counter_ns()
        samples[i] = after - before
        before = after
    return {"samples": [max(sample - cost, 1) for sample in samples], "timer": cost}


async def _aecho_trips(wire: AsyncWire, job: Job) -> dict[str, Any]:
    if wire.echo is not None:
        await wire.echo(job.count + 1)
        return {}
    send, recv = wire.send, wire.recv
    for _ in range(job.count + 1):
        await send(await recv())
    return {}


async def _adrive_flow(wire: AsyncWire, payload: bytes, job: Job) -> dict[str, Any]:
    send = wire.send
    await send(b"?")
    await wire.recv()
    if job.batch > 1:
        assert wire.send_many is not None
        frames = [payload] * job.batch
        started = perf_counter_ns()
        for _ in range(job.count // job.batch):
            await wire.send_many(frames)
    else:
        started = perf_counter_ns()
        for _ in range(job.count):
            await send(payload)
    if wire.flush is not None:
        await wire.flush()
    return {"started": started}


async def _atake_flow(wire: AsyncWire, job: Job) -> dict[str, Any]:
    if wire.echo is not None:
        await wire.echo(1)
    else:
        await wire.send(await wire.recv())
    total = job.count // job.batch * job.batch
    if wire.drain is not None:
        return {"ended": await wire.drain(total), "received": total}
    if job.batch > 1:
        assert wire.recv_many is not None
        left = total
        while left:
            left -= len(await wire.recv_many(left))
    else:
        recv = wire.recv
        for _ in range(total):
            await recv()
    return {"ended": perf_counter_ns(), "received": total}
