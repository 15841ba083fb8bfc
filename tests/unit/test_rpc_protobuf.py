"""Contracts as protocol buffers: protoc reads what is written, and every value comes back as it was."""

from __future__ import annotations

import dataclasses
import datetime
import enum
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from hypothesis import given, settings
from hypothesis import strategies as st

import ipckit
from ipckit import errors
from ipckit.rpc.protobuf import MethodSchema, schema_of


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


class Size(enum.IntEnum):
    small = 5
    none = 0


class Order(msgspec.Struct):
    item: str
    qty: int
    tags: list[str] = []
    color: Color | None = None
    note: str | None = "none"
    several: dict[str, list[int]] = {}
    perhaps: list[int] | None = None
    child: Order | None = None
    size: Size = Size.small
    when: datetime.datetime | None = None
    either: int | str = 0
    raw: bytes = b"raw"


class Tree(msgspec.Struct, tag=True):
    kids: list[Tree]
    odd: int = msgspec.field(name="größe q", default=3)


@dataclasses.dataclass
class Record:
    matrix: list[list[float]]
    orders: dict[int, Order]
    pair: tuple[int, str]
    anything: Any = None
    holes: list[int | None] = dataclasses.field(default_factory=list)


class Shop(ipckit.Service):
    def add(self, a: int, b: int = 1) -> int: ...  # type: ignore[empty-body]
    def plain(self, a: int, text: str) -> str: ...  # type: ignore[empty-body]
    def order(self, order: Order) -> Record: ...  # type: ignore[empty-body]
    def nothing(self) -> None: ...
    def count(self, n: int | None) -> Iterator[Order]: ...  # type: ignore[empty-body]
    def total(self, numbers: Iterator[int]) -> int | None: ...
    def trees(self, trees: Iterator[Tree]) -> Iterator[Tree]: ...  # type: ignore[empty-body]
    def doubled(self, numbers: Iterator[int | None], by: int, words: list[str] = ["a"]) -> Iterator[int]: ...  # type: ignore[empty-body] # noqa: B006
    def anyway(self, value: Any) -> Any: ...
    def tree(self, tree: Tree, parts: dict[str, bytes]) -> set[int]: ...  # type: ignore[empty-body]


METHODS = schema_of(Shop).methods


def test_protoc_reads_what_was_written_as_it_was_meant(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", exc_type=ImportError)
    schema = schema_of(Shop, "deep.shop")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "shop.proto").write_text(schema.text())
    well_known = Path(protoc.__file__).parent / "_proto"
    out = tmp_path / "out"
    command = ["protoc", f"-I{tmp_path}", f"-I{well_known}", f"--descriptor_set_out={out}", "deep/shop.proto"]
    assert protoc.main(command) == 0
    (compiled,) = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    assert without_json_names(compiled.message_type) == without_json_names(schema.file.message_type)
    assert list(compiled.service) == list(schema.file.service)
    assert list(compiled.enum_type) == list(schema.file.enum_type)
    (odd,) = [each for each in compiled.message_type if each.name == "Tree"]
    assert odd.field[1].json_name == "größe q"


def without_json_names(messages: Any) -> list[Any]:
    """protoc fills them in."""
    found = [descriptor_pb2.DescriptorProto.FromString(each.SerializeToString()) for each in messages]
    left = list(found)
    while left:
        message = left.pop()
        left += message.nested_type
        for field in message.field:
            field.ClearField("json_name")
    return found


def test_field_numbers_are_the_order_of_fields() -> None:
    fields = METHODS["order"].request.DESCRIPTOR.fields_by_number
    assert [fields[number].name for number in sorted(fields)] == [
        each.encode_name for each in msgspec.structs.fields(Order)
    ]
    assert METHODS["add"].path == "/shop.Shop/Add"


def test_two_contracts_share_a_pool() -> None:
    pool = DescriptorPool()
    one, other = schema_of(Shop, "one", pool=pool), schema_of(Shop, "other", pool=pool)
    assert pool.FindServiceByName("one.Shop") is not None
    assert one.methods["add"].request is not other.methods["add"].request


def sent(method: MethodSchema, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return method.decode_args(method.request.FromString(method.encode_args(args).SerializeToString()))


def returned(method: MethodSchema, value: Any) -> Any:
    return method.decode_result(method.response.FromString(method.encode_result(value).SerializeToString()))


INTEGERS = st.integers(-(1 << 63), (1 << 63) - 1)
EXACT = st.integers(-(1 << 53), 1 << 53)
NUMBERS = EXACT | st.floats(allow_nan=False).filter(lambda number: not number.is_integer())
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda of: st.lists(of) | st.dictionaries(st.text(), of),
    max_leaves=8,
)
ORDERS: Any = st.deferred(
    lambda: st.builds(
        Order,
        st.text(),
        INTEGERS,
        st.lists(st.text()),
        st.none() | st.sampled_from(Color),
        st.none() | st.text(),
        st.dictionaries(st.text(), st.lists(INTEGERS, max_size=3), max_size=3),
        st.none() | st.lists(INTEGERS, max_size=3),
        st.none() | ORDERS,
        st.sampled_from(Size),
        st.none() | st.datetimes(timezones=st.just(datetime.UTC)),
        EXACT | st.text(),
        st.binary(),
    )
)
TREES: Any = st.deferred(lambda: st.builds(Tree, st.lists(TREES, max_size=2), INTEGERS))
RECORDS = st.builds(
    Record,
    st.lists(st.lists(st.floats(allow_nan=False))),
    st.dictionaries(INTEGERS, ORDERS, max_size=2),
    st.tuples(EXACT, st.text()),
    VALUES,
    st.lists(st.none() | INTEGERS),
)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_value_comes_back_as_it_was(data: st.DataObject) -> None:
    arguments = {
        "add": st.tuples(INTEGERS, INTEGERS),
        "plain": st.tuples(INTEGERS, st.text()),
        "order": st.tuples(ORDERS),
        "count": st.tuples(st.none() | INTEGERS),
        "anyway": st.tuples(VALUES),
        "tree": st.tuples(TREES, st.dictionaries(st.text(), st.binary())),
        "doubled": st.tuples(INTEGERS, st.lists(st.text())),
    }
    results = {"total": st.none() | INTEGERS, "order": RECORDS, "count": ORDERS, "tree": st.sets(INTEGERS)}
    name = data.draw(st.sampled_from([*arguments]))
    args = data.draw(arguments[name])
    assert sent(METHODS[name], args) == args
    name = data.draw(st.sampled_from([*results]))
    result = data.draw(results[name])
    assert returned(METHODS[name], result) == result


def test_what_is_left_out_is_its_default() -> None:
    add, order = METHODS["add"], METHODS["order"]
    assert add.decode_args(add.request(a=2)) == (2, 1)
    assert order.decode_args(order.request(item="tea")) == (Order("tea", 0),)


@pytest.mark.parametrize("item", [None, 0, 5])
def test_a_stream_beside_arguments_is_opened_by_them(item: int | None) -> None:
    doubled = METHODS["doubled"]
    opening = doubled.encode_args((3, []))
    assert doubled.opens
    assert not doubled.has_item(opening)
    assert doubled.decode_args(opening) == (3, [])
    message = doubled.encode_item(item)
    assert doubled.has_item(message)
    assert doubled.decode_item(message) == item
    assert not METHODS["total"].opens
    assert METHODS["total"].decode_item(METHODS["total"].encode_item(7)) == 7
    assert METHODS["trees"].decode_item(METHODS["trees"].encode_item(Tree([]))) == Tree([])


def odd_order() -> Order:
    return Order("a", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: METHODS["order"].encode_args((odd_order(),)), errors.SchemaError, "$.order.qty: expected int"),
        (lambda: METHODS["order"].encode_args(({"item": "a"},)), errors.SchemaError, "qty"),
        (lambda: METHODS["add"].encode_result("x"), errors.SchemaError, "$: expected int, got str"),
        (lambda: METHODS["plain"].encode_args(("x", "y")), errors.SchemaError, "$.a: expected int, got str"),
        (lambda: METHODS["nothing"].encode_result(3), errors.SchemaError, "expected null"),
        (lambda: METHODS["add"].encode_result(1 << 64), errors.CodecError, "out of range"),
        (lambda: METHODS["anyway"].encode_result(1 << 60), errors.CodecError, "does not fit"),
        (lambda: METHODS["count"].decode_result(METHODS["count"].response(color=0)), errors.SchemaError, "$.color"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call: Any, error: type[errors.IpcError], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_a_package_has_a_name() -> None:
    with pytest.raises(errors.BadOption):
        schema_of(Shop, "no package")
