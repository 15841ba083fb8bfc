from __future__ import annotations

import json
import pickle
from contextlib import suppress
from dataclasses import dataclass
from typing import TypedDict

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipckit import codecs, errors
from ipckit.codecs import RAW, Codec, choose

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


class Order(msgspec.Struct):
    sku: str
    qty: int


@dataclass
class Point:
    x: int
    y: int = 0


class Row(TypedDict):
    name: str
    tags: list[str]


@pytest.mark.parametrize("name", [None, "bytes"])
def test_bytes_are_left_alone(name: str | None) -> None:
    codec = choose(name)
    assert codec is RAW
    value = b"x"
    assert codec.encode(value) is value
    assert codec.decode(value) is value


@pytest.mark.parametrize("name", ["json", "msgpack"])
@given(value=plain)
def test_plain_values_round_trip(name: str, value: object) -> None:
    codec = choose(name)
    assert codec.decode(bytes(codec.encode(value))) == value


@pytest.mark.parametrize("name", ["json", "msgpack", None])
@given(data=st.binary(max_size=80))
def test_foreign_bytes_are_a_codec_error(name: str | None, data: bytes) -> None:
    """Whatever comes, it is a value, a CodecError or a SchemaError."""
    for codec in (choose(name, Order), choose(name or "json")):
        with suppress(errors.CodecError, errors.SchemaError):
            codec.decode(data)


@pytest.mark.parametrize("name", ["json", "msgpack", None])
@pytest.mark.parametrize(
    ("type_", "value"),
    [(Order, Order("a", 2)), (Point, Point(1, 2)), (Row, Row(name="n", tags=["t"])), (list[int], [1, 2])],
)
def test_typed(name: str | None, type_: object, value: object) -> None:
    codec = choose(name, type_)
    assert codec.decode(bytes(codec.encode(value))) == value


@pytest.mark.parametrize("name", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("type_", "value", "says"),
    [
        (Order, {"sku": "a", "qty": "2"}, "$.qty: expected int, got str"),
        (Order, {"sku": "a"}, "qty"),
        (Order, [1], "$: expected object, got array"),
        (Point, {"x": None}, "$.x: expected int, got "),
        (Row, {"name": "n", "tags": ["a", 5]}, "$.tags[1]: expected str, got int"),
    ],
)
def test_a_value_of_another_type_is_told_with_its_path(name: str, type_: object, value: object, says: str) -> None:
    wire = json.dumps(value).encode() if name == "json" else msgspec.msgpack.encode(value)
    with pytest.raises(errors.SchemaError) as caught:
        choose(name, type_).decode(wire)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_what_cannot_be_written(name: str) -> None:
    loop: list[object] = []
    loop.append(loop)
    for value in (object(), loop, {"x": {1, object()}}):
        with pytest.raises(errors.CodecError):
            choose(name).encode(value)


@pytest.mark.parametrize("name", ["json", "msgpack"])
def test_deep_nesting_is_no_crash(name: str) -> None:
    data = b"[" * 100_000 if name == "json" else b"\x91" * 100_000
    with pytest.raises(errors.CodecError):
        choose(name).decode(data)


def test_choices() -> None:
    own = Codec("own", lambda value: value, lambda data: data)
    assert choose(own) is own
    with pytest.raises(errors.BadOption, match="not both"):
        choose(own, Order)
    with pytest.raises(errors.BadOption, match="msgpack, json"):
        choose("yaml")
    with pytest.raises(errors.BadOption, match="signed_pickle"):
        choose("pickle")


@pytest.mark.parametrize(
    ("name", "type_"), [("bytes", None), ("json", None), ("json", Order), (None, Order), ("msgpack", None)]
)
def test_a_codec_gets_into_another_process(name: str | None, type_: object) -> None:
    codec = choose(name, type_)
    twin = pickle.loads(pickle.dumps(codec))
    assert twin.name == codec.name
    if codec is RAW:
        assert twin is RAW
    else:
        assert twin.decode(bytes(codec.encode({"sku": "a", "qty": 1}))) == codec.decode(
            bytes(twin.encode({"sku": "a", "qty": 1}))
        )


# -- pickle, signed -----------------------------------------------------------------------------------------------

KEY = b"0123456789abcdef"


@given(value=plain)
def test_signed_pickle_round_trips(value: object) -> None:
    codec = codecs.signed_pickle(KEY)
    assert codec.decode(bytes(codec.encode(value))) == value


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit",)


def test_a_stranger_is_not_unpickled() -> None:
    """The signature is checked before a single opcode runs."""
    evil = bytes(codecs.signed_pickle(b"another key, long enough").encode(Bomb()))
    for data in (evil, evil[32:], b"", bytes(31), bytes(32) + pickle.dumps(Bomb())):
        with pytest.raises(errors.CodecError, match="signature"):
            codecs.signed_pickle(KEY).decode(data)


@given(flip=st.integers(0, 8 * 60))
def test_one_bit_is_enough(flip: int) -> None:
    codec = codecs.signed_pickle(KEY)
    data = bytearray(codec.encode({"some": "value that is long enough"}))
    data[flip // 8 % len(data)] ^= 1 << flip % 8
    with pytest.raises(errors.CodecError):
        codec.decode(bytes(data))


def test_a_short_key_is_refused() -> None:
    with pytest.raises(errors.BadOption, match="16 bytes"):
        codecs.signed_pickle(b"short")


def test_what_cannot_be_pickled() -> None:
    with pytest.raises(errors.CodecError):
        codecs.signed_pickle(KEY).encode(lambda: None)
