"""What a party does over and over: programs, each an `async def` over one endpoint (see `_parties`), checked as they go."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from ipckit import errors

T = TypeVar("T")


def payload(number: int, size: int) -> bytes:
    """The bytes of message `number`: both sides can make them, so either can check them."""
    return random.Random(number * 1_000_003 + size).randbytes(size)


def sizes(seed: int, count: int, largest: int) -> list[int]:
    """Sizes of every magnitude up to `largest`, small ones as often as large ones."""
    dice = random.Random(seed)
    return [int(2 ** dice.uniform(0, largest.bit_length() - 1)) - dice.randint(0, 1) for _ in range(count)]


async def promptly(call: Awaitable[T], timeout: float) -> T:
    """A result that comes with the end of its timeout was there before: its wake-up was lost, and the last try found it."""
    start = time.monotonic()
    result = await call
    assert time.monotonic() - start < timeout * 0.9, "it came only when the time was up: a wake-up was lost"
    return result


async def send_all(end: Any, lengths: list[int], timeout: float = 20) -> int:
    """Messages 0, 1, 2... of these lengths."""
    for number, length in enumerate(lengths):
        await promptly(end.send(payload(number, length), timeout), timeout)
    return len(lengths)


async def recv_all(end: Any, lengths: list[int], timeout: float = 20) -> int:
    """Expect what `send_all` sends: each once, whole, in order."""
    for number, length in enumerate(lengths):
        got = await promptly(end.recv(timeout), timeout)
        assert len(got) == length, f"message {number} has {len(got)} bytes instead of {length}"
        assert got == payload(number, length), f"message {number} is not what was sent"
    return len(lengths)


async def echo(end: Any) -> int:
    """Send everything back, until the peer closes."""
    count = 0
    async for message in end:
        await promptly(end.send(message, 20), 20)
        count += 1
    return count


async def ping(end: Any, rounds: int, seed: int, size: int = 64) -> int:
    """Round trips with an echo, at tiny random intervals. A wake-up that is lost shows as a Timeout."""
    dice = random.Random(seed)
    for number in range(rounds):
        message = payload(number, size)
        _spend(dice.uniform(0, 60e-6))
        await promptly(end.send(message, 10), 10)
        _spend(dice.uniform(0, 60e-6))
        assert await promptly(end.recv(10), 10) == message
    return rounds


async def echo_uneven(end: Any, seed: int) -> int:
    dice = random.Random(seed)
    count = 0
    async for message in end:
        _spend(dice.uniform(0, 60e-6))
        await promptly(end.send(message, 20), 20)
        count += 1
    return count


async def collect(end: Any, timeout: float = 20) -> list[bytes]:
    """Everything, until the peer closes or nothing comes any more."""
    got: list[bytes] = []
    try:
        while True:
            got.append(await end.recv(timeout))
    except (errors.PeerError, errors.Timeout):
        return got


async def collect_until(end: Any, last: bytes, timeout: float = 20, pause: float = 0) -> list[bytes]:
    """Everything up to `last`, which is left out."""
    got: list[bytes] = []
    while (message := await promptly(end.recv(timeout), timeout)) != last:
        got.append(message)
        if pause:
            await asyncio.sleep(pause)
    return got


async def fill(end: Any, size: int, limit: int, timeout: float = 0.2) -> tuple[int, bool]:
    """Send numbered messages until nothing goes any more. How many were taken, and whether the last of them is uncertain."""
    for number in range(limit):
        start = time.monotonic()
        try:
            await end.send(number.to_bytes(8, "big") + bytes(size - 8), timeout)
        except errors.Timeout as error:
            assert time.monotonic() - start >= timeout, "the timeout came early"
            uncertain = isinstance(error, errors.OutcomeUnknown)
            return number + uncertain, uncertain
    raise AssertionError(
        f"{limit} messages of {size} bytes were taken, and nobody received one: there is no backpressure"
    )


def _spend(seconds: float) -> None:
    """Busy, not asleep: a sleep would be a hundred times longer, and would hide the race."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# -- on the main thread of a spawned process ---------------------------------------------------------------------------------


def interrupted(endpoint: Any, verb: str) -> str:
    """Block in `recv` or `accept` until Ctrl-C; the name of what was raised. Interrupts itself, as a terminal would."""
    import threading

    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        result = getattr(endpoint, verb)(20)
        if asyncio.iscoroutine(result):
            asyncio.run(result)
    except BaseException as error:
        return type(error).__name__
    finally:
        timer.join()
    return "nothing"


def used_in_child(*endpoints: Any) -> list[str]:
    """What a forked child meets when it uses these endpoints."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            met = []
            for endpoint in endpoints:
                for verb, args in (("recv", (0,)), ("send", (b"from the child", 0)), ("accept", (0,))):
                    if hasattr(endpoint, verb):
                        met.append(f"{verb}: {_outcome(endpoint, verb, args)}")
                _outcome(endpoint, "close", ())  # what `with` does there; must not reach the peer
            os.write(write, "\n".join(met).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text.split("\n")


def _outcome(endpoint: Any, verb: str, args: tuple[Any, ...]) -> str:
    try:
        result = getattr(endpoint, verb)(*args)
        if asyncio.iscoroutine(result):
            result = asyncio.new_event_loop().run_until_complete(result)
    except BaseException as error:
        return type(error).__name__
    return repr(result)


def fork_idle() -> int:
    """Fork a child that does nothing for a minute; its pid."""
    child = os.fork()
    if not child:
        try:
            time.sleep(60)
        finally:
            os._exit(0)
    return child
