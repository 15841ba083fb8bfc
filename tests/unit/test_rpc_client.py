"""What a client does when a call goes wrong: it costs that call, and nobody else; and what it gives back when it is given up."""

from __future__ import annotations

import asyncio
import functools
import gc
import threading
from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.rpc import contract_of, using
from ipckit.testing.conformance._base import eventually

URL = "unix://client"


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


class Order(msgspec.Struct):
    item: str
    qty: int = 1


class Shop(ipckit.Service):
    def __init__(self) -> None:
        self.times = 0

    @ipckit.rpc(idempotent=True)
    def price(self, item: str) -> int:
        self.times += 1
        return len(item)

    @ipckit.rpc(idempotent=True)
    def wrong(self) -> int:
        self.times += 1
        return "no number"  # type: ignore[return-value]

    def add(self, a: int, b: int = 2, c: int = 3) -> int:
        return a + b * 10 + c * 100

    def total(self, orders: Iterator[Order]) -> int:
        return sum(each.qty for each in orders)

    def chat(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            yield line.upper()


def idle(server: Any) -> bool:
    return eventually(lambda: server.stats()["in_flight"] == 0)


class Stopped(Exception):
    """Of an iterator of the caller's."""


def breaking(item: Any, gate: threading.Event | None = None) -> Iterator[Any]:
    yield item
    if gate is not None:
        assert gate.wait(30)
    raise Stopped


# -- the values of a call, and its connection --------------------------------------------------------------------------------


def test_what_is_wrong_with_the_values_of_a_call_is_no_reason_to_repeat_it() -> None:
    """SchemaError and CodecError are ProtocolErrors, and a connection ends with those. These say nothing about the connection."""
    shop = Shop()
    with ipckit.Server(URL, shop), ipckit.client(URL, Shop) as client, ipckit.client(URL) as untyped:
        for call in (
            lambda: client.price(5),  # type: ignore[arg-type]
            lambda: untyped.call("shop", "price", 5),
        ):
            with pytest.raises(errors.SchemaError, match=r"shop.price unix://client: \$.item: expected str, got int"):
                call()
        for call in (client.wrong, using(client, metadata={"a": "b"}).wrong):
            with pytest.raises(errors.SchemaError, match=r"shop.wrong unix://client: \$: expected int, got str"):
                call()
        assert shop.times == 2


def test_what_cannot_be_sent_costs_no_connection() -> None:
    with ipckit.Server(URL, Shop()) as server, ipckit.client(URL, Shop) as client:
        long_way = using(client, metadata={"a": "b"})
        for call in (client.price, long_way.price):
            with pytest.raises(errors.CodecError, match=r"shop.price unix://client: this value cannot be sent"):
                call(object())  # type: ignore[arg-type]
        with pytest.raises(errors.MessageTooLarge, match="metadata of 80"):
            using(client, metadata={"a": "x" * 40_000, "b": "x" * 40_000}).price("tea")
        assert long_way.price("tea") == 3
        assert server.stats()["connections_accepted"] == 1


def test_the_same_from_a_loop() -> None:
    async def main() -> None:
        shop = Shop()
        async with ipckit.aio.Server(URL, shop) as server, await ipckit.aio.client(URL, Shop) as client:
            with pytest.raises(errors.SchemaError, match=r"\$.item"):
                await client.price(5)  # type: ignore[misc, arg-type]
            with pytest.raises(errors.SchemaError, match=r"\$: expected int"):
                await client.wrong()  # type: ignore[misc]
            with pytest.raises(errors.CodecError):
                await client.price(object())  # type: ignore[misc, arg-type]
            assert shop.times == 1
            assert server.stats()["connections_accepted"] == 1

    asyncio.run(asyncio.wait_for(main(), 30))


def rest(client: Any) -> None:
    """As if nobody had called for a while."""
    client._ipckit[0]._lines.conn.used -= 1.0


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:0", URL, "shm://client"])
def test_a_server_that_ended_between_two_calls_costs_none(url: str) -> None:
    """TCP takes a call for a server that is gone. What only looks like it was made would be lost."""
    first = ipckit.Server(url, Shop())
    where = first.url
    with ipckit.client(where, Shop) as client:
        assert client.add(1) == 321
        first.shutdown(0)
        rest(client)
        with ipckit.Server(where, Shop(), timeout=10):
            assert client.add(2) == 322
            assert list(client.chat(iter("a"))) == ["A"]


def test_the_same_from_a_loop_that_had_no_time_to_hear_of_it() -> None:
    first = ipckit.Server("tcp://127.0.0.1:0", Shop())

    async def main() -> None:
        async with await ipckit.aio.client(first.url, Shop) as client:
            assert await client.add(1) == 321  # type: ignore[misc]
            first.shutdown(0)
            rest(client)
            with ipckit.Server(first.url, Shop(), timeout=10):
                assert await client.add(2) == 322  # type: ignore[misc]

    asyncio.run(asyncio.wait_for(main(), 30))


# -- streams of the caller's -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", [URL, "inproc://client"])
def test_a_stream_that_fails_at_its_source_ends_the_call(url: str) -> None:
    gate = threading.Event()
    with ipckit.Server(url, Shop()) as server, ipckit.client(url, Shop) as client:
        with pytest.raises(Stopped):
            client.total(breaking(Order("tea")))
        assert idle(server)
        with pytest.raises(errors.CodecError):
            client.total(iter([object()]))  # type: ignore[list-item]
        assert idle(server)
        with pytest.raises(errors.SchemaError, match=r"\$.orders\[\].qty: expected int, got str"):
            client.total(iter([Order("tea", "many")]))  # type: ignore[arg-type]
        chat = client.chat(breaking("a", gate))
        assert next(chat) == "A"
        threading.Timer(0.05, gate.set).start()  # while we wait for the next
        with pytest.raises(Stopped):
            next(chat)
        assert idle(server)


def test_who_sends_for_long_hears_that_nobody_wants_it() -> None:
    """An endless stream of small items that come slowly: its window is never used up."""
    given = []

    def endless() -> Iterator[Any]:
        while True:
            given.append(1)
            yield "no order"
            threading.Event().wait(0.001)

    with ipckit.Server(URL, Shop()), ipckit.client(URL, Shop) as client:
        with pytest.raises(errors.SchemaError):
            client.total(endless())
        with pytest.raises(errors.DeadlineExceeded):
            using(client, timeout=0.05).total(Order("tea") for _ in endless())


def test_a_deadline_holds_for_a_stream_that_never_goes_on() -> None:
    async def silent() -> AsyncIterator[Order]:
        yield Order("tea")
        await asyncio.Event().wait()

    async def main() -> None:
        async with ipckit.aio.Server(URL, Shop()) as server, await ipckit.aio.client(URL, Shop) as client:
            with pytest.raises(errors.DeadlineExceeded):
                await using(client, timeout=0.05).total(silent())  # type: ignore[misc, arg-type]
            assert await asyncio.to_thread(idle, server)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_dropped_stream_is_called_off_though_its_source_waits() -> None:
    gate = threading.Event()
    with ipckit.Server(URL, Shop()) as server, ipckit.client(URL, Shop) as client:
        for line in client.chat(breaking("a", gate)):
            assert line == "A"
            break
        gc.collect()
        assert idle(server)
        gate.set()


def test_a_stream_may_be_collected_where_its_connection_is_locked() -> None:
    """A finalizer runs wherever the collector does: also in a thread that has the mutex."""
    with ipckit.Server(URL, Shop()) as server, ipckit.client(URL, Shop) as client:
        chat: Any = [client.chat(iter("ab"))]
        assert next(chat[0]) == "A"

        def collect() -> None:
            with chat[0]._conn.mutex:
                chat.clear()

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        assert client.price("tea") == 3
        assert idle(server)


# -- without a contract ------------------------------------------------------------------------------------------------------


class Other(ipckit.Service):
    def add(self, a: str, b: str) -> str:
        return a + b

    def fresh(self) -> int:
        return 5


def test_an_untyped_client_looks_again_when_a_target_has_changed() -> None:
    with ipckit.Server(URL, Shop()) as server, ipckit.client(URL) as client:
        assert client.call("shop", "add", 1) == 321
        server.expose("shop", Other())
        assert client.call("shop", "fresh") == 5
        server.expose("shop", Shop())
        with pytest.raises(errors.UnknownMethod):
            client.call("shop", "fresh")
        with pytest.raises(errors.UnknownMethod, match="it has: add, chat, price"):
            client.call("shop", "fresh")
        assert client.call("shop", "add", 1, 1) == 311


def test_an_untyped_client_fills_the_gaps_between_its_arguments() -> None:
    class Odd(ipckit.Service):
        def f(self, a: bytes = b"x", b: int = 1) -> int:
            return len(a) + b

    with ipckit.Server(URL, Shop(), Odd()), ipckit.client(URL) as client:
        assert client.call("shop", "add", 1, c=1) == 121
        assert client.call("odd", "f") == 2
        with pytest.raises(TypeError, match="give the arguments before this one"):
            client.call("odd", "f", b=5)


def test_the_timeout_of_an_untyped_call_is_that_of_its_description_as_well() -> None:
    with ipckit.listen(URL) as listener:

        def answer() -> None:
            from ipckit.rpc._servercore import ServerCore

            core = ServerCore()
            with listener.accept(10) as channel:
                core.receive(channel.recv(10), 0.0)
                channel.send(core.outbox.popleft())
                list(channel)  # and nothing more

        thread = threading.Thread(target=answer)
        thread.start()
        with ipckit.client(URL) as client, pytest.raises(errors.DeadlineExceeded):
            client.call("shop", "price", "tea", timeout=0.05)
        thread.join()


# -- pushes ------------------------------------------------------------------------------------------------------------------


def test_who_waits_for_a_push_is_woken_when_the_client_is_closed() -> None:
    async def main() -> None:
        async with ipckit.aio.Server(URL, Slow()):
            client = await ipckit.aio.client(URL)
            waiting = [asyncio.ensure_future((await client.subscribe("News")).recv())]
            waiting.append(asyncio.ensure_future(client.call("slow", "wait")))
            await asyncio.sleep(0.05)
            await client.close()
            for each in waiting:
                with pytest.raises(errors.Closed):
                    await each

    asyncio.run(asyncio.wait_for(main(), 30))


class Slow(ipckit.Service):
    async def wait(self) -> None:
        await asyncio.Event().wait()


def test_a_subscriber_on_a_loop_hears_that_its_server_is_gone_for_good() -> None:
    async def main() -> None:
        server = await ipckit.aio.Server(URL, Slow())
        async with await ipckit.aio.client(URL, timeout=0.1) as client, await client.subscribe("News") as news:
            await server.shutdown(0)
            with pytest.raises(errors.NothingListening):
                await news.recv()
            async with ipckit.aio.Server(URL, Slow()) as again:
                with pytest.raises(errors.Timeout):
                    await news.recv(0.05)
                assert again.broadcast("hello", type="News") == 1
                assert await news.recv(10) == "hello"

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_subscription_that_is_refused_is_an_error() -> None:
    with (
        ipckit.Server(URL, Shop(), requests_per_second=0.001, burst_size=1),
        ipckit.client(URL) as client,
    ):
        client.subscribe("News")
        with pytest.raises(errors.RateLimited):
            client.subscribe("Other")
        with pytest.raises(errors.BadOption, match="backlog"):
            client.subscribe("News", backlog=0)


def test_a_push_that_cannot_be_read_or_written() -> None:
    with (
        ipckit.Server(URL, Shop()) as server,
        ipckit.client(URL) as client,
        client.subscribe(Order) as orders,
    ):
        server.broadcast({"item": 5}, type="Order")
        with pytest.raises(errors.SchemaError, match=r"recv unix://client: \$.item: expected str, got int"):
            orders.recv(10)
        with pytest.raises(errors.CodecError, match="broadcast unix://client: this value cannot be sent"):
            server.broadcast(object(), type="Order")


# -- what stands for a contract ----------------------------------------------------------------------------------------------


@ipckit.rpc(idempotent=True)
def add(a: int, b: int = 2) -> int:
    """The sum."""
    return a + b


def test_a_single_function() -> None:
    with ipckit.Server(URL, add), ipckit.client(URL, add) as remote:
        assert remote(1) == 3
        assert using(remote, timeout=5)(1, b=5) == 6
        assert remote.__doc__ == "The sum."

    async def main() -> None:
        async with ipckit.aio.Server(URL, add), await ipckit.aio.client(URL, add) as remote:
            assert await remote(1) == 3  # type: ignore[misc]

    asyncio.run(main())


class Kept(ipckit.Service):
    """Only the contract."""

    @abstractmethod
    @ipckit.rpc(idempotent=True)
    def times(self, a: int) -> int: ...


class Keeper(Kept):
    @functools.cache  # noqa: B019 - it lives as long as the test
    def times(self, a: int) -> int:
        return a * 2


def test_a_contract_apart_from_what_keeps_it() -> None:
    assert contract_of(Keeper).methods["times"].options.idempotent
    with ipckit.Server(URL) as server:
        server.expose("kept", Keeper())
        kept: Any
        with ipckit.client(URL, Kept) as kept:
            assert kept.times(4) == 8


def test_a_marked_class_that_is_no_service() -> None:
    class Plain:
        __slots__ = ()

        @ipckit.rpc
        def one(self) -> int:
            return 1

    with ipckit.Server(URL, Plain()):
        plain: Any = ipckit.client(URL, Plain)
        with plain:
            assert plain.one() == 1


@pytest.mark.parametrize(
    ("open", "kind", "words"),
    [
        (lambda: ipckit.client(URL, Shop()), errors.ConfigError, "give the class: Shop"),  # type: ignore[call-overload]
        (lambda: ipckit.client(URL, Shop, call_timeout=-1), errors.BadOption, "None, 0 or more seconds"),
        (lambda: ipckit.client(URL, Shop, interceptors=[5]), errors.BadOption, "no interceptor"),  # type: ignore[list-item]
        (lambda: ipckit.Server(URL, Shop), errors.ConfigError, "expose an instance"),
        (lambda: ipckit.Server(URL, object()), errors.ConfigError, "no method that could be called"),
        (lambda: ipckit.Server(URL, Shop(), interceptors=[5]), errors.BadOption, "no interceptor"),  # type: ignore[list-item]
        (lambda: ipckit.Server(URL, Shop(), workers=0), errors.BadOption, "workers is 0"),
        (lambda: ipckit.Server(URL, Shop(), max_connections=-1), errors.BadOption, "max_connections is -1"),
    ],
)
def test_mistakes_are_told_and_leave_nothing_open(open: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        open()
    ipckit.Server(URL, Shop()).close()  # the address is free


def test_a_server_that_does_not_listen_yet_says_so() -> None:
    server = ipckit.aio.Server(URL, Shop())
    with pytest.raises(errors.ConfigError, match="does not listen yet"):
        server.expose("shop", Shop())


def test_a_server_that_does_not_answer_is_not_waited_for_longer_than_allowed() -> None:
    with ipckit.listen(URL), pytest.raises(errors.NothingListening, match="did not answer in time"):
        ipckit.client(URL, Shop, timeout=0.05)
