"""Values to bytes and back.

A codec is two functions. `bytes` goes as it is; `"msgpack"` and `"json"` carry plain values; `type=T` (a msgspec Struct, a
dataclass, a TypedDict, or any annotation msgspec reads) is validated on arrival, on every transport. Bytes from a peer
are never unpickled unless `signed_pickle(key)` was asked for by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ._spi import Buffer
from .errors import BadOption, CodecError, MissingDependency, SchemaError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How values travel.

    Attributes:
        name: for messages and tables.
        encode: value to buffer. Raises CodecError.
        decode: bytes to value. Raises CodecError, or SchemaError where the value is of another type.
    """

    name: str
    encode: Callable[[T], Buffer]
    decode: Callable[[bytes], T]
    recipe: tuple[str, Any] | None = None  # `choose(*recipe)` is this codec: how it gets into another process

    def __reduce__(self) -> tuple[Callable[..., Codec[Any]], tuple[Any, ...]]:
        if self.recipe is not None:
            return choose, self.recipe
        return Codec, (self.name, self.encode, self.decode)


def _same(value: Any) -> Any:
    return value


#: Buffers as they are: no function is called at all on the hot path.
RAW: Codec[Any] = Codec("bytes", _same, _same, ("bytes", None))


def choose(codec: str | Codec[Any] | None, type: Any = None) -> Codec[Any]:
    """The codec for `codec=` and `type=`. Raises BadOption for a name that is none."""
    if isinstance(codec, Codec):
        if type is not None:
            raise BadOption("give a Codec or type=, not both")
        return codec
    if codec in (None, "bytes") and type is None:
        return RAW
    if codec == "json":
        return _typed("json", Any if type is None else type)
    if codec == "msgpack" and type is None:
        return _msgpack()
    if codec in (None, "msgpack"):
        return _typed("msgpack", type)
    if codec == "pickle":
        raise BadOption(
            "pickle runs code that the peer chooses",
            hint="if the peer is trusted: codec=ipckit.codecs.signed_pickle(key)",
        )
    raise BadOption(f"there is no codec {codec!r}", hint="bytes, msgpack, json, or a Codec of your own")


def _msgpack() -> Codec[Any]:
    try:
        import msgpack
    except ImportError as error:
        raise MissingDependency(
            "codec='msgpack' needs the module 'msgpack'", hint='from the checkout: pip install ".[msgpack]"'
        ) from error

    def encode(value: Any) -> bytes:
        try:
            packed: bytes = msgpack.packb(value, use_bin_type=True)
        except (TypeError, ValueError, OverflowError) as error:
            raise CodecError(f"msgpack cannot write this: {error}") from error
        return packed

    def decode(data: bytes) -> Any:
        try:
            return msgpack.unpackb(data, raw=False, strict_map_key=False)
        except Exception as error:  # msgpack raises plain ValueError, and its own kinds without a common root
            raise CodecError(f"this is no msgpack: {error}") from error

    return Codec("msgpack", encode, decode, ("msgpack", None))


def _typed(wire: str, type: Any) -> Codec[Any]:
    import msgspec

    module = msgspec.json if wire == "json" else msgspec.msgpack
    encoder = module.Encoder()
    decoder = module.Decoder(type)

    def encode(value: Any) -> bytes:
        try:
            data: bytes = encoder.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CodecError(f"{wire} cannot write this: {error}") from error
        return data

    def decode(data: bytes) -> Any:
        try:
            return decoder.decode(data)
        except msgspec.ValidationError as error:
            raise SchemaError(_with_path(str(error))) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise CodecError(f"this is no {wire}: {error}") from error

    return Codec(wire, encode, decode, (wire, type))


_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>.*)`)?\Z", re.DOTALL)


def _with_path(text: str) -> str:
    """Msgspec's "Expected `int`, got `str` - at `$.qty`" as "$.qty: expected int, got str"."""
    match = _AT.match(text)
    assert match is not None  # the pattern matches every text
    what = match["what"].replace("`", "")
    return f"{match['path'] or '$'}: {what[:1].lower()}{what[1:]}"


def signed_pickle(key: bytes) -> Codec[Any]:
    """Pickle, with an HMAC-SHA256 of the bytes in front of them, so that only holders of `key` (16 bytes or more) are obeyed."""
    import hashlib
    import hmac
    import pickle

    if len(key) < 16:
        raise BadOption("the key must have 16 bytes or more", hint="secrets.token_bytes(32)")

    def sign(data: bytes) -> bytes:
        return hmac.digest(key, data, hashlib.sha256)

    def encode(value: Any) -> bytes:
        try:
            data = pickle.dumps(value, protocol=5)
        except Exception as error:  # __reduce__ may raise anything
            raise CodecError(f"pickle cannot write this: {error}") from error
        return sign(data) + data

    def decode(data: bytes) -> Any:
        if len(data) < 32 or not hmac.compare_digest(data[:32], sign(data[32:])):
            raise CodecError("the signature is not ours")
        try:
            return pickle.loads(data[32:])  # noqa: S301 - signed by a holder of the key
        except Exception as error:
            raise CodecError(f"this cannot be unpickled: {error}") from error

    return Codec("pickle", encode, decode)
