"""What a server does beyond answering: interceptors from a loop, pushes to those who do not keep up, how it is let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.rpc import CallContext, current, events
from ipckit.rpc._clientcore import ClientCore
from ipckit.testing.conformance._base import eventually

URL = "unix://server"


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


class Every(ipckit.Service):
    """All shapes, as functions and as coroutines."""

    def name(self) -> str:
        return current().method

    @ipckit.rpc(inline=True)
    def quick(self) -> str:
        return current().method

    async def aname(self) -> str:
        return current().method

    def count(self, upto: int) -> Iterator[int]:
        yield from range(upto)

    async def acount(self, upto: int) -> AsyncIterator[int]:
        for number in range(upto):
            yield number

    def sum(self, numbers: Iterator[int]) -> int:
        return sum(numbers)

    async def asum(self, numbers: AsyncIterator[int]) -> int:
        return sum([number async for number in numbers])

    def double(self, numbers: Iterator[int]) -> Iterator[int]:
        for number in numbers:
            yield number * 2

    def fail(self) -> None:
        raise ValueError("so")


def call_every(every: Every) -> None:
    assert [every.name(), every.quick(), every.aname()] == ["name", "quick", "aname"]
    assert list(every.count(3)) == list(every.acount(3)) == [0, 1, 2]  # type: ignore[call-overload]
    assert every.sum(iter(range(4))) == every.asum(iter(range(4))) == 6  # type: ignore[arg-type, comparison-overlap]
    assert list(every.double(iter(range(3)))) == [0, 2, 4]
    with pytest.raises(errors.RemoteError, match="ValueError: so"):
        every.fail()


@pytest.mark.parametrize("url", [URL, "grpc://127.0.0.1:0"])
@pytest.mark.parametrize("shell", ["sync", "async"])
def test_an_interceptor_may_be_a_coroutine_function_whatever_it_is_around(url: str, shell: str) -> None:
    seen = []

    async def guard(call: CallContext, proceed: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        seen.append(call.method)
        return await proceed()

    def plain(call: CallContext, proceed: Callable[[], Any]) -> Any:
        return proceed()

    if shell == "sync":
        with (
            ipckit.Server(url, Every(), interceptors=[plain, guard, plain]) as server,
            ipckit.client(server.url, Every) as every,
        ):
            call_every(every)
    else:

        async def main() -> None:
            async with ipckit.aio.Server(url, Every(), interceptors=[plain, guard, plain]) as server:

                def in_thread() -> None:
                    with ipckit.client(server.url, Every) as every:
                        call_every(every)

                await asyncio.to_thread(in_thread)

        asyncio.run(asyncio.wait_for(main(), 30))
    assert [each for each in seen if hasattr(Every, each)] == [
        *("name", "quick", "aname", "count", "acount", "sum", "asum", "double", "fail")
    ]


class Less(ipckit.Service):
    """What an older client knows of it."""

    def name(self) -> str: ...


@pytest.mark.parametrize("url", [URL, "grpc://127.0.0.1:0"])
def test_who_is_let_in_by_an_interceptor_of_its_own_may_ask_what_there_is(url: str) -> None:
    """Contracts are compared, and described to untyped clients, before a client's interceptors can say who it is."""

    def guard(call: CallContext, proceed: Callable[[], Any]) -> Any:
        if call.metadata.get("token") != "secret":
            raise errors.RemoteError("no", type="Forbidden")
        return proceed()

    def sign(request: Any, proceed: Callable[[], Any]) -> Any:
        request.metadata["token"] = "secret"
        return proceed()

    with ipckit.Server(url, Every(), interceptors=[guard]) as server:
        with (
            ipckit.client(server.url, Less, target="every", interceptors=[sign]) as less,
            ipckit.client(server.url, interceptors=[sign]) as untyped,
        ):
            assert less.name() == untyped.call("every", "name") == "name"
        with ipckit.client(server.url) as stranger, pytest.raises(errors.RemoteError, match="no"):
            stranger.call("every", "name")


def test_an_interceptor_of_a_client_on_a_loop_is_awaited() -> None:
    seen = []

    async def sign(request: Any, proceed: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        seen.append(request.operation)
        return await proceed()

    async def main() -> None:
        async with (
            ipckit.aio.Server(URL, Every()),
            await ipckit.aio.client(URL, Every, interceptors=[sign]) as every,
        ):
            assert await every.aname() == "aname"
            assert [number async for number in every.acount(3)] == [0, 1, 2]
            left: Any = every.acount(3)
            await left.aclose()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert seen == ["every.aname", "every.acount"]
    with pytest.raises(errors.BadOption, match=r"ipckit\.aio\.client"):
        ipckit.client(URL, interceptors=[sign])


# -- pushes ------------------------------------------------------------------------------------------------------------------


class News(msgspec.Struct):
    number: int
    text: bytes = b""


def test_who_does_not_read_is_told_how_many_pushes_it_lost() -> None:
    with (
        ipckit.Server(URL) as server,
        ipckit.client(URL) as client,
        ipckit.client(URL),
        client.subscribe(News, backlog=10_000) as news,
    ):
        sent = 0

        def send(each: News) -> int:
            nonlocal sent
            sent += 1
            return server.broadcast(each)

        while not server.stats()["pushes_dropped"]:
            send(News(1, bytes(65_536)))
        assert server.stats()["pushes_dropped"] == 1  # and none to who did not ask for them
        heard: list[int] = []
        reader = threading.Thread(target=lambda: heard.extend(_until_the_last(news)))
        reader.start()
        assert eventually(lambda: send(News(0)) == 1)
        reader.join(30)
        assert len(heard) + news.lost == sent
        assert news.lost == server.stats()["pushes_dropped"]


def _until_the_last(news: Iterator[News]) -> Iterator[int]:
    for each in news:
        yield each.number
        if not each.number:
            return


def test_what_was_missed_travels_with_the_next_push_of_its_type() -> None:
    from ipckit.rpc._servercore import ServerCore

    core, client = ServerCore(), ClientCore()
    core.receive(_frame(client, lambda: client.subscribe(["a", "b"])), 0.0)
    core.outbox.clear()
    assert [core.miss("a"), core.miss("a"), core.miss("c")] == [True, True, False]
    for type in ("b", "a", "a"):
        assert core.push(type, b"\x01")
    found = [client.receive(frame)[0] for frame in core.outbox]
    assert found == [events.Push("b", b"\x01"), events.Push("a", b"\x01", 2), events.Push("a", b"\x01")]


def _frame(core: ClientCore, say: Callable[[], Any]) -> bytes:
    say()
    return core.outbox.pop()


def test_a_call_that_runs_when_the_server_begins_to_leave_is_answered() -> None:
    """It runs on the thread that received it, and is taken over from there while the server takes no new calls."""
    service = Held()
    for client_url in (URL, "inproc://server"):
        server = ipckit.Server(client_url, service)
        with ipckit.client(client_url, Held) as held:
            results: list[Any] = []
            caller = threading.Thread(target=lambda: results.append(held.wait()))  # noqa: B023
            caller.start()
            assert service.begun.wait(30)
            stopping = threading.Thread(target=server.shutdown, args=(30,))
            stopping.start()
            assert eventually(lambda: server._engine._attendance.busy is False)  # noqa: B023
            service.free.set()
            caller.join(30)
            stopping.join(30)
            assert results == ["done"]
            service.begun.clear()
            service.free.clear()


class Held(ipckit.Service):
    def __init__(self) -> None:
        self.begun, self.free = threading.Event(), threading.Event()

    def wait(self) -> str:
        self.begun.set()
        assert self.free.wait(30)
        return "done"


# -- ends --------------------------------------------------------------------------------------------------------------------


def test_serve_over_a_channel_ends_with_its_client() -> None:
    async def main() -> None:
        ours, theirs = await ipckit.aio.pair("unix://")
        serving = asyncio.ensure_future(ipckit.aio.serve(theirs, Every()))
        async with await ipckit.aio.client(ours, Every) as every:
            assert await every.aname() == "aname"
        report = await serving
        assert report.forced_closed == 0

    asyncio.run(asyncio.wait_for(main(), 30))


class Patient(ipckit.Service):
    def __init__(self) -> None:
        self.ended = threading.Event()

    async def wait(self) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    @ipckit.rpc(inline=True)
    async def hold(self, gate: int) -> None: ...


def test_a_call_that_is_cancelled_on_its_way_to_the_loop_is_cancelled_there() -> None:
    """The loop is busy while the call and its cancellation arrive: the task begins after both."""
    service = Patient()
    core = ClientCore()
    core.hello({})
    call = core.begin("patient", "wait", msgspec.msgpack.encode(()), 0.0)
    core.cancel(call)
    with ipckit.Server(URL, service) as server:
        busy, free = threading.Event(), threading.Event()
        server._own_loop().call_soon_threadsafe(lambda: (busy.set(), free.wait(30)))
        assert busy.wait(30)
        with ipckit.connect(URL, timeout=10) as channel:
            channel.send_many(list(core.outbox))
            assert eventually(lambda: server.stats()["in_flight"] == 1)
            assert channel.recv(10)  # its hello
            core.outbox.clear()
            core.begin("ipckit", "targets", msgspec.msgpack.encode(()), 0.0)
            channel.send(core.outbox.pop())
            assert channel.recv(10)  # so that it has heard of the cancellation
            free.set()
            assert service.ended.wait(30)
            assert eventually(lambda: server.stats()["in_flight"] == 0)
