"""Calls, beyond their contract: what is repeated and what is not, limits, interceptors, traces, how a server ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.rpc import CallContext, ShutdownReport, current, using
from ipckit.testing.conformance._base import eventually

URL = "unix://calls"


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


class Work(ipckit.Service):
    """Calls that wait until they are let go."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.free = threading.Event()
        self.times = 0

    def hold(self) -> str:
        self.begun.release()
        assert self.free.wait(30)
        return "done"

    async def ahold(self) -> str:
        self.begun.release()
        while not self.free.is_set():  # noqa: ASYNC110 - threads set it
            await asyncio.sleep(0.01)
        return "done"

    def echo(self, data: bytes) -> bytes:
        return data

    def several(self, size: int) -> Iterator[bytes]:
        yield b"small"
        yield b"x" * size

    def boom(self) -> None:
        raise ValueError("inside")

    def cross(self) -> None:
        raise errors.TargetBusy("not now")

    def said(self) -> dict[str, str]:
        return dict(current().metadata)

    @ipckit.rpc(idempotent=True)
    def again(self) -> int:
        self.times += 1
        return self.times

    def once(self) -> int:
        self.times += 1
        return self.times


def waiting(service: Work, count: int = 1) -> None:
    for _ in range(count):
        assert service.begun.acquire(timeout=30)


def in_threads(call: Callable[[], Any], count: int) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = []

    def body() -> None:
        try:
            results.append(call())
        except errors.IpcError as error:
            results.append(error)

    threads = [threading.Thread(target=body) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, results


# -- retries and reconnection ----------------------------------------------------------------------------------------------


class Flaky:
    """A server that is cut off in the middle of its first calls: it answers when it has been killed often enough."""

    def __init__(self, kills: int) -> None:
        self.listener = ipckit.listen(URL)
        self.kills = kills
        self.calls = 0
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        from ipckit.rpc import events
        from ipckit.rpc._servercore import ServerCore, Started

        with suppress(errors.Closed), self.listener:
            while True:
                with self.listener.accept() as channel:
                    core = ServerCore(targets=lambda: {"work": fingerprint()})
                    with suppress(errors.PeerError):
                        while True:
                            for happened in core.receive(channel.recv(), 0.0):
                                assert isinstance(happened, Started)
                                self.calls += 1
                                if self.calls <= self.kills:
                                    raise errors.PeerClosed("cut off")
                                core.say(events.Result(happened.call.id, msgspec.msgpack.encode(7)))
                            while core.outbox:
                                channel.send(core.outbox.popleft())


def fingerprint() -> str:
    from ipckit.rpc import contract_of

    return contract_of(Work).fingerprint


def test_only_idempotent_calls_are_repeated_after_a_lost_connection() -> None:
    flaky = Flaky(kills=3)
    with ipckit.client(URL, Work) as work:
        with pytest.raises(errors.PeerError):
            work.once()
        assert flaky.calls == 1
        assert work.again() == 7  # after two more connections were lost
        assert flaky.calls == 4
        assert work.once() == 7
    flaky.listener.close()
    flaky.thread.join()


def test_only_idempotent_calls_are_repeated_from_a_loop() -> None:
    flaky = Flaky(kills=3)

    async def main() -> None:
        async with await ipckit.aio.client(URL, Work) as work:
            with pytest.raises(errors.PeerError):
                await work.once()  # type: ignore[misc]
            assert await work.again() == 7  # type: ignore[misc]
        assert flaky.calls == 4

    asyncio.run(main())
    flaky.listener.close()
    flaky.thread.join()


def test_a_server_that_leaves_before_it_said_hello_is_waited_for() -> None:
    with ipckit.listen(URL) as listener:
        thread = threading.Thread(target=lambda: listener.accept(10).close())
        thread.start()
        connecting, found = in_threads(lambda: ipckit.client(URL, Work, timeout=20), 1)
        thread.join()
    with ipckit.Server(URL, Work()):
        connecting[0].join()
        with found[0] as work:
            assert work.echo(b"x") == b"x"


def test_a_client_finds_the_server_that_comes_back() -> None:
    service = Work()
    with ipckit.Server(URL, service) as server:
        client = ipckit.client(URL, Work, timeout=5)
        assert client.echo(b"1") == b"1"
        server.shutdown(0)
    with pytest.raises(errors.NothingListening):
        using(client, timeout=0.05).echo(b"2")
    with ipckit.Server(URL, service), client:
        assert client.echo(b"3") == b"3"


# -- limits -----------------------------------------------------------------------------------------------------------------


def test_more_calls_than_allowed_are_refused_and_the_connection_stays_good() -> None:
    service = Work()
    with ipckit.Server(URL, service, max_concurrent=2, workers=4) as server, ipckit.client(URL, Work) as work:
        threads, results = in_threads(work.hold, 2)
        waiting(service, 2)
        with pytest.raises(errors.TargetBusy):
            work.hold()
        assert server.stats()["in_flight"] == 2
        service.free.set()
        for thread in threads:
            thread.join()
        assert results == ["done", "done"]
        assert work.hold() == "done"


def test_a_limit_for_each_client() -> None:
    service = Work()
    with (
        ipckit.Server(URL, service, max_per_connection=1),
        ipckit.client(URL, Work) as one,
        ipckit.client(URL, Work) as other,
    ):
        threads, results = in_threads(one.ahold, 1)  # type: ignore[arg-type]
        waiting(service)
        with pytest.raises(errors.TargetBusy):
            one.echo(b"")
        assert other.echo(b"x") == b"x"
        service.free.set()
        threads[0].join()
        assert results == ["done"]


def test_more_connections_than_allowed() -> None:
    with ipckit.Server(URL, Work(), max_connections=1), ipckit.client(URL, Work) as work:
        with pytest.raises(errors.TargetBusy, match="1 connections already"):
            ipckit.client(URL, Work)
        assert work.echo(b"x") == b"x"


def test_what_is_too_large_fails_its_call_only() -> None:
    url = f"{URL}?limit=64KiB"
    with ipckit.Server(url, Work()), ipckit.client(f"{URL}?limit=1MiB", Work) as work:
        assert work.echo(b"x" * 1000) == b"x" * 1000
        with pytest.raises(errors.IpcError):
            list(work.several(100_000))
        assert work.echo(b"x") == b"x"
    with ipckit.Server(f"{URL}?limit=1MiB", Work()), ipckit.client(url, Work) as work:
        for _ in range(2):
            with pytest.raises(errors.MessageTooLarge):
                work.echo(b"x" * 100_000)
        threads, results = in_threads(lambda: work.echo(b"x" * 100_000), 3)
        for thread in threads:
            thread.join()
        assert [type(each) for each in results] == [errors.MessageTooLarge] * 3
        assert work.echo(b"x") == b"x"


# -- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracebacks", [False, True])
def test_a_traceback_only_on_request(tracebacks: bool, caplog: pytest.LogCaptureFixture) -> None:
    with (
        ipckit.Server(URL, Work(), tracebacks=tracebacks),
        ipckit.client(URL, Work) as work,
        pytest.raises(errors.RemoteError) as caught,
    ):
        work.boom()
    assert (caught.value.type, caught.value.message) == ("ValueError", "inside")
    assert (caught.value.traceback is not None) is tracebacks
    if tracebacks:
        assert 'raise ValueError("inside")' in (caught.value.traceback or "")
    assert any(record.exc_info for record in caplog.records)  # the server's log has it either way


def test_errors_of_calls_that_a_handler_raises_arrive_as_they_are() -> None:
    with (
        ipckit.Server(URL, Work()),
        ipckit.client(URL, Work) as work,
        pytest.raises(errors.TargetBusy, match="not now"),
    ):
        work.cross()


def test_a_value_that_cannot_be_sent_costs_nothing() -> None:
    with ipckit.Server(URL, Work()), ipckit.client(URL, Work) as work:
        with pytest.raises(errors.CodecError):
            work.echo(object())  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            work.echo()  # type: ignore[call-arg]
        with pytest.raises(errors.SchemaError):
            work.echo(5)  # type: ignore[arg-type]
        assert work.echo(b"x") == b"x"


# -- interceptors, metadata, traces ------------------------------------------------------------------------------------------


def test_interceptors_of_both_sides_in_order() -> None:
    told: list[str] = []

    def outer(request: Any, proceed: Callable[[], Any]) -> Any:
        told.append(f"> {request.operation}")
        request.metadata["token"] = "secret"
        try:
            return proceed()
        finally:
            told.append("<")

    def inner(request: Any, proceed: Callable[[], Any]) -> Any:
        told.append("inner")
        return proceed()

    def guard(call: CallContext, proceed: Callable[[], Any]) -> Any:
        if call.metadata.get("token") != "secret":
            raise errors.TargetBusy("who are you?")
        told.append(f"{call.target}.{call.method}")
        return proceed()

    with ipckit.Server(URL, Work(), interceptors=[guard]):
        with ipckit.client(URL, Work, interceptors=[outer, inner]) as work:
            assert work.echo(b"x") == b"x"
            assert list(work.several(1)) == [b"small", b"x"]
        with pytest.raises(errors.TargetBusy, match="who are you"), ipckit.client(URL, Work) as stranger:
            stranger.echo(b"x")
    assert told[:4] == ["> work.echo", "inner", "work.echo", "<"]
    assert "work.several" in told


class Outer(ipckit.Service):
    """Calls another service from its handlers."""

    def __init__(self, inner: Work) -> None:
        self.inner = inner

    def through(self) -> dict[str, str]:
        return self.inner.said()


def test_a_trace_goes_on_through_every_hop() -> None:
    parent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    with (
        ipckit.Server(URL, Work()),
        ipckit.client(URL, Work) as inner,
        ipckit.Server(f"{URL}-outer", Outer(inner)),
        ipckit.client(f"{URL}-outer", Outer, metadata={"who": "me"}) as outer,
    ):
        assert using(outer, metadata=parent).through() == parent
        assert outer.through() == {}


def test_open_telemetry_is_joined_when_it_is_there() -> None:
    """In a process of its own: its provider is global, and whoever imports it has it for good."""
    trace = """if True:
        import ipckit
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider

        class Here(ipckit.Service):
            def where(self) -> str:
                return f"{trace.get_current_span().get_span_context().trace_id:032x}"

            @ipckit.rpc(inline=False)
            def elsewhere(self) -> str:
                return self.where()

        trace.set_tracer_provider(TracerProvider())
        with ipckit.Server("unix://traced", Here()), ipckit.client("unix://traced", Here) as here:
            with trace.get_tracer("test").start_as_current_span("caller") as span:
                mine = f"{span.get_span_context().trace_id:032x}"
                assert here.where() == mine
                assert here.elsewhere() == mine
            assert here.where() == "0" * 32
    """
    pytest.importorskip("opentelemetry.sdk")
    subprocess.run([sys.executable, "-W", "error", "-c", trace], check=True, timeout=60)


# -- pushes, and what is exposed ---------------------------------------------------------------------------------------------


class Price(msgspec.Struct):
    item: str
    cents: int


def test_a_subscription_survives_its_server() -> None:
    server = ipckit.Server(URL, Work())
    client = ipckit.client(URL)
    subscription = client.subscribe([Price, "Other"])
    assert server.broadcast(Price("tea", 3)) == 1
    assert subscription.recv(10) == Price("tea", 3)
    assert server.broadcast({"any": 1}, type="Other") == 1
    assert subscription.recv(10) == {"any": 1}
    assert server.broadcast({"any": 1}, type="Unheard") == 0
    server.shutdown(0)
    with ipckit.Server(URL, Work()) as server:
        got: list[Any] = []
        thread = threading.Thread(target=lambda: got.append(subscription.recv(30)))
        thread.start()
        assert eventually(lambda: server.broadcast(Price("tea", 4)) > 0)
        thread.join()
        assert got == [Price("tea", 4)]
        subscription.close()
        assert eventually(lambda: server.broadcast(Price("tea", 5)) == 0)
    client.close()


def test_a_subscriber_that_does_not_read_is_told_what_it_lost() -> None:
    with ipckit.Server(URL, Work()) as server, ipckit.client(URL) as client:
        subscription = client.subscribe(Price, backlog=3)
        for number in range(10):
            server.broadcast(Price("tea", number))
        assert client.call("work", "echo", b"x") == b"x"  # which hears of them all
        assert [subscription.recv(0).cents for _ in range(3)] == [7, 8, 9]
        assert subscription.lost == 7
        with pytest.raises(errors.Timeout):
            subscription.recv(0)


def test_services_come_and_go_while_the_server_runs() -> None:
    with ipckit.Server(URL) as server, ipckit.client(URL) as client:
        with pytest.raises(errors.UnknownTarget):
            client.call("work", "echo", b"x")
        server.expose("other", Work())
        assert server.targets() == ("other",)
        assert client.call("other", "echo", b"x") == b"x"
        assert client.proxy(Work, "other").echo(b"y") == b"y"
        server.hide("other")
        with pytest.raises(errors.UnknownTarget):
            client.call("other", "echo", b"x")
        with pytest.raises(errors.UnknownTarget):
            server.hide("other")
        for name in ("", "a.b", "ipckit"):
            with pytest.raises(errors.BadOption):
                server.expose(name, Work())


def test_a_message_type_names_the_method_that_takes_it() -> None:
    class Seller(ipckit.Service):
        def sell(self, price: Price) -> int:
            return price.cents

    with ipckit.Server(URL, Seller()), ipckit.client(URL) as client:
        assert client.call("seller", "Price", {"item": "tea", "cents": 5}) == 5
        assert client.call("seller", "sell", price=Price("tea", 6)) == 6


# -- the end of a server -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hold", "ahold"])
def test_shutdown_lets_calls_finish_and_reports(name: str) -> None:
    service = Work()
    server = ipckit.Server(URL, service)
    with ipckit.client(URL, Work) as work:
        threads, results = in_threads(getattr(work, name), 3)
        waiting(service, 3)
        threading.Timer(0.05, service.free.set).start()
        assert server.shutdown(30) == ShutdownReport(3, 3, 0)
        for thread in threads:
            thread.join()
        assert results == ["done"] * 3
    assert server.wait(0)


@pytest.mark.parametrize("name", ["hold", "ahold"])
def test_shutdown_cuts_off_what_does_not_finish(name: str) -> None:
    service = Work()
    server = ipckit.Server(URL, service)
    with ipckit.client(URL, Work) as work:
        threads, results = in_threads(getattr(work, name), 2)
        waiting(service, 2)
        assert server.shutdown(0.01) == ShutdownReport(2, 0, 2)
        for thread in threads:
            thread.join()
        assert [type(each) for each in results] == [errors.ShuttingDown] * 2
    service.free.set()


def test_shutdown_from_a_loop() -> None:
    service = Work()

    async def main() -> None:
        server = await ipckit.aio.Server(URL, service)
        async with await ipckit.aio.client(URL, Work) as work:
            calls = [asyncio.ensure_future(work.ahold()) for _ in range(2)]
            await asyncio.to_thread(waiting, service, 2)
            service.free.set()
            assert await server.shutdown(30) == ShutdownReport(2, 2, 0)
            assert await asyncio.gather(*calls) == ["done"] * 2
        assert await server.wait(0)

    asyncio.run(main())


def test_a_server_over_a_channel_ends_with_its_client() -> None:
    ours, theirs = ipckit.pair("pipe://")
    server = ipckit.Server(theirs, Work())
    with ipckit.client(ours, Work) as work:
        assert work.echo(b"x") == b"x"
        assert not server.closed
    assert server.wait(10)
    assert eventually(lambda: server.closed)
    with pytest.raises(errors.Closed):
        work.echo(b"x")


def test_a_channel_that_holds_messages_is_not_given_away() -> None:
    ours, theirs = ipckit.pair("unix://", type=int)
    with ours, theirs:
        theirs.send_many(["no int", 5])  # type: ignore[list-item]
        with pytest.raises(errors.SchemaError):
            ours.recv_many(2)
        with pytest.raises(errors.ConfigError, match="a message waits"):
            ipckit.Server(ours, Work())
        assert ours.recv(0) == 5


def test_a_client_that_never_called_lets_its_channel_go() -> None:
    ours, theirs = ipckit.pair("unix://")
    ipckit.Client(ours).close()
    with theirs, pytest.raises(errors.PeerClosed):
        theirs.recv(10)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside the server's threads
def test_a_forked_child_has_neither_the_client_nor_the_server() -> None:
    server = ipckit.Server(URL, Work())
    with ipckit.client(URL, Work) as work:
        assert work.echo(b"x") == b"x"
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with pytest.raises(errors.ForkedError):
                    work.echo(b"x")
                work.close()
                server.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        assert work.echo(b"still") == b"still"
    server.close()


class Diary(ipckit.Service):
    def __init__(self) -> None:
        self.seen = 0

    def note(self, n: int) -> None:
        self.seen += 1


def test_what_was_said_before_a_goodbye_is_heard() -> None:
    """Calls that want no answer, and one that does, from a client that is gone by then."""
    from ipckit.rpc._clientcore import ClientCore

    service = Diary()
    with ipckit.Server(URL, service) as server:
        for number in range(20):
            core = ClientCore()
            core.begin("diary", "note", msgspec.msgpack.encode((0,)), 0.0)
            for n in range(number):
                core.notice("diary", "note", msgspec.msgpack.encode((n,)))
            with ipckit.connect(URL, timeout=10) as channel:
                channel.send_many(list(core.outbox))
        assert eventually(lambda: service.seen == 20 + sum(range(20)))
        assert eventually(lambda: server.stats()["connections_active"] == 0)
        assert server.stats()["in_flight"] == 0


PROGRAM = """if True:
    import asyncio, sys, ipckit, ipckit.aio
    class Echo(ipckit.Service):
        def echo(self, value: int) -> int:
            return value
    ready = lambda server: print("ready", flush=True)
    if sys.argv[1] == "sync":
        print(ipckit.serve("unix://calls", Echo(), ready=ready))
    else:
        print(asyncio.run(ipckit.aio.serve("unix://calls", Echo(), ready=ready)))
"""


@pytest.mark.parametrize("shell", ["sync", "async"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_on_a_signal(shell: str, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM, shell], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with ipckit.client(URL) as client:
            assert client.call("echo", "echo", 5) == 5
            process.send_signal(number)
            said, _ = process.communicate(timeout=30)
    if (shell, number) != ("async", signal.SIGINT):  # asyncio.run turns Ctrl-C into KeyboardInterrupt after the drain
        assert said == "ShutdownReport(in_flight_at_start=0, drained_gracefully=0, forced_closed=0)\n"
        assert process.returncode == 0
    assert not os.path.exists(f"{os.environ['IPCKIT_RUNTIME_DIR']}/calls.sock")


# -- concurrency -------------------------------------------------------------------------------------------------------------


class Slow(ipckit.Service):
    def doze(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def quick(self, value: int) -> int:
        return value

    async def numbers(self, n: int) -> AsyncIterator[int]:
        for number in range(n):
            yield number


def test_a_long_call_holds_up_nobody() -> None:
    with ipckit.Server(URL, Slow()) as server, ipckit.client(URL, Slow) as slow:
        threads, results = in_threads(lambda: slow.doze(0.3), 8)
        assert [slow.quick(number) for number in range(100)] == list(range(100))
        assert len(results) < 8
        for thread in threads:
            thread.join()
        assert results == [0.3] * 8
        assert server.stats()["calls"] >= 108


def test_threads_and_streams_share_one_client() -> None:
    with ipckit.Server(URL, Slow()) as server, ipckit.client(URL, Slow) as slow:
        many = in_threads(lambda: list(slow.numbers(500)), 3)  # type: ignore[call-overload]
        more = in_threads(lambda: [slow.quick(number) for number in range(300)], 3)
        for thread in (*many[0], *more[0]):
            thread.join(60)
        assert many[1] == [list(range(500))] * 3
        assert more[1] == [list(range(300))] * 3
        assert server.stats()["connections_active"] == 1


def test_ctrl_c_cancels_the_call_and_the_client_stays_good() -> None:
    service = Work()
    with ipckit.Server(URL, service), ipckit.client(URL, Work) as work:
        main = threading.main_thread().ident
        assert main is not None

        def interrupt() -> None:
            waiting(service)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            work.hold()
        thread.join()
        service.free.set()
        assert work.echo(b"x") == b"x"


def test_a_cancelled_task_cancels_its_handler() -> None:
    service = Work()

    async def main() -> None:
        async with ipckit.aio.Server(URL, service) as server, await ipckit.aio.client(URL, Work) as work:
            calls = [asyncio.ensure_future(work.ahold()) for _ in range(2)]
            await asyncio.to_thread(waiting, service, 2)
            calls[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await calls[0]
            while server.stats()["in_flight"] > 1:
                await work.echo(b"")  # type: ignore[misc]
            service.free.set()
            assert await calls[1] == "done"

    asyncio.run(asyncio.wait_for(main(), 30))


class Greedy(ipckit.Service):
    """Its stream never waits for anything."""

    def __init__(self) -> None:
        self.given = 0

    async def flood(self) -> AsyncIterator[int]:
        while True:
            self.given += 1
            yield 0

    @ipckit.rpc(inline=True)
    def produced(self) -> int:
        return self.given


def test_a_stream_that_never_waits_leaves_the_loop_to_others() -> None:
    """Its window takes 80,000 of its items; the next call is served long before it is used up."""

    async def main() -> None:
        url = "shm://greedy"
        async with ipckit.aio.Server(url, Greedy()), await ipckit.aio.client(url, Greedy) as greedy:
            stream = greedy.flood()
            assert await anext(stream) == 0
            assert await greedy.produced() < 20_000  # type: ignore[misc]
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_deadline_holds_where_nothing_can_be_sent() -> None:
    """The server's process is stopped, and everything between is full."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, "sync"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        async def main() -> None:
            async with await ipckit.aio.client(URL) as client:
                await client.call("echo", "echo", 5)
                process.send_signal(signal.SIGSTOP)
                for _ in range(2):
                    with pytest.raises(errors.DeadlineExceeded):
                        await client.call("echo", "echo", "x" * 4_000_000, timeout=0.1)

        asyncio.run(asyncio.wait_for(main(), 30))
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def test_garbage_costs_its_own_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "ipckit")
    with ipckit.Server(URL, Work()) as server, ipckit.client(URL, Work) as work:
        for frame in (
            b"\xc1",
            b"\xc1\x02\xff\xff" + b"x" * 20,
            b"\xc1\x63" + b"\0" * 10,
            b"\xc1\x01" + b"\0" * 10 + b"?",
        ):
            with ipckit.connect(URL, timeout=10) as channel:
                channel.send(frame)
                assert list(channel) == []  # it is closed, without a word
            assert work.echo(b"x") == b"x"
        assert server.stats()["protocol_errors"] == 4
        assert eventually(lambda: server.stats()["connections_active"] == 1)


class Quick(ipckit.Service):
    def double(self, number: int) -> int:
        return 2 * number


def test_serving_from_a_loop_ends_with_its_one_client() -> None:
    async def main() -> None:
        ours, theirs = await ipckit.aio.pair("pipe://")
        serving = asyncio.create_task(ipckit.aio.serve(theirs, Quick()))
        async with await ipckit.aio.client(ours, Quick) as client:
            assert await client.double(2) == 4
        assert await asyncio.wait_for(serving, 30) == ShutdownReport(0, 0, 0)

    asyncio.run(main())
