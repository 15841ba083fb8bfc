"""Contracts: what annotations become, and which changes of them break a caller."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, Literal
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
from ipckit import errors
from ipckit.rpc import Contract, Shape, check, contract_of


class Order(msgspec.Struct):
    item: str
    qty: int = 1


@dataclasses.dataclass
class Receipt:
    total: float


class Shop(ipckit.Service):
    def price(self, item: str, /, currency: Literal["EUR", "USD"] = "EUR") -> float: ...
    def order(self, order: Order) -> Receipt: ...
    def watch(self, item: str) -> Iterator[float]: ...
    async def upload(self, name: str, parts: AsyncIterator[bytes], *, strict: bool) -> int: ...
    async def talk(self, lines: Iterator[str]) -> AsyncIterator[str]: ...
    def _private(self) -> None: ...

    @ipckit.rpc(idempotent=True)
    def ping(self) -> None: ...


def test_methods_shapes_and_messages_come_from_annotations() -> None:
    contract = contract_of(Shop)
    assert {name: method.shape for name, method in contract.methods.items()} == {
        "price": Shape.UNARY,
        "order": Shape.UNARY,
        "watch": Shape.SERVER_STREAM,
        "upload": Shape.CLIENT_STREAM,
        "talk": Shape.BIDIRECTIONAL,
        "ping": Shape.UNARY,
    }
    assert set(contract.messages) == {"Order"}
    assert contract.find("Order") is contract.find("order")
    assert contract.methods["ping"].options.idempotent
    assert not contract.methods["order"].options.idempotent
    upload = contract.methods["upload"]
    assert (upload.stream, upload.stream_index, upload.item, upload.coroutine) == ("parts", 1, bytes, True)


@pytest.mark.parametrize("format", ["msgpack", "json"])
@pytest.mark.parametrize("named", [True, False])
def test_values_survive_both_formats_and_both_forms(format: Literal["msgpack", "json"], named: bool) -> None:
    methods = contract_of(Shop).methods
    wire = methods["order"].wire(format, named=named)
    assert wire.decode_args(wire.encode_args((Order("tea", 2),))) == (Order("tea", 2),)
    assert wire.decode_result(wire.encode(Receipt(2.5))) == Receipt(2.5)
    item = methods["upload"].wire(format, named=named)
    assert item.decode_item(item.encode(b"\x00part")) == b"\x00part"
    assert item.decode_args(item.encode_args(("a", True))) == ("a", True)


def test_what_is_given_by_name_only_may_be_required_after_what_is_not() -> None:
    class Odd(ipckit.Service):
        def f(self, a: int, parts: Iterator[int], b: int = 2, *, c: int = 3, d: int) -> tuple[int, int, int, int]: ...

    method = contract_of(Odd).methods["f"]
    args, stream = method.bind((1, [0]), {"d": 4})
    wire = method.wire("msgpack", named=False)
    given = wire.decode_args(wire.encode_args(args))
    assert method.invoke(lambda a, parts, b, *, c, d: (a, parts, b, c, d), given, stream) == (1, [0], 2, 3, 4)


def test_a_bad_argument_is_named() -> None:
    wire = contract_of(Shop).methods["order"].wire("msgpack", named=False)
    with pytest.raises(errors.SchemaError, match=r"\$\.order\.qty: expected int, got str"):
        wire.decode_args(msgspec.msgpack.encode([{"item": "tea", "qty": "many"}]))
    with pytest.raises(errors.CodecError):
        wire.decode_args(b"\xc1")


@given(st.binary(max_size=60))
def test_any_bytes_are_arguments_or_a_typed_error(data: bytes) -> None:
    for method in contract_of(Shop).methods.values():
        for form in ("msgpack", "json"):
            wire = method.wire(form, named=False)  # type: ignore[arg-type]
            for decode in (wire.decode_args, wire.decode_result, wire.decode_item):
                with suppress(errors.SchemaError, errors.CodecError):
                    decode(data)


def service(function: Callable[..., Any]) -> type[ipckit.Service]:
    return type("Made", (ipckit.Service,), {function.__name__: function})


def test_what_cannot_be_read_is_told_when_it_is_exposed() -> None:
    def unannotated(self, a) -> int: ...  # type: ignore[no-untyped-def, empty-body]
    def silent(self: Any, a: int): ...  # type: ignore[no-untyped-def]
    def starred(self: Any, *a: int) -> int: ...  # type: ignore[empty-body]
    def twice(self: Any, a: Iterator[int], b: Iterator[int]) -> int: ...  # type: ignore[empty-body]
    def odd(self: Any, a: Callable[[], int]) -> int: ...  # type: ignore[empty-body]

    for function, word in (
        (unannotated, "'a' has no annotation"),
        (silent, "no annotation of its result"),
        (starred, "cannot travel"),
        (twice, "only one parameter may be a stream"),
        (odd, "a type that cannot travel"),
    ):
        with pytest.raises(errors.ConfigError, match=word):
            contract_of(service(function))
    with pytest.raises(errors.ConfigError, match="no method that could be called"):
        contract_of(object())


def test_functions_and_marked_methods_of_any_class() -> None:
    @ipckit.rpc(idempotent=True)
    def add(a: int, b: int = 1) -> int:
        return a + b

    class Plain:
        @ipckit.rpc
        def one(self) -> int:
            return 1

        def hidden(self) -> int:
            return 2

    assert contract_of(add).methods["add"].options.idempotent
    assert set(contract_of(Plain()).methods) == {"one"}


def contract(**functions: Callable[..., Any]) -> Contract:
    return contract_of(type("Shop", (ipckit.Service,), functions))


def test_a_fingerprint_is_what_the_contract_means() -> None:
    def f(self: Any, a: int) -> str: ...  # type: ignore[empty-body]
    def g(self: Any, a: int) -> str:  # type: ignore[empty-body]
        """Words do not count."""

    def h(self: Any, a: int) -> bytes: ...  # type: ignore[empty-body]

    assert contract(f=f).fingerprint == contract(f=g).fingerprint != contract(f=h).fingerprint
    assert len(contract(f=f).fingerprint) == 16


class Old(msgspec.Struct):
    a: int
    b: str = ""


class More(msgspec.Struct):
    a: int
    b: str = ""
    c: float = 0.0


class Needs(msgspec.Struct):
    a: int
    c: float
    b: str = ""


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    a: int


def taking(kind: Any, result: Any = int) -> dict[str, Any]:
    def f(self: Any, value: Any) -> Any: ...

    f.__annotations__ = {"value": kind, "return": result}
    return contract(f=f).describe()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (taking(int), taking(int), []),
        (taking(int), taking(float), []),
        (taking(float), taking(int), ["f.value: number is written, integer is read"]),
        (taking(int), taking(int | None), []),
        (taking(int | None), taking(int), ["f.value"]),
        (taking(int, int), taking(int, int | None), ["f (result)"]),
        (taking(int, int | None), taking(int, int), []),
        (taking(Old), taking(More), []),
        (taking(Old), taking(Needs), ["f.value.c: is required, and not always written"]),
        (taking(Old), taking(Strict), ["f.value.b: is written, and not known"]),
        (taking(int, Needs), taking(int, Old), ["f (result).c"]),
        (taking(list[int]), taking(list[str]), ["f.value[]"]),
        (taking(list), taking(list[int]), ["f.value[]: was anything"]),
        (taking(tuple[int, int]), taking(list[int]), []),
        (taking(tuple[int, str]), taking(list[int]), ["f.value[1]: string is written, integer is read"]),
        (taking(dict), taking(dict[str, int]), ["f.value[...]: was anything"]),
        (taking(Old), taking(dict[str, int]), ["f.value.b: string is written, integer is read"]),
        (taking(dict[str, int]), taking(dict[str, float]), []),
        (taking(int, str), taking(int, bytes), ["f (result): bytes are written, text is read"]),
        (taking(int, bytes), taking(int, str), ["f (result): contentEncoding"]),
        (taking(UUID), taking(str), []),
        (taking(Literal["a"]), taking(Literal["a", "b"]), []),
        (taking(Literal["a", "b"]), taking(Literal["a"]), ["f.value"]),
        (taking(int), taking(Iterator[int]), ["f: was unary, is client stream"]),
        (taking(Any), taking(int), ["f.value"]),
        (taking(int), taking(Any), []),
    ],
)
def test_which_changes_break(old: dict[str, Any], new: dict[str, Any], words: list[str]) -> None:
    found = check(old, new)
    found = [each for each in found if "the message" not in each]  # the types' names differ on purpose
    assert len(found) == len(words)
    assert all(any(word in line for line in found) for word in words)


def test_methods_and_parameters_that_come_and_go() -> None:
    def f(self: Any, a: int) -> int: ...  # type: ignore[empty-body]
    def wider(self: Any, a: int, b: int = 0) -> int: ...  # type: ignore[empty-body]
    def needy(self: Any, a: int, b: int) -> int: ...  # type: ignore[empty-body]
    def named(self: Any, other: int) -> int: ...  # type: ignore[empty-body]

    before = contract(f=f).describe()
    assert check(before, contract(f=wider, g=f).describe()) == []
    assert check(contract(f=wider).describe(), before) == ["f.b: the parameter is gone"]
    assert check(before, contract(f=needy).describe()) == ["f.b: a new parameter that is required"]
    assert check(before, contract(f=named).describe()) == ["f.a: the parameter is now 'other'"]
    assert check(before, contract(g=f).describe()) == ["f: the method is gone"]
