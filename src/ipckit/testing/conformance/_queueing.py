"""What the parties of queues and topics do: programs over one endpoint (see `_parties`), and messages as plain values.

A message belongs to its endpoint's process; what a program brings home is a `Taken`.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

from ipckit import errors

from ._parties import HANG, End
from ._programs import promptly


class Taken(NamedTuple):
    value: Any
    id: str
    headers: Mapping[str, str]
    redelivered: int
    topic: str
    gap: int


#: The end of what is taken: silence says little on a busy machine, and costs time on every other.
STOP = b"stop"


def stopped(say: Callable[[], object], taking: Mapping[Future[list[Taken]], End], again: float = HANG) -> None:
    """End those who compete for messages, one after the other: whoever hears STOP leaves, so the next goes to another.

    `again`: seconds after which it is said again. A topic's message is lost with the member of a group that was just leaving.
    """
    left = dict(taking)
    deadline = time.monotonic() + HANG
    while left:
        say()
        done, _ = wait(left, again, FIRST_COMPLETED)
        assert done or time.monotonic() < deadline, "nobody heard it"
        for future in done:
            left.pop(future).close()


def taken(message: Any) -> Taken:
    return Taken(message.value, message.id, dict(message.headers), message.redelivered, message.topic, message.gap)


async def settle(message: Any, verb: str, *args: Any) -> None:
    result = getattr(message, verb)(*args)
    if inspect.isawaitable(result):
        await result


async def give(end: Any, values: Sequence[Any], timeout: float = 20) -> list[str]:
    """Send these, one by one; their ids."""
    return [await promptly(end.send(value, timeout), timeout) for value in values]


async def give_until_held(end: Any, most: int) -> int:
    """Send numbers until nothing goes any more; how many went."""
    for number in range(most):
        try:
            await end.send(b"%d" % number, 0.3)
        except errors.Timeout:
            return number
    raise AssertionError(f"{most} messages were taken, and nobody received one: there is no backpressure")


async def publish(end: Any, messages: Sequence[tuple[Any, str]], timeout: float = 20) -> int:
    """Publish these values under these topics."""
    for value, topic in messages:
        await promptly(end.publish(value, topic, timeout), timeout)
    return len(messages)


async def take(end: Any, count: int, verb: str | None = None, timeout: float = 20, pause: float = 0) -> list[Taken]:
    """Receive so many, and settle each with `verb`."""
    got: list[Taken] = []
    while len(got) < count:
        message = await promptly(end.recv(timeout), timeout)
        got.append(taken(message))
        if verb is not None:
            await settle(message, verb)
        if pause:
            await asyncio.sleep(pause)
    return got


async def take_batches(end: Any, count: int, verb: str, timeout: float = 20) -> list[Any]:
    """Receive so many by `recv_many`, and settle each with `verb`; their values, or the bytes of what has none."""
    got: list[Any] = []
    while len(got) < count:
        try:
            messages = await promptly(end.recv_many(count - len(got), timeout), timeout)
        except (errors.CodecError, errors.SchemaError) as error:
            messages = [error.undecoded]
        for message in messages:
            got.append(message.value)
            await settle(message, verb)
    return got


async def take_all(end: Any, quiet: float, verb: str | None = None) -> list[Taken]:
    """Receive, and settle each with `verb`, until `STOP`, or nothing came for a while, or it was closed, or there is nobody."""
    got: list[Taken] = []
    try:
        while True:
            message = await end.recv(quiet)
            if message.value == STOP:
                return got
            got.append(taken(message))
            if verb is not None:
                await settle(message, verb)
    except (errors.Timeout, errors.PeerError, errors.Closed):
        return got


async def refuse(end: Any, delay: float, timeout: float = 20) -> Taken:
    """Receive one, and say "again"."""
    message = await end.recv(timeout)
    await settle(message, "nack", delay)
    return taken(message)


async def impatient(end: Any, count: int) -> list[Taken]:
    """Receive so many in tasks that are cancelled again and again."""
    got: list[Taken] = []
    while len(got) < count:
        task = asyncio.ensure_future(end.recv(20))
        await asyncio.sleep(0.0005)
        task.cancel()
        try:
            got.append(taken(await task))
        except asyncio.CancelledError:
            continue
    return got
