"""A server and clients that know nothing of ipckit, in all dialects at once: threads and event loop, unix and tcp and tls."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import trustme

import ipckit
from ipckit import aio, errors
from ipckit.rpc import ShutdownReport, _reception


class AddRequest(msgspec.Struct):
    a: int
    b: int


class AddResult(msgspec.Struct):
    sum: int


class ListRequest(msgspec.Struct):
    count: int


class PriceUpdate(msgspec.Struct):
    symbol: str
    price: float


@dataclass
class Note:
    text: str


class Calculator(ipckit.Service):
    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.notes: list[str] = []
        self.noted = threading.Event()

    def add(self, req: AddRequest) -> AddResult:
        return AddResult(req.a + req.b)

    def divide(self, a: float, b: float) -> float:
        return a / b

    def slow(self, text: str) -> str:
        self.entered.set()
        self.go.wait(30)
        return text

    def read(self, path: str) -> str:
        with open(path) as file:
            return file.read()

    def fail(self, how: str) -> None:
        raise {"timeout": TimeoutError(), "busy": errors.TargetBusy("later"), "late": errors.DeadlineExceeded("late")}[
            how
        ]

    def list(self, req: ListRequest) -> Iterator[int]:
        yield from range(req.count)

    def broken(self, count: int) -> Iterator[int]:
        yield from range(count)
        raise ValueError("no more")

    def note(self, req: Note) -> None:
        self.notes.append(req.text)
        self.noted.set()

    def repeat(self, text: str, times: int) -> str:
        return text * times

    def growing(self, times: int) -> Iterator[str]:
        for n in range(times):
            yield "x" * 10**n

    def where(self) -> str:
        return threading.current_thread().name

    @ipckit.rpc(inline=True)
    def where_inline(self) -> str:
        return threading.current_thread().name

    def upload(self, parts: Iterator[int]) -> int:
        return sum(parts)


class Ledger(ipckit.Service):
    """What results are sent to."""

    def __init__(self) -> None:
        self.sums: list[int] = []
        self.booked = threading.Event()

    def book(self, result: AddResult) -> None:
        self.sums.append(result.sum)
        self.booked.set()


class AsyncCalculator(ipckit.Service):
    async def add(self, req: AddRequest) -> AddResult:
        return AddResult(req.a + req.b)

    async def list(self, req: ListRequest) -> AsyncIterator[int]:
        for n in range(req.count):
            yield n


class Caller:
    """A client in one dialect, on a plain socket."""

    def __init__(self, url: Any, dialect: str, context: ssl.SSLContext | None = None) -> None:
        self.dialect = dialect
        if url.scheme == "unix":
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(30)
            self.sock.connect(f"{os.environ['IPCKIT_RUNTIME_DIR']}/{url.name}.sock")
        else:
            self.sock = socket.create_connection((url.host.name, url.host.port), 30)
        if context is not None:
            self.sock = context.wrap_socket(self.sock, server_hostname="localhost")
        self.format = "msgpack" if dialect.endswith("msgpack") else "json"

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def seed(self) -> bool:
        return self.dialect.startswith("seed")

    def write(self, value: object) -> bytes:
        return json.dumps(value).encode() if self.format == "json" else msgspec.msgpack.encode(value)

    def say(self, body: object, kind: int = 1) -> None:
        """A body, or for the versioned dialects a frame of this type."""
        payload = b"" if body is None else self.write(body)
        header = b""
        if not self.seed:
            header = bytes((1, kind)) if self.dialect == "v1" else bytes((2, kind, 1 if self.format == "json" else 2))
        self.sock.sendall(struct.pack(">I", len(payload)) + header + payload)

    def ask(self, method: str, payload: object, target: str = "calculator", id: str = "r", **more: object) -> None:
        name = "request_id" if self.seed else "correlation_id"
        body = {"target": target, "message_type": method, "payload": payload, name: id, "expects_reply": True}
        self.say(body | more)

    def exactly(self, size: int) -> bytes:
        got = b""
        while len(got) < size:
            piece = self.sock.recv(size - len(got))
            if not piece:
                raise EOFError(got)
            got += piece
        return got

    def hear(self) -> tuple[int, Any]:
        """Type and body; the seed's bodies have no type: 0."""
        (size,) = struct.unpack(">I", self.exactly(4))
        if self.seed:
            body = self.exactly(size)
            return 0, json.loads(body) if self.format == "json" else msgspec.msgpack.decode(body)
        version, kind, format = self.exactly(3)
        assert version == 2
        body = self.exactly(size)
        if not body:
            return kind, None
        return kind, json.loads(body) if format == 1 else msgspec.msgpack.decode(body)

    def call(self, method: str, payload: object, **more: Any) -> Any:
        self.ask(method, payload, **more)
        return self.hear()[1]

    def error_of(self, method: str, payload: object, **more: Any) -> str:
        """The name of the error, or its code."""
        told = self.call(method, payload, **more)
        assert told["success"] is False
        return told["error"].partition(":")[0] if self.seed else told["error_code"]

    def ended(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True


DIALECTS = ["seed-json", "seed-msgpack", "v1", "v2-json", "v2-msgpack"]


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path_factory.mktemp("r", numbered=True)))


@pytest.fixture
def service() -> Iterator[Calculator]:
    service = Calculator()
    yield service
    service.go.set()


@pytest.fixture
def server(service: Calculator) -> Iterator[ipckit.Server]:
    with ipckit.Server("unix://calc", service) as server:
        yield server


@pytest.fixture(params=DIALECTS)
def caller(request: pytest.FixtureRequest, server: ipckit.Server) -> Iterator[Caller]:
    with Caller(server.url, request.param) as caller:
        yield caller


def test_a_message_type_or_a_method_is_called(caller):
    for name in ("AddRequest", "add", "calculator.AddRequest"):
        assert caller.call(name, {"a": 5, "b": 3})["payload"] == {"sum": 8}
    assert caller.call("divide", {"a": 1, "b": 2})["payload"] == 0.5


class Orders(ipckit.Service):
    def make(self, order: Note) -> str:
        return "made"

    def cancel(self, order: Note) -> str:
        return "cancelled"

    def count(self, request: ListRequest) -> int:
        return request.count


def test_a_type_that_several_methods_take_names_none_of_them():
    with ipckit.Server("unix://calc", Orders()) as server, Caller(server.url, "v2-json") as caller:
        assert caller.error_of("Note", {"text": "tea"}, target="orders") == "UNKNOWN_MESSAGE_TYPE"
        assert caller.call("make", {"text": "tea"}, target="orders")["payload"] == "made"
        assert caller.call("ListRequest", {"count": 2}, target="orders")["payload"] == 2
        assert not server.is_registered("Note")
        assert {"cancel", "make", "ListRequest"} <= set(server.registered_types())


def test_errors_have_the_names_that_their_clients_know(caller):
    if caller.seed:
        unknown, nobody, unreadable, oserror = "UnknownMessageType", "AgentNotFound", "SerializationError", "IoError"
        protocol, remote = "ProtocolError", "RemoteError"
    else:
        unknown, nobody, unreadable, oserror = (
            "UNKNOWN_MESSAGE_TYPE",
            "ACTOR_NOT_FOUND",
            "SERIALIZATION_ERROR",
            "IO_ERROR",
        )
        protocol, remote = "PROTOCOL_ERROR", "REMOTE_ERROR"
    assert caller.error_of("Nope", {}) == unknown
    assert caller.error_of("AddRequest", {}, target="nobody") == nobody
    assert caller.error_of("AddRequest", {"a": "five", "b": 3}) == unreadable
    assert caller.error_of("read", {"path": "/nowhere"}) == oserror
    assert caller.error_of("divide", {"a": 1, "b": 0}) == remote
    assert caller.error_of("ListRequest", {"count": 1}) == protocol  # it was not asked for a stream
    assert caller.error_of("upload", {}) == protocol
    assert caller.error_of("fail", {"how": "busy"}) == ("TargetBusy" if caller.seed else "TARGET_BUSY")
    for how in ("timeout", "late"):
        assert caller.error_of("fail", {"how": how}) == ("Timeout" if caller.seed else "TIMEOUT")
    caller.say({"correlation_id": "x", "request_id": "x"})
    _kind, told = caller.hear()
    assert "SerializationError" in told["error"] if caller.seed else told["error_code"] == "SERIALIZATION_ERROR"
    assert caller.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}  # none of this cost the connection


def test_an_answer_that_is_too_large_fails_its_call_and_no_other(service):
    with ipckit.Server("unix://calc?limit=64KiB", service) as server:
        for dialect in DIALECTS:
            with Caller(server.url, dialect) as caller:
                protocol = "ProtocolError" if caller.seed else "PROTOCOL_ERROR"
                assert caller.error_of("repeat", {"text": "x", "times": 70_000}) == protocol
                caller.ask("growing", {"times": 7}, expects_stream=True)
                while "error" not in (told := caller.hear()[1]):
                    assert len(told["payload"]) < 64 << 10
                assert told["error"].startswith("ProtocolError" if caller.seed else "")
                assert told.get("error_code", "STREAM_ERROR") in ("STREAM_ERROR", "PROTOCOL_ERROR")
                caller.say({"message_types": ["Big"], "request_id": "s", "correlation_id": "s"}, 6)
                if caller.dialect != "v1":
                    caller.hear()
                    server.broadcast("x" * 70_000, type="Big")
                    assert caller.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}


def test_streams(caller):
    caller.ask("ListRequest", {"count": 5}, expects_stream=True)
    frames = [caller.hear()[1] for _ in range(5 if caller.seed else 6)]
    assert [each["sequence"] for each in frames] == list(range(len(frames)))
    assert [each["is_final"] for each in frames] == [False] * (len(frames) - 1) + [True]
    assert [each["payload"] for each in frames[:5]] == [0, 1, 2, 3, 4]
    caller.ask("ListRequest", {"count": 0}, expects_stream=True)
    assert caller.hear()[1]["is_final"] is True
    caller.ask("add", {"a": 1, "b": 2}, expects_stream=True)  # one value
    assert caller.hear()[1]["payload"] == {"sum": 3}
    if not caller.seed:
        assert caller.hear()[1]["is_final"] is True
    caller.ask("broken", {"count": 1}, expects_stream=True)
    assert caller.hear()[1]["payload"] == 0
    end = caller.hear()[1]
    assert "ValueError: no more" in end["error"]
    assert caller.seed or end["error_code"] == "STREAM_ERROR"


def test_fire_and_forget(caller, service):
    caller.ask("Note", {"text": "hello"}, expects_reply=False)
    if not caller.seed:
        assert caller.hear()[1]["payload"] == {"status": "delivered"}
        assert caller.error_of("Note", {"text": "x"}, target="nobody", expects_reply=False) == "ACTOR_NOT_FOUND"
    assert service.noted.wait(30)
    assert service.notes == ["hello"]
    assert caller.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}  # the seed's had no reply in between


def test_who_fires_and_leaves_is_heard_all_the_same(server, service):
    for dialect in DIALECTS:
        service.noted.clear()
        with Caller(server.url, dialect) as caller:
            caller.ask("Note", {"text": dialect}, expects_reply=False)
        assert service.noted.wait(30)
    assert service.notes == DIALECTS


def test_subscriptions(caller, server):
    if caller.dialect == "v1":
        caller.say({"correlation_id": "s", "message_types": ["PriceUpdate"]}, 6)
        told = caller.hear()[1]
        assert told["error_code"] == "PROTOCOL_ERROR"  # version 1 has no subscriptions
        assert caller.ended()
        return
    server.register(PriceUpdate)
    caller.say({"message_types": ["PriceUpdate", "Trade"], "request_id": "s", "correlation_id": "s"}, 6)
    told = caller.hear()[1]
    assert (told["payload"] if caller.seed else told)["subscribed_types"] == ["PriceUpdate", "Trade"]
    assert server.broadcast(PriceUpdate("ACME", 1.5)) == 1
    assert server.broadcast("nothing", type="Other") == 0
    kind, push = caller.hear()
    assert (kind, push["message_type"], push["payload"]) == (
        0 if caller.seed else 5,
        "PriceUpdate",
        {"symbol": "ACME", "price": 1.5},
    )
    assert abs(push["timestamp" if caller.seed else "timestamp_ms"] / 1000 - time.time()) < 60
    if caller.seed:
        assert push["notification_type"] == "subscription"
    caller.say({"message_types": [], "unsubscribe": True, "request_id": "u", "correlation_id": "u"}, 7)
    told = caller.hear()[1]
    assert (told["payload"] if caller.seed else told)["subscribed_types"] == []
    assert server.broadcast(PriceUpdate("ACME", 2.5)) == 0


def test_discovery_and_heartbeat(server):
    server.register(PriceUpdate, "Trade")
    with Caller(server.url, "v2-json") as caller:
        caller.sock.sendall(bytes.fromhex("00000000020401"))
        assert caller.exactly(7).hex() == "00000000020401"
        caller.say({"correlation_id": "d"}, 8)
        kind, told = caller.hear()
        assert (kind, [each["name"] for each in told["actors"]]) == (2, ["calculator"])
        assert told["message_types"] == list(server.registered_types())
        assert {"AddRequest", "divide", "PriceUpdate", "Trade", "HealthCheck"} <= set(told["message_types"])
        assert told["protocol_version"]["min_supported"] == 1
        server.expose("other", Ledger())
        server.hide("calculator")
        caller.say({"correlation_id": "d", "include_message_types": False}, 8)
        told = caller.hear()[1]
        assert [each["name"] for each in told["actors"]] == ["other"]
        assert "message_types" not in told
        assert caller.error_of("add", {"a": 1, "b": 2}) == "ACTOR_NOT_FOUND"
    with Caller(server.url, "v1") as caller:
        caller.sock.sendall(bytes.fromhex("000000000104"))
        assert caller.exactly(7).hex() == "00000000020401"
    assert server.is_registered("AddResult")
    assert server.is_registered("AddRequest") is False  # hidden with its target
    assert server.is_registered("PriceUpdate") is server.is_registered("book") is True


def test_health(caller):
    assert caller.call("HealthCheck", {}, target="ipckit")["payload"] == {"status": "ok"}


def test_reply_to_a_target_or_to_subscribers(caller, server):
    ledger = Ledger()
    server.expose("ledger", ledger)
    assert caller.call("add", {"a": 5, "b": 3}, reply_to="ledger")["payload"] == {"status": "delivered"}
    assert ledger.booked.wait(30)
    assert ledger.sums == [8]
    nobody = "AgentNotFound" if caller.seed else "ACTOR_NOT_FOUND"
    unknown = "UnknownMessageType" if caller.seed else "UNKNOWN_MESSAGE_TYPE"
    assert caller.error_of("add", {"a": 5, "b": 3}, reply_to="inbox") == nobody
    assert caller.error_of("divide", {"a": 5, "b": 3}, reply_to="ledger") == unknown  # it takes no float
    with Caller(server.url, "seed-json") as inbox:
        inbox.say({"message_types": ["inbox"], "request_id": "s"})
        inbox.hear()
        assert caller.call("add", {"a": 5, "b": 3}, reply_to="inbox")["payload"] == {"status": "delivered"}
        assert inbox.hear()[1]["payload"] == {"sum": 8}


def test_a_slow_call_holds_up_nobody_on_its_connection(server, service):
    with Caller(server.url, "v2-json") as caller:
        caller.ask("slow", {"text": "at last"}, id="slow")
        assert service.entered.wait(30)
        assert caller.call("add", {"a": 1, "b": 1}, id="quick")["correlation_id"] == "quick"
        caller.ask("slow", {"text": "too late"}, id="late", response_timeout_ms=20)
        kind, told = caller.hear()
        assert (kind, told["correlation_id"], told["error_code"]) == (3, "late", "TIMEOUT")
        service.go.set()
        assert caller.hear()[1]["correlation_id"] == "slow"


def test_what_is_marked_inline_runs_on_the_thread_that_receives(caller):
    assert "watcher" not in caller.call("where", {})["payload"]
    assert "watcher" in caller.call("where_inline", {})["payload"]


def test_without_ids_answers_come_in_order_and_a_stream_waits_for_its_turn(server, service):
    with Caller(server.url, "seed-json") as caller:
        envelope = {"target": "calculator", "expects_reply": True}
        caller.say(envelope | {"message_type": "slow", "payload": {"text": "first"}})
        assert service.entered.wait(30)
        caller.say(envelope | {"message_type": "add", "payload": {"a": 1, "b": 1}})
        caller.say(envelope | {"message_type": "ListRequest", "payload": {"count": 3}, "expects_stream": True})
        caller.say(envelope | {"message_type": "Nope", "payload": {}})
        assert caller.call("add", {"a": 2, "b": 2}, id="named")["payload"] == {"sum": 4}  # it need not wait
        service.go.set()
        assert [caller.hear()[1]["payload"] for _ in range(5)] == ["first", {"sum": 2}, 0, 1, 2]
        assert caller.hear()[1]["error"] == "UnknownMessageType: Nope is not registered"


def test_all_dialects_at_once_on_one_port(service):
    with ipckit.Server("tcp://127.0.0.1:0", service) as server:
        callers = [Caller(server.url, dialect) for dialect in DIALECTS]
        client = ipckit.client(server.url, Calculator)
        for _ in range(3):
            for caller in callers:
                caller.ask("add", {"a": 5, "b": 3})
            assert client.add(AddRequest(5, 3)) == AddResult(8)
            for caller in callers:
                assert caller.hear()[1]["payload"] == {"sum": 8}
        for caller in callers:
            caller.sock.close()
        client.close()


def test_over_tls(service, tmp_path):
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with ipckit.Server(f"tls://127.0.0.1:0?cert={tmp_path / 'server.pem'}", service) as server:
        for dialect in DIALECTS:
            with Caller(server.url, dialect, context) as caller:
                assert caller.call("add", {"a": 5, "b": 3})["payload"] == {"sum": 8}
                caller.ask("ListRequest", {"count": 3}, expects_stream=True)
                while not caller.hear()[1]["is_final"]:
                    pass
                told_of_too_large(caller)


def test_from_an_event_loop():
    def clients(url: Any) -> None:
        for dialect in DIALECTS:
            with Caller(url, dialect) as caller:
                assert caller.call("AddRequest", {"a": 5, "b": 3})["payload"] == {"sum": 8}
                caller.ask("ListRequest", {"count": 3}, expects_stream=True)
                while not caller.hear()[1]["is_final"]:
                    pass
                assert caller.error_of("Nope", {}) in ("UnknownMessageType", "UNKNOWN_MESSAGE_TYPE")
                assert caller.call("add", {"a": 5, "b": 3}, reply_to="ledger")["payload"] == {"status": "delivered"}

    async def main() -> Ledger:
        ledger = Ledger()
        async with aio.Server(
            "unix://calc", AsyncCalculator(), ledger, burst_size=100, requests_per_second=1000
        ) as server:
            server.expose("calculator", AsyncCalculator())
            await asyncio.to_thread(clients, server.url)
            assert server.stats()["rate_limited"] == 0
        return ledger

    assert asyncio.run(main()).sums == [8] * len(DIALECTS)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_one_too_many_is_told_in_its_own_dialect(service, monkeypatch):
    monkeypatch.setattr(_reception, "_MOMENT", 30)
    with ipckit.Server("unix://calc", service, max_connections=1) as server, Caller(server.url, "v1") as first:
        assert first.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}
        for dialect in DIALECTS:
            with Caller(server.url, dialect) as caller:
                told = caller.call("add", {"a": 1, "b": 1})
                if caller.seed:
                    assert told["error"] == "ConnectionClosed: the server has 1 connections already"
                else:
                    assert told["correlation_id"] == "__acton_connection_rejected__"
                    assert told["error_code"] == "CONNECTION_LIMIT_REACHED"
                    assert told["payload"] == {"limit": 1}
                assert caller.ended()
        with pytest.raises(errors.TargetBusy, match="1 connections already"):
            ipckit.client(server.url, Calculator)
        monkeypatch.setattr(_reception, "_MOMENT", 0.01)
        with Caller(server.url, "v2-json") as caller:  # it says nothing: it is told all the same
            assert caller.hear()[1]["error_code"] == "CONNECTION_LIMIT_REACHED"
            assert caller.ended()
        assert first.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}
        assert server.stats()["connections_refused"] == len(DIALECTS) + 2
        assert server.stats()["active_connections"] == 1


def test_the_rate_limit_answers_and_lets_go_on(service):
    with ipckit.Server("unix://calc", service, requests_per_second=0.001, burst_size=2) as server:
        for dialect in DIALECTS:
            with Caller(server.url, dialect) as caller:
                for _ in range(2):
                    assert caller.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}
                for _ in range(3):
                    assert caller.error_of("add", {}) in ("RateLimited", "RATE_LIMITED")
                if not caller.seed:
                    caller.say(None, 4)
                    assert caller.hear()[1]["error_code"] == "RATE_LIMITED"
        with ipckit.client(server.url, Calculator) as client:
            for _ in range(2):
                client.add(AddRequest(1, 1))
            with pytest.raises(errors.RateLimited) as caught:
                client.add(AddRequest(1, 1))
            assert caught.value.retry_after is not None
        assert server.stats()["rate_limited"] >= 3 * len(DIALECTS) + 4


def test_who_fires_and_forgets_is_held_to_its_limit_too(service):
    with ipckit.Server("unix://calc", service, max_per_connection=2) as server, Caller(server.url, "v2-json") as caller:
        for _ in range(2):
            caller.ask("slow", {"text": "x"}, expects_reply=False)
            assert caller.hear()[1]["payload"] == {"status": "delivered"}
        assert caller.error_of("slow", {"text": "x"}, expects_reply=False) == "TARGET_BUSY"
        with Caller(server.url, "seed-json") as other:
            assert other.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}
        service.go.set()
        assert server.stats()["backpressure_rejections"] == 1
        caller.say({"correlation_id": "s", "message_types": [str(n) for n in range(10_001)]}, 6)
        assert caller.hear()[1]["error_code"] == "TARGET_BUSY"


def test_who_says_nothing_is_let_go(service):
    with ipckit.Server("unix://calc", service, connection_timeout=0.3) as server:
        with Caller(server.url, "v2-json") as mute:
            assert mute.ended()
        with Caller(server.url, "seed-json") as caller:
            caller.sock.sendall(b"\0\0\0\x50{")  # slowly, slowly
            assert caller.hear()[1]["error"].startswith("ConnectionClosed: ")
            assert caller.ended()
        with ipckit.client(server.url, Calculator) as client, Caller(server.url, "v2-json") as patient:
            patient.ask("slow", {"text": "x"})
            client.add(AddRequest(1, 1))
            with Caller(server.url, "v2-json") as mute:
                assert mute.ended()
            service.go.set()
            assert patient.hear()[1]["payload"] == "x"  # it was waiting for this, not silent
            assert client.add(AddRequest(1, 1)) == AddResult(2)
        assert server.stats()["connections_idle_closed"] >= 3


def test_who_is_slow_is_not_silent(server):
    """What moves on a connection counts, not only what is complete."""
    with Caller(server.url, "seed-json") as caller:
        caller.call("divide", {"a": 1, "b": 2})
        (conn,) = server._engine._connections

        def moved(since: float) -> None:
            deadline = time.monotonic() + 30
            while conn.active <= since:
                assert time.monotonic() < deadline
                time.sleep(0.001)

        body = caller.write(
            {"target": "calculator", "message_type": "repeat", "expects_reply": True}
            | {"payload": {"text": "x", "times": 12 << 20}, "request_id": "y" * 1000}
        )
        for piece in (struct.pack(">I", len(body)) + body[:400], body[400:800], body[800:]):
            before = conn.active
            caller.sock.sendall(piece)
            moved(before)
        (size,) = struct.unpack(">I", caller.exactly(4))
        for _ in range(3):  # it goes as far as the socket takes it
            before = conn.active
            size -= len(caller.exactly(2 << 20))
            moved(before)
        assert len(caller.exactly(size)) == size
        assert caller.call("divide", {"a": 1, "b": 2})["payload"] == 0.5


@pytest.mark.parametrize(
    "setting",
    [
        {"connection_timeout": 0},
        {"connection_timeout": float("nan")},
        {"requests_per_second": 0},
        {"requests_per_second": "fast"},
        {"requests_per_second": 1, "burst_size": -1},
        {"requests_per_second": 1, "burst_size": 0.5},
        {"burst_size": 10},  # of what?
        {"max_connections": 0},
        {"max_concurrent": "5"},
        {"max_per_connection": True},
        {"workers": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("url", ["unix://calc", "grpc+unix://calc"])
def test_settings_that_mean_nothing_are_refused(setting, service, url):
    with pytest.raises(errors.BadOption, match=next(reversed(setting))):
        ipckit.Server(url, service, **setting)
    with pytest.raises(errors.BadOption, match=next(reversed(setting))):
        aio.Server(url, service, **setting)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\1\x00",
        b"\0\0\0\1x",
        b"\0\0\0\1\x03",
        b"\xff\xff\xff\xff{",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\0\x02\xff\x01",
        b"\0\0\0\2\xc1\x01",
        b"\0\0\0\0{",
    ],
)
def test_a_first_frame_that_is_none_costs_that_connection(server, sent, caplog):
    with Caller(server.url, "v2-json") as healthy:
        healthy.call("add", {"a": 1, "b": 1})
        with Caller(server.url, "v2-json") as stranger:
            stranger.sock.sendall(sent)
            if sent[4:5] in (b"\x02", b"\x03"):
                expected = "PROTOCOL_ERROR" if sent[4:5] == b"\x02" else "UNSUPPORTED_PROTOCOL_VERSION"
                assert stranger.hear()[1]["error_code"] == expected
            while not stranger.ended():
                pass
        assert healthy.call("add", {"a": 1, "b": 1})["payload"] == {"sum": 2}
        if sent[:4] != b"\xff\xff\xff\xff":  # a goodbye: somebody who came and went
            assert server.stats()["protocol_errors"] == 1
            assert server.stats()["errors"] == 1
            assert "lost a client" in caplog.text


def told_of_too_large(caller: Caller) -> None:
    begins = b"{\0\0" if caller.format == "json" else b"\x80\0\0"
    if not caller.seed:
        begins = b"\1\1\0" if caller.dialect == "v1" else b"\2\1" + bytes((1 if caller.format == "json" else 2,))
    caller.sock.sendall(b"\x7f\0\0\0")
    with suppress(BrokenPipeError):  # it may have been enough
        caller.sock.sendall(begins)
    told = caller.hear()[1]
    assert "above the limit of" in told["error"]
    assert told["error"].startswith("ProtocolError: ") if caller.seed else told["error_code"] == "PROTOCOL_ERROR"
    assert caller.ended()


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_who_sends_a_frame_that_is_too_large_is_told_so(caller, first):
    if not first:
        caller.call("divide", {"a": 1, "b": 2})
    told_of_too_large(caller)


def test_strangers_do_not_fill_the_log(server, caplog):
    many = 200
    for _ in range(many):
        with Caller(server.url, "v2-json") as stranger:
            stranger.sock.sendall(b"\0\0\0\1x")
            assert stranger.ended()
    assert server.stats()["protocol_errors"] == many
    assert 1 <= caplog.text.count("lost a client") < many


def test_a_version_that_changes_is_told_so(server):
    with Caller(server.url, "v2-json") as caller:
        caller.call("add", {"a": 1, "b": 1})
        caller.sock.sendall(b"\0\0\0\0\x01\x04\x01")
        assert caller.hear()[1]["error_code"] == "UNSUPPORTED_PROTOCOL_VERSION"
        assert caller.ended()


# -- statistics, and the end -------------------------------------------------------------------------------------------


def test_statistics_under_both_sets_of_names(server):
    with Caller(server.url, "v2-json") as caller:
        caller.say({"correlation_id": "s", "message_types": ["PriceUpdate"]}, 6)
        caller.hear()
        server.broadcast(PriceUpdate("ACME", 1))
        caller.hear()
        caller.call("add", {"a": 1, "b": 1})
        caller.call("divide", {"a": 1, "b": 0})
        deadline = time.monotonic() + 30
        while server.stats()["in_flight_requests"] and time.monotonic() < deadline:
            time.sleep(0.001)  # the answer is sent a moment before the call is counted as over
        stats = server.stats()
        seed = {"active_connections": 1, "messages_processed": 2, "errors": 1}
        versioned = {
            "connections_accepted": 1,
            "connections_active": 1,
            "messages_received": 3,
            "messages_routed": 2,
            "errors": 1,
            "rate_limited": 0,
            "backpressure_rejections": 0,
            "shutdown_rejections": 0,
            "in_flight_requests": 0,
            "subscriptions_processed": 1,
            "push_notifications_sent": 1,
        }
        assert {name: stats[name] for name in seed | versioned} == seed | versioned


def test_a_shutdown_drains_and_refuses_and_reports(service):
    server = ipckit.Server("unix://calc", service)
    path = f"{os.environ['IPCKIT_RUNTIME_DIR']}/calc.sock"
    with (
        Caller(server.url, "v2-json") as caller,
        Caller(server.url, "seed-json") as seed,
        Caller(server.url, "v1") as mute,  # it begins to speak when the server is about to end
    ):
        seed.call("add", {"a": 1, "b": 1})
        caller.ask("slow", {"text": "x"}, id="slow")
        assert service.entered.wait(30)
        reports: list[ShutdownReport] = []
        ending = threading.Thread(target=lambda: reports.append(server.shutdown(30)))
        ending.start()
        deadline = time.monotonic() + 30
        while caller.call("add", {"a": 1, "b": 1}).get("error_code") != "SHUTTING_DOWN":
            assert time.monotonic() < deadline
        assert seed.error_of("add", {"a": 1, "b": 1}) == "ConnectionClosed"
        assert mute.error_of("add", {"a": 1, "b": 1}) == "SHUTTING_DOWN"
        assert server.stats()["shutdown_rejections"] == 3
        service.go.set()
        assert caller.hear()[1]["payload"] == "x"
        ending.join(30)
        assert reports == [ShutdownReport(1, 1, 0)]
        assert caller.ended()
        assert seed.ended()
    assert not os.path.exists(path)


def test_a_shutdown_cuts_off_what_takes_too_long(service):
    server = ipckit.Server("unix://calc", service)
    with Caller(server.url, "v2-json") as caller:
        caller.ask("slow", {"text": "x"})
        assert service.entered.wait(30)
        reports: list[ShutdownReport] = []
        ending = threading.Thread(target=lambda: reports.append(server.shutdown(0.01)))
        ending.start()
        assert caller.hear()[1]["error_code"] == "SHUTTING_DOWN"
        service.go.set()
        ending.join(30)
        assert reports == [ShutdownReport(1, 0, 1)]


def test_a_live_socket_is_an_error_and_a_stale_one_is_replaced(server, service):
    with pytest.raises(errors.AddressInUse):
        ipckit.Server("unix://calc", service)
    left = f"{os.environ['IPCKIT_RUNTIME_DIR']}/left.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(left)
    with ipckit.Server("unix://left", service) as second, Caller(second.url, "seed-json") as caller:
        assert caller.call("add", {"a": 1, "b": 1})["success"]


EXHAUSTED = """
import os, resource, sys, ipckit
from tests.unit.test_listener import Calculator
with ipckit.Server(sys.argv[1], Calculator()) as server:
    taken = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 8, taken + 8))
    print(server.url.host.port, flush=True)
    sys.stdin.readline()
"""


def test_a_server_without_descriptors_serves_on_when_it_has_some_again():
    """More come than it may open. None of its own cleaning up needs one."""
    command = [sys.executable, "-c", EXHAUSTED, "tcp://127.0.0.1:0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            place = ("127.0.0.1", int(process.stdout.readline()))
            many = [socket.create_connection(place) for _ in range(40)]
            assert b"cannot accept" in process.stderr.readline()
            for each in many:
                each.close()
            with ipckit.client(f"tcp://127.0.0.1:{place[1]}", Calculator, timeout=30) as client:
                assert client.add(AddRequest(1, 1)) == AddResult(2)
        finally:
            process.kill()


def test_a_server_that_cannot_go_on_ends_and_says_so(service, caplog):
    def broken(_: object) -> None:
        raise OSError("no more of this")

    with ipckit.Server("unix://calc", service) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(server._engine), "_settle", broken)
        with Caller(server.url, "seed-json"):
            assert server.wait(30)
        assert "OSError: no more of this" in caplog.text

    async def main() -> None:
        async with aio.Server("unix://calc", service) as server:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(server._engine), "_settle", broken)
                with Caller(server.url, "seed-json"):
                    assert await server.wait(30)
        assert caplog.text.count("OSError: no more of this") == 2

    asyncio.run(main())
