"""gRPC as others speak it: stock clients and servers, compiled stubs, reflection, health, statuses; and its ends and limits."""

from __future__ import annotations

import asyncio
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit.rpc import current, using
from ipckit.rpc.events import Failure
from ipckit.testing.conformance._base import eventually

pytest.importorskip("grpc")
import grpc
import trustme
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

HERE = "grpc://127.0.0.1:0"


class Order(msgspec.Struct):
    item: str
    qty: int = 1


class Receipt(msgspec.Struct):
    lines: list[Order]
    total: int


class Shop(ipckit.Service):
    def __init__(self) -> None:
        self.free = threading.Event()
        self.held = threading.Event()

    def price(self, item: str, qty: int = 1) -> int:
        return len(item) * qty

    def order(self, order: Order) -> Receipt:
        return Receipt([order], order.qty * 3)

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    def total(self, orders: Iterator[Order]) -> int:
        return sum(order.qty for order in orders)

    def scaled(self, numbers: Iterator[int], by: int) -> Iterator[int]:
        for number in numbers:
            yield number * by

    def fail(self) -> None:
        raise errors.RateLimited("slowly", retry_after=1.5)

    def hold(self) -> None:
        self.held.set()
        self.free.wait(20)

    def who(self) -> dict[str, str]:
        return dict(current().metadata)


@pytest.fixture
def shop() -> Iterator[Shop]:
    made = Shop()
    yield made
    made.free.set()


@pytest.fixture(params=["threads", "loop"])
def server(request: pytest.FixtureRequest, shop: Shop) -> Iterator[ipckit.Url]:
    """Where a server of either kind is."""
    if request.param == "threads":
        with ipckit.Server(HERE, shop) as made:
            yield made.url
            shop.free.set()
    else:
        with on_a_loop(shop) as url:
            yield url
            shop.free.set()


@contextmanager
def on_a_loop(*services: object) -> Iterator[ipckit.Url]:
    ready, over = threading.Event(), []

    async def main() -> None:
        async with ipckit.aio.Server(HERE, *services) as made:
            stop = asyncio.Event()
            over.extend([made.url, asyncio.get_running_loop(), stop])
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield over[0]
    finally:
        over[1].call_soon_threadsafe(over[2].set)
        thread.join(20)
        assert not thread.is_alive()


# -- stock clients -----------------------------------------------------------------------------------------------------


class Reflected:
    """A stock client that knows what the server tells by reflection, and nothing else."""

    def __init__(self, channel: grpc.Channel, service: str) -> None:
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)
        self.service = self.pool.FindServiceByName(service)
        self.channel = channel

    def __getattr__(self, name: str):
        method = self.service.methods_by_name[name]
        request, response = (message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type))
        kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
        call = getattr(self.channel, kind)(
            f"/{self.service.full_name}/{name}", request.SerializeToString, response.FromString
        )
        return call, request


def test_a_stock_client_calls_by_reflection(server: ipckit.Url) -> None:
    with grpc.insecure_channel(str(server.host)) as channel:
        stock = Reflected(channel, "shop.Shop")
        assert {"shop.Shop", "ipckit.Info", "grpc.health.v1.Health"} <= set(stock.database.get_services())
        call, request = stock.Price
        assert call(request(item="tea")).result == 3  # the default of `qty` holds
        assert call(request(item="tea", qty=0)).result == 0
        call, request = stock.Order
        receipt = call(request(item="tea", qty=2))
        assert (receipt.total, receipt.lines[0].item) == (6, "tea")
        call, request = stock.Count
        assert [each.result for each in call(request(n=3))] == [0, 1, 2]
        call, request = stock.Total
        assert call(iter([request(item="a", qty=2), request(item="b")])).result == 3
        call, request = stock.Scaled
        assert [each.result for each in call(iter([request(by=3, numbers=1), request(numbers=2)]))] == [3, 6]


def test_reflection_has_the_name_that_newer_tools_ask_for(server: ipckit.Url) -> None:
    from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse

    with grpc.insecure_channel(str(server.host)) as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            ServerReflectionRequest.SerializeToString,
            ServerReflectionResponse.FromString,
        )
        (answer,) = ask(iter([ServerReflectionRequest(list_services="")]))
    assert "shop.Shop" in {each.name for each in answer.list_services_response.service}


def test_errors_have_codes_and_details(server: ipckit.Url) -> None:
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    with grpc.insecure_channel(str(server.host)) as channel:
        call, request = Reflected(channel, "shop.Shop").Fail
        with pytest.raises(grpc.RpcError) as caught:
            call(request())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        details = rpc_status.from_call(caught.value).details
        assert details[0].Unpack(info)
        assert details[1].Unpack(retry)
        assert (info.reason, info.domain) == ("RATE_LIMITED", "ipckit")
        assert retry.retry_delay.ToMilliseconds() == 1500
        garbage = channel.unary_unary("/shop.Shop/Price")
        with pytest.raises(grpc.RpcError) as caught:
            garbage(b"\xff\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/shop.Shop/Nothing")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with ipckit.client(server, Shop) as client:
        with pytest.raises(errors.RateLimited, match="slowly") as limited:
            client.fail()
        assert limited.value.retry_after == 1.5


def test_a_contract_is_served_by_a_class_of_another_name() -> None:
    class Prices(ipckit.Service):
        def price(self, item: str) -> int: ...

    class Corner(Prices):
        def price(self, item: str) -> int:
            return len(item)

    with ipckit.Server(HERE) as server:
        server.expose("prices", Corner())
        with ipckit.client(server.url, Prices, timeout=10) as prices:
            assert prices.price("tea") == 3


def test_health(shop: Shop) -> None:
    serving = health_pb2.HealthCheckResponse
    with ipckit.Server(HERE, shop) as made, grpc.insecure_channel(str(made.url.host)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def status(name: str) -> int:
            return stub.Check(health_pb2.HealthCheckRequest(service=name)).status

        assert status("") == status("shop.Shop") == serving.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            status("nobody.Nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        made.expose("other", shop)
        assert status("other.Shop") == serving.SERVING
        made.hide("other")
        assert status("other.Shop") == serving.NOT_SERVING


def test_what_is_hidden_is_gone_and_what_replaces_it_is_called(server: ipckit.Url, shop: Shop) -> None:
    with ipckit.Server(HERE, shop) as made, ipckit.client(made.url, Shop) as client:
        assert client.price("tea") == 3
        made.hide("shop")
        with pytest.raises(errors.UnknownTarget):
            client.price("tea")
        with pytest.raises(errors.UnknownTarget):
            made.hide("shop")
        made.expose("shop", shop)
        assert client.price("tea") == 3


# -- compiled stubs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    """What protoc and its plugin make of the file that we write: (messages, stubs)."""
    protoc = pytest.importorskip("grpc_tools.protoc", exc_type=ImportError)
    from ipckit.rpc.protobuf import schema_of

    directory = tmp_path_factory.mktemp("compiled")
    (directory / "compiledshop.proto").write_text(schema_of(Shop, "compiled").text())
    well_known = Path(protoc.__file__).parent / "_proto"
    arguments = ["", f"-I{directory}", f"-I{well_known}", f"--python_out={directory}", f"--grpc_python_out={directory}"]
    assert protoc.main([*arguments, "compiledshop.proto"]) == 0
    sys.path.insert(0, str(directory))
    try:
        yield importlib.import_module("compiledshop_pb2"), importlib.import_module("compiledshop_pb2_grpc")
    finally:
        sys.path.remove(str(directory))


@pytest.fixture
def servicer(compiled: tuple) -> object:
    messages, stubs = compiled

    class Servicer(stubs.ShopServicer):
        def Price(self, request, context):
            return messages.PriceResponse(result=len(request.item) * (request.qty if request.HasField("qty") else 1))

        def Count(self, request, context):
            for number in range(request.n):
                yield messages.CountResponse(result=number)

    return Servicer()


def test_a_compiled_stub_calls_us(compiled: tuple, shop: Shop) -> None:
    messages, stubs = compiled
    with ipckit.Server(HERE) as made:
        made.expose("compiled", shop)
        with grpc.insecure_channel(str(made.url.host)) as channel:
            stub = stubs.ShopStub(channel)
            assert stub.Price(messages.PriceRequest(item="tea", qty=2)).result == 6
            assert stub.Order(messages.Order(item="tea")).total == 3
            assert [each.result for each in stub.Count(messages.CountRequest(n=2))] == [0, 1]


def test_a_compiled_servicer_is_served_and_called_by_contract(servicer: object) -> None:
    with ipckit.Server(HERE) as made:
        made.expose("compiled", servicer)
        assert made.targets() == ("compiled",)
        with ipckit.client(made.url, Shop, target="compiled") as client:
            assert (client.price("tea"), list(client.count(2))) == (3, [0, 1])
            with pytest.raises(errors.UnknownMethod):
                client.order(Order("tea"))
        with grpc.insecure_channel(str(made.url.host)) as channel:
            assert "compiled.Shop" in Reflected(channel, "compiled.Shop").database.get_services()
        made.hide("compiled")
        assert made.targets() == ()


def test_a_stock_server_is_called_by_contract(compiled: tuple, servicer: object) -> None:
    from concurrent.futures import ThreadPoolExecutor

    _, stubs = compiled
    stock = grpc.server(ThreadPoolExecutor(4))
    stubs.add_ShopServicer_to_server(servicer, stock)
    port = stock.add_insecure_port("127.0.0.1:0")
    stock.start()
    try:
        with ipckit.client(f"grpc://127.0.0.1:{port}", Shop, target="compiled") as client:
            assert (client.price("tea", 2), list(client.count(2))) == (6, [0, 1])
    finally:
        stock.stop(0).wait()


# -- contracts ---------------------------------------------------------------------------------------------------------


def test_fields_that_changed_their_numbers_are_refused_at_connect(server: ipckit.Url) -> None:
    """By name the two are compatible, and so they are on every other transport."""

    class Moved(ipckit.Service):
        def price(self, qty: int, item: str) -> int: ...

    with ipckit.client(server, Shop) as client:
        assert client.price("tea") == 3
    with pytest.raises(errors.SchemaError, match=r"PriceRequest\.\w+: has the number|price\.qty|price\.item"):
        ipckit.client(server, Moved, target="shop")


# -- ends, limits, headers ---------------------------------------------------------------------------------------------


def test_more_calls_than_allowed_are_refused(shop: Shop) -> None:
    with ipckit.Server(HERE, shop, max_concurrent=1) as made, ipckit.client(made.url, Shop) as client:
        thread = threading.Thread(target=client.hold)
        thread.start()
        assert shop.held.wait(10)
        with pytest.raises(errors.TargetBusy):
            client.price("tea")
        shop.free.set()
        thread.join(10)
        assert eventually(lambda: made.stats()["in_flight_requests"] == 0)
        assert client.price("tea") == 3
        stats = made.stats()
        assert (stats["messages_processed"], stats["backpressure_rejections"]) == (2, 1)


def test_a_server_that_shuts_down_lets_calls_finish_or_says_so(shop: Shop) -> None:
    found: list[object] = []

    def call(client: Shop) -> None:
        try:
            found.append(client.hold())
        except errors.IpcError as error:
            found.append(type(error))

    for drain, free, report, result in ((10, True, (1, 1, 0), None), (0, False, (1, 0, 1), errors.ShuttingDown)):
        shop.free.clear()
        shop.held.clear()
        made = ipckit.Server(HERE, shop)
        with ipckit.client(made.url, Shop) as client:
            thread = threading.Thread(target=call, args=(client,))
            thread.start()
            assert shop.held.wait(10)
            if free:
                threading.Timer(0.05, shop.free.set).start()
            said = made.shutdown(drain)
            assert (said.in_flight_at_start, said.drained_gracefully, said.forced_closed) == report
            thread.join(10)
            assert found.pop() == result
            shop.free.set()


def test_closing_a_client_ends_its_calls(server: ipckit.Url, shop: Shop) -> None:
    client = ipckit.client(server, Shop)
    found: list[type] = []

    def call() -> None:
        try:
            client.hold()
        except errors.IpcError as error:
            found.append(type(error))

    thread = threading.Thread(target=call)
    thread.start()
    assert shop.held.wait(10)
    client.close()
    thread.join(10)
    assert found == [errors.Closed]
    with pytest.raises(errors.Closed):
        client.price("tea")


def test_what_a_stream_of_the_callers_raises_is_raised_to_the_caller(server: ipckit.Url) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("mine")

    with ipckit.client(server, Shop) as client:
        with pytest.raises(KeyError, match="mine"):
            list(client.scaled(broken(), 2))
        with pytest.raises(KeyError, match="mine"):
            client.total(broken_orders())
        with pytest.raises(errors.SchemaError):
            client.total(iter(["no order"]))  # type: ignore[list-item]

    async def main() -> None:
        async with await ipckit.aio.client(server, Shop) as client:
            with pytest.raises(KeyError, match="mine"):
                await client.total(broken_orders())
            with pytest.raises(KeyError, match="mine"):
                _ = [each async for each in client.scaled(broken(), 2)]

    asyncio.run(main())


def broken_orders() -> Iterator[Order]:
    yield Order("tea")
    raise KeyError("mine")


def test_headers_that_gRPC_cannot_carry_are_refused(server: ipckit.Url) -> None:
    with ipckit.client(server, Shop) as client:
        assert using(client, metadata={"who": "me"}).who() == {"who": "me"}
        for headers in ({"who": "käse"}, {"grpc-status": "0"}, {"x-bin": "x"}):
            with pytest.raises(errors.BadOption, match="cannot carry"):
                using(client, metadata=headers).who()


def test_interceptors_on_both_sides(shop: Shop) -> None:
    seen: list[str] = []

    def client_side(request, proceed):
        request.metadata["token"] = "secret"
        return proceed()

    def server_side(call, proceed):
        seen.append(call.method)
        if call.metadata.get("token") != "secret":
            raise errors.RateLimited("who are you")
        return proceed()

    with ipckit.Server(HERE, shop, interceptors=[server_side]) as made:
        with ipckit.client(made.url, Shop, interceptors=[client_side]) as client:
            assert client.price("tea") == 3
            assert list(client.count(2)) == [0, 1]
        with ipckit.client(made.url, Shop) as client, pytest.raises(errors.RateLimited):
            client.price("tea")
    assert {"price", "count"} <= set(seen)


def test_a_message_above_the_limit_fails_its_call_only(server: ipckit.Url) -> None:
    with ipckit.client(f"{server}?limit=1KiB", Shop) as client:
        assert list(client.count(2)) == [0, 1]
        with pytest.raises(errors.MessageTooLarge):
            using(client, metadata={"a": "b"}).order(Order("x" * 2000))
        assert client.price("tea") == 3


async def awaited(server: ipckit.aio.Server) -> None:
    await server


def test_options_of_channels_and_wrong_names_are_refused(shop: Shop) -> None:
    with pytest.raises(errors.BadOption, match="buffer"):
        ipckit.Server(f"{HERE}?buffer=1MiB", shop)
    with pytest.raises(errors.Unsupported, match="requests_per_second"):
        ipckit.Server(HERE, shop, requests_per_second=5)
    with pytest.raises(errors.Unsupported, match="requests_per_second"):
        asyncio.run(awaited(ipckit.aio.Server(HERE, shop, requests_per_second=5)))
    with pytest.raises(errors.BadOption, match="buffer"):
        ipckit.client("grpc://127.0.0.1:1?buffer=1MiB")
    with ipckit.Server(HERE) as made:
        for name in ("", "a.b", "ipckit", "no-package"):
            with pytest.raises(errors.BadOption):
                made.expose(name, shop)
        with pytest.raises(errors.AddressInUse):
            ipckit.Server(made.url, shop)
    with pytest.raises(errors.NothingListening):
        ipckit.client(made.url, timeout=0.2)


def test_what_a_loop_cannot_serve_leaves_nothing_behind(shop: Shop) -> None:
    async def main() -> None:
        async with ipckit.aio.Server(HERE, shop) as made:
            for wrong in (made.url, HERE):
                with pytest.raises(errors.ConfigError if wrong == HERE else errors.AddressInUse):
                    await ipckit.aio.Server(wrong, object())

    asyncio.run(main())


def test_what_calls_need_and_channels_do_not_is_named_when_it_is_missing() -> None:
    source = (
        "import sys; sys.modules['grpc_reflection'] = None\n"
        "import ipckit\n"
        "try: ipckit.client('grpc://127.0.0.1:1')\n"
        "except ipckit.errors.MissingDependency as error: print(error.message, error.hint)\n"
    )
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=50)
    assert "grpc_reflection" in found.stdout
    assert ".[grpc]" in found.stdout


def test_mutual_tls(tmp_path: Path, shop: Shop) -> None:
    ours, others = trustme.CA(), trustme.CA()
    for name, authority in (("ours", ours), ("others", others)):
        authority.cert_pem.write_to_path(tmp_path / f"{name}-ca.pem")
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    serving = f"grpcs://127.0.0.1:0?cert={tmp_path}/ours.pem&client_ca={tmp_path}/ours-ca.pem"
    with ipckit.Server(serving, shop) as made:
        place = f"grpcs://{made.url.host}"
        with ipckit.client(f"{place}?ca={tmp_path}/ours-ca.pem&cert={tmp_path}/ours.pem", Shop) as client:
            assert client.price("tea") == 3
        with pytest.raises(errors.AccessDenied):
            ipckit.client(f"{place}?ca={tmp_path}/others-ca.pem&cert={tmp_path}/ours.pem", timeout=5)
        for certificate in ("", f"&cert={tmp_path}/others.pem"):
            with pytest.raises((errors.AccessDenied, errors.NothingListening, errors.PeerDied)):
                ipckit.client(f"{place}?ca={tmp_path}/ours-ca.pem{certificate}", timeout=0.5)


def test_what_is_wrong_with_certificates_is_said(tmp_path: Path, shop: Shop) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "ours.pem")
    for options, why in (
        ("cert={}/none.pem", "cert= cannot be read"),
        ("cert={}/ca.pem", "no certificate with its key"),
    ):
        with pytest.raises(errors.BadOption, match=why):
            ipckit.Server("grpcs://127.0.0.1:0?" + options.format(tmp_path), shop)
    with ipckit.Server(f"grpcs://127.0.0.1:0?cert={tmp_path}/ours.pem", shop) as made:
        with pytest.raises(errors.AccessDenied, match="server_name="):
            ipckit.client(f"grpcs://{made.url.host}?ca={tmp_path}/ca.pem&server_name=other", timeout=20)
        with pytest.raises(
            errors.NothingListening, match="failed to connect"
        ):  # without TLS: gRPC's own reason is told
            ipckit.client(f"grpc://{made.url.host}", timeout=0.5)

        async def awaited() -> None:
            with pytest.raises(errors.NothingListening, match="failed to connect"):
                await ipckit.aio.client(f"grpc://{made.url.host}", timeout=0.5)

        asyncio.run(awaited())


# -- statuses ----------------------------------------------------------------------------------------------------------


@given(
    code=st.sampled_from(["REMOTE_ERROR", "RATE_LIMITED", "TARGET_BUSY", "SCHEMA", "SHUTTING_DOWN"]),
    message=st.text(max_size=3000),
    kind=st.text(max_size=50),
    trace=st.none() | st.text(max_size=6000),
    delay=st.none() | st.floats(0, 1e6),
)
def test_a_failure_comes_back_from_its_status(code, message, kind, trace, delay) -> None:
    from ipckit.rpc.grpc._status import Status, failure_of

    status = Status(Failure(0, code, message, kind, trace, delay))
    found = failure_of(status.trailing_metadata)
    assert found is not None
    assert (found.code, found.type) == (code, kind)
    assert message.encode(errors="replace").startswith(found.message.encode())
    assert (found.traceback is None) == (trace is None)
    assert found.retry_after == (None if delay is None else pytest.approx(delay, abs=1e-6))
    assert sum(len(value) for _, value in status.trailing_metadata) < 6000


@given(st.binary(max_size=200))
def test_garbage_in_the_details_is_nobody_elses_failure(data: bytes) -> None:
    from ipckit.rpc.grpc._status import DETAILS, failure_of

    found = failure_of(((DETAILS, data),))
    assert found is None or found.code


# -- pushes ------------------------------------------------------------------------------------------------------------


def test_a_subscription_survives_its_server(shop: Shop) -> None:
    first = ipckit.Server(HERE, shop)
    with ipckit.client(first.url) as client:
        subscription = client.subscribe(Order)
        assert first.broadcast(Order("tea")) == 1
        assert subscription.recv(10) == Order("tea")
        first.shutdown(0)
        with ipckit.Server(first.url, shop, timeout=10) as second:
            assert eventually(lambda: second.stats()["subscribers"] == 1)
            second.broadcast(Order("milk"))
            assert subscription.recv(10) == Order("milk")
            with pytest.raises(errors.Timeout):
                subscription.recv(0)
            subscription.close()
            assert eventually(lambda: second.stats()["subscribers"] == 0)
            with pytest.raises(errors.Closed):
                subscription.recv(1)


def test_an_awaited_subscription_survives_its_server(shop: Shop) -> None:
    async def main() -> None:
        first = await ipckit.aio.Server(HERE, shop)
        async with await ipckit.aio.client(first.url) as client:
            subscription = await client.subscribe(Order)
            assert first.broadcast(Order("tea")) == 1
            assert await subscription.recv(10) == Order("tea")
            report = await first.shutdown(0)
            assert (report.in_flight_at_start, report.forced_closed) == (0, 0)
            async with ipckit.aio.Server(first.url, shop, timeout=10) as second:
                assert await asyncio.to_thread(eventually, lambda: second.stats()["subscribers"] == 1)
                second.broadcast(Order("milk"))
                assert await subscription.recv(10) == Order("milk")
                await subscription.close()
                with pytest.raises(errors.Closed):
                    await subscription.recv(1)

    asyncio.run(asyncio.wait_for(main(), 40))
