"""The service of the RPC contract, and the programs that call it. One class has every method twice: as a function, and as a
coroutine with an `a` in front; both shells serve both.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, suppress
from typing import Any

import msgspec

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.rpc import current, using


class Order(msgspec.Struct):
    item: str
    qty: int


class Sold(msgspec.Struct):
    item: str
    total: int


class Odd(Exception):
    """Of the service's own; its callers need not have it."""


class Shop(ipckit.Service):
    def __init__(self) -> None:
        self.seen: list[str] = []
        self.given = 0
        self.free = threading.Event()

    def __reduce__(self) -> Any:
        return Shop, ()  # in the process that serves it, it begins anew

    # -- the four shapes -------------------------------------------------------------------------------------------------

    @ipckit.rpc(idempotent=True)
    def add(self, a: int, b: int = 1) -> int:
        return a + b

    async def aadd(self, a: int, b: int = 1) -> int:
        return a + b

    def order(self, order: Order) -> Sold:
        return Sold(order.item, order.qty * 2)

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def acount(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number

    def total(self, numbers: Iterator[int]) -> int:
        return sum(numbers)

    async def atotal(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    def doubled(self, numbers: Iterator[int], by: int) -> Iterator[int]:
        for number in numbers:
            yield number * by

    async def adoubled(self, numbers: AsyncIterator[int], by: int) -> AsyncIterator[int]:
        async for number in numbers:
            yield number * by

    # -- what goes wrong -------------------------------------------------------------------------------------------------

    def fail(self, how: str) -> int:
        raise ValueError(how) if how != "odd" else Odd(how)

    async def afail(self, how: str) -> int:
        raise ValueError(how)

    def fail_after(self, n: int) -> Iterator[int]:
        yield from range(n)
        raise ValueError("enough")

    def lie(self) -> int:
        return "not a number"  # type: ignore[return-value]

    # -- time, cancellation, flow ----------------------------------------------------------------------------------------

    def linger(self) -> None:
        """Until nobody waits for it any more."""
        self.seen.append("lingering")
        while not current().cancelled:
            self.free.wait(0.01)
        self.seen.append("left")

    async def alinger(self) -> None:
        self.seen.append("lingering")
        try:
            await asyncio.sleep(60)
        finally:
            self.seen.append("left")

    def hold(self) -> None:
        """Until `release`, on the thread that has it."""
        self.seen.append("held")
        self.free.wait(30)

    def release(self) -> None:
        self.free.set()

    def flood(self, size: int) -> Iterator[bytes]:
        """Without end."""
        try:
            while True:
                self.given += 1
                yield b"x" * size
        finally:
            self.seen.append("closed")

    async def aflood(self, size: int) -> AsyncIterator[bytes]:
        try:
            while True:
                self.given += 1
                yield b"x" * size
        finally:
            self.seen.append("closed")

    def diary(self) -> list[str]:
        return self.seen

    def produced(self) -> int:
        return self.given

    def told(self) -> dict[str, str]:
        return dict(current().metadata)

    async def atold(self) -> dict[str, str]:
        return dict(current().metadata)

    def hurry(self) -> float | None:
        return current().remaining


class Changed(ipckit.Service):
    """What a Shop was before somebody changed it."""

    def add(self, a: str, b: int = 1) -> int:
        raise NotImplementedError


# -- programs ---------------------------------------------------------------------------------------------------------


async def got(value: Any) -> Any:
    """The result of a call, in either shell."""
    return await value if inspect.isawaitable(value) else value


async def items(stream: Any, limit: int | None = None) -> list[Any]:
    """The items of a stream, or its first; leaving it then."""
    found: list[Any] = []
    if hasattr(stream, "__aiter__"):
        async with aclosing(stream):
            if limit == 0:
                return found
            async for value in stream:
                found.append(value)
                if len(found) == limit:
                    break
    else:
        with closing(stream):
            for value in stream:
                found.append(value)
                if len(found) == limit:
                    break
    return found


async def until(shop: Any, word: str, times: int = 1) -> None:
    """Until the service has noted it."""
    for _ in range(3000):
        if (await got(shop.diary())).count(word) >= times:
            return
        await got(shop.add(1))
        threading.Event().wait(0.005)
    raise AssertionError(f"the service never noted {word!r}")


async def raised(value: Any) -> tuple[str, str, str]:
    """What a call or a stream raised: its class, text, and the remote type."""
    try:
        if hasattr(value, "__next__") or hasattr(value, "__aiter__"):
            await items(value)
        else:
            await got(value)
    except errors.IpcError as error:
        return type(error).__name__, error.message, getattr(error, "type", "")
    return "", "", ""


async def attempt(call: Any) -> tuple[str, str, str]:
    """`raised`, of what may raise before there is anything to await."""
    try:
        return await raised(call())
    except errors.IpcError as error:
        return type(error).__name__, error.message, getattr(error, "type", "")


async def four_shapes(client: Any, many: int) -> list[Any]:
    shop = await client.proxy(Shop)
    results: list[Any] = []
    for a in ("", "a"):
        results += [
            await got(getattr(shop, f"{a}add")(2, 3)),
            await got(getattr(shop, f"{a}add")(2)),
            await got(getattr(shop, f"{a}add")(b=5, a=2)),
            await items(getattr(shop, f"{a}count")(many)) == list(range(many)),
            await items(getattr(shop, f"{a}count")(0)),
            await got(getattr(shop, f"{a}total")(iter(range(many)))),
            await got(getattr(shop, f"{a}total")(iter(()))),
            await items(getattr(shop, f"{a}doubled")(iter(range(many)), 3)) == [n * 3 for n in range(many)],
        ]
    return results


async def failing(client: Any) -> dict[str, tuple[str, str, str]]:
    shop = await client.proxy(Shop)
    found = {
        "fail": await attempt(lambda: shop.fail("so")),
        "odd": await attempt(lambda: shop.fail("odd")),
        "afail": await attempt(lambda: shop.afail("so")),
        "stream": await attempt(lambda: shop.fail_after(3)),
        "argument": await attempt(lambda: shop.order(Order("tea", "x"))),  # type: ignore[arg-type]
        "result": await attempt(lambda: shop.lie()),
    }
    for name, target, method in (("method", "shop", "nothing"), ("target", "nobody", "add")):
        try:
            await client.call(target, method)
        except errors.IpcError as error:
            found[name] = type(error).__name__, "", ""
    assert await got(shop.add(1, 1)) == 2  # none of it costs the connection
    return found


async def untyped(client: Any) -> tuple[Any, ...]:
    return (
        await client.call("shop", "add", 2, b=3),
        await client.call("shop", "add", 2),
        await client.call("shop", "Order", {"item": "tea", "qty": 2}),
        await items(await _inner(client.call("shop", "count", 3))),
        await client.call("shop", "total", stream=iter(range(4))),
    )


async def _inner(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def late(client: Any) -> list[tuple[str, str, str]]:
    """Deadlines and the handler that hears of them."""
    shop = await client.proxy(Shop)
    left = await got(using(shop, timeout=30).hurry())
    assert left is not None
    assert 0 < left < 31  # gRPC rounds it up to three digits
    found = []
    for times, name in enumerate(("linger", "alinger"), 1):
        found.append(await attempt(lambda name=name: getattr(using(shop, timeout=0.5), name)()))  # time to begin
        await until(shop, "left", times)
    return found


async def left_early(client: Any) -> bool:
    """The first items of an endless stream; its generator is closed."""
    shop = await client.proxy(Shop)
    for times, name in enumerate(("flood", "aflood"), 1):
        assert len(await items(getattr(shop, name)(10), 3)) == 3
        await until(shop, "closed", times)
    return True


async def held_back(client: Any) -> tuple[int, int]:
    """Nobody reads the stream: its producer stops, and its neighbour on the connection does not. (given, given later)"""
    shop = await client.proxy(Shop)
    stream = shop.flood(1024)
    first = await anext(stream) if hasattr(stream, "__anext__") else next(stream)
    assert len(first) == 1024
    given, again = -1, 0
    while given != again:
        given, again = again, await got(shop.produced())
        for _ in range(50):
            await got(shop.add(1, 1))
    with suppress(errors.IpcError):
        await items(stream, 1)
    return given, again


async def metadata(client: Any) -> list[dict[str, str]]:
    shop = using(await client.proxy(Shop), metadata={"traceparent": "00-1-2-01", "who": "me"})
    return [await got(shop.told()), await got(shop.atold()), await client.call("shop", "told", metadata={"a": "b"})]


async def many(client: Any, number: int, calls: int) -> int:
    """Callers at once on one client, each with calls of its own."""
    shop = await client.proxy(Shop)

    async def caller(who: int) -> int:
        right = 0
        for n in range(calls):
            right += await got(shop.add(who, n) if n % 3 else shop.aadd(who, n)) == who + n
        return right

    if isinstance(client, ipckit.aio.Client):
        return sum(await asyncio.gather(*(caller(who) for who in range(number))))
    from ._parties import HANG, finish, in_thread

    running = [in_thread(lambda who=who: finish(caller(who))) for who in range(number)]  # type: ignore[misc]
    return sum(future.result(HANG) for future in running)


async def hold(client: Any) -> tuple[str, str, str]:
    """A call that ends only with its server."""
    shop = await client.proxy(Shop)
    return await attempt(shop.hold)


async def add(client: Any, a: int, b: int) -> int:
    shop = await client.proxy(Shop)
    result: int = await got(shop.add(a, b))
    return result


async def expect_other(client: Any) -> str:
    try:
        await client.proxy(Changed, "shop")
    except errors.SchemaError as error:
        return str(error)
    return ""


async def pushes(client: Any, number: int) -> list[Any]:
    """Subscribe, have the server told, and take what comes."""
    subscription = await client.subscribe(Sold)
    shop = await client.proxy(Shop)
    await got(shop.release())  # the signal that we are there
    found = [await got(subscription.recv(10)) for _ in range(number)]
    await got(subscription.close())
    return found
