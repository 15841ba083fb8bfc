"""A contract as protocol buffers: descriptors, `.proto` text, and values to messages and back.

    schema = schema_of(Shop)                    # package `shop`, service `Shop`
    schema.file                                 # a FileDescriptorProto; `schema.text()` is the .proto file
    add = schema.methods["add"]                 # /shop.Shop/Add
    add.request                                 # the class AddRequest, made at run time
    add.decode_args(add.encode_args((2, 3)))    # (2, 3)

Field numbers follow the order of parameters and fields: append, and old clients go on. What has a default or may be None is
`optional`. A method that takes one Struct takes its message; a result that is none is the field `result`. The item of a stream
that a client sends beside other arguments is the field after them: the first message has the arguments. Where protobuf has no
list, map or optional of such a thing, there is a message of `Wrapped`; unions, fixed tuples and Any are a
`google.protobuf.Value`. docs/howto/contracts.md has the table.

Building is done from msgspec's view of the types; converting goes by the descriptors alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from .. import errors
from . import _protofile
from ._protofile import Names
from ._protovalues import Converter, to_builtins
from .contract import Contract, Method, _converted, contract_of

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FileDescriptorProto
    from google.protobuf.descriptor_pool import DescriptorPool
    from google.protobuf.message import Message

_SCALARS = (int, float, str, bytes, bool)
_ABSENT = object()


@dataclass(eq=False)
class MethodSchema:
    """One method on the wire.

    Attributes:
        rpc: its name there; `path` is what gRPC calls.
        request: the class of what the client sends, once or as a stream.
        response: the class of what the server sends, once or as a stream.
        opens: the client's stream begins with a message that has the arguments. `encode_args` makes it.
        encode_args: arguments, in the order of `Method.parameters`, to a request. Raises SchemaError, CodecError.
        decode_args: and back, validated.
        encode_item: an item of the client's stream to a request; `decode_item` gives it back.
        has_item: a request carries an item, which the first of a stream that `opens` need not.
        encode_result: the result, or an item of the server's stream, to a response; `decode_result` gives it back.
    """

    method: Method
    rpc: str
    path: str
    request: type[Message]
    response: type[Message]
    opens: bool
    encode_args: Callable[[tuple[Any, ...]], Message]
    decode_args: Callable[[Any], tuple[Any, ...]]
    encode_item: Callable[[Any], Message]
    decode_item: Callable[[Any], Any]
    has_item: Callable[[Any], bool]
    encode_result: Callable[[Any], Message]
    decode_result: Callable[[Any], Any]


class Schema:
    """A contract's file, in a pool, and its methods."""

    def __init__(self, contract: Contract, package: str, pool: DescriptorPool) -> None:
        from google.protobuf import message_factory

        self.contract = contract
        self.names = Names(contract, package)
        self.file: FileDescriptorProto = self.names.file
        self.service = f"{package}.{self.names.service}"
        self.pool = pool
        _protofile.add_well_known(pool)
        pool.Add(self.file)
        convert = Converter(self.names.enums, self.names.nullable)

        def message(name: str) -> type[Message]:
            return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

        self.methods = {
            name: self._method(method, message(self.names.requests[name]), message(self.names.responses[name]), convert)
            for name, method in contract.methods.items()
        }

    def text(self) -> str:
        """The `.proto` file."""
        return _protofile.text(self.file)

    def _method(
        self, method: Method, request: type[Message], response: type[Message], convert: Converter
    ) -> MethodSchema:
        rpc = self.names.rpcs[method.name]
        encode_args, decode_args = _arguments(method, request, convert)
        streams = method.shape.streams_in
        item = _protofile.item_of(method)
        encode_item, decode_item = _single(method.item if streams else None, request, item, convert)
        encode_result, decode_result = _single(method.result, response, _protofile.result_of(method), convert)
        opens = streams and bool(method.parameters)

        def has_item(message: Message) -> bool:
            return message.HasField(item) if opens and item is not None else True

        return MethodSchema(
            method=method,
            rpc=rpc,
            path=f"/{self.service}/{rpc}",
            request=request,
            response=response,
            opens=opens,
            encode_args=encode_args,
            decode_args=decode_args,
            encode_item=encode_item,
            decode_item=decode_item,
            has_item=has_item,
            encode_result=encode_result,
            decode_result=decode_result,
        )


_schemas: dict[tuple[int, str], tuple[Contract, Schema]] = {}


def schema_of(service: Any, package: str | None = None, *, pool: DescriptorPool | None = None) -> Schema:
    """The protocol buffers of a contract, a Service class, or an instance.

    Args:
        service: what `contract_of` takes.
        package: by default the contract's name in snake case without underscores: `shop` of `Shop`.
        pool: where the descriptors are put; by default one of their own.

    Raises: MissingDependency; ConfigError for what protobuf cannot say, such as two methods of one name.
    """
    try:
        from google.protobuf.descriptor_pool import DescriptorPool
    except ImportError as error:
        raise errors.MissingDependency(
            "protocol buffers need the module 'google.protobuf', which is not installed",
            hint='from the checkout: pip install ".[grpc]"',
        ) from error
    contract = contract_of(service)
    package = package or contract.name.lower()
    if not _protofile.is_package(package):
        raise errors.BadOption(f"{package!r} is no name of a protobuf package")
    if pool is not None:
        return Schema(contract, package, pool)
    key = id(contract), package
    found = _schemas.get(key)
    if found is None:
        found = _schemas[key] = contract, Schema(contract, package, DescriptorPool())
    return found[1]


def json_schema(service: Any) -> dict[str, Any]:
    """The contract's description as a JSON Schema document: the types under `$defs`, the methods beside them."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **contract_of(service).describe()}


# -- arguments and results ---------------------------------------------------------------------------------------------


def _arguments(
    method: Method, request: type[Message], convert: Converter
) -> tuple[Callable[[tuple[Any, ...]], Message], Callable[[Any], tuple[Any, ...]]]:
    names = tuple(each.name for each in method.parameters)
    write, read = convert.writer_of(request), convert.reader_of(request)
    if _protofile.takes_message(method):
        kind = method.parameters[0].type
        one, back = _whole(kind, request, convert, names[0])
        return lambda args: one(args[0]), lambda message: (back(message),)
    record = method._record(array_like=False)

    def encode(args: tuple[Any, ...]) -> Message:
        fields = dict(zip(names, args, strict=True))
        return _written(lambda: write(request(), to_builtins(fields)), fields, record)

    def decode(message: Message) -> tuple[Any, ...]:
        fields = read(message)
        if method.stream is not None:
            fields.pop(method.stream, None)
        return msgspec.structs.astuple(_checked(fields, record))

    if method.stream is None and method.plain and all(each.type in _SCALARS for each in method.parameters):
        get = operator.attrgetter(*names) if names else None
        only = names[0] if len(names) == 1 else None

        def quick(args: tuple[Any, ...]) -> Message:
            try:
                if only is not None:
                    return request(**{only: args[0]})
                return request(**dict(zip(names, args, strict=True)))
            except (TypeError, ValueError):
                return encode(args)

        def quickly(message: Message) -> tuple[Any, ...]:
            if get is None:
                return ()
            return (get(message),) if only is not None else get(message)

        return quick, quickly
    return encode, decode


def _get(name: str, message: Any) -> Any:
    return getattr(message, name)


def _single(
    kind: Any, message: type[Message], field: str | None, convert: Converter
) -> tuple[Callable[[Any], Message], Callable[[Any], Any]]:
    """One value in a message: as its `field`, or as the message itself."""
    if field is None:
        if kind is None or kind is type(None):
            return _nothing(message), lambda _: None
        return _whole(kind, message, convert)
    write, read = convert.writer_of(message), convert.reader_of(message)

    def encode(value: Any) -> Message:
        return _written(lambda: write(message(), {field: to_builtins(value)}), value, kind)

    def decode(found: Message) -> Any:
        fields = read(found)
        return _checked(fields.get(field), kind)

    if kind in _SCALARS:

        def quick(value: Any) -> Message:
            try:
                return message(**{field: value})
            except (TypeError, ValueError):
                return encode(value)

        return quick, partial(_get, field)
    return encode, decode


def _nothing(message: type[Message]) -> Callable[[Any], Message]:
    def encode(value: Any) -> Message:
        if value is not None:
            _checked(to_builtins(value), type(None))
        return message()

    return encode


def _whole(
    kind: Any, message: type[Message], convert: Converter, name: str | None = None
) -> tuple[Callable[[Any], Message], Callable[[Any], Any]]:
    write, read = convert.writer_of(message), convert.reader_of(message)

    plain = kind if isinstance(kind, type) else object

    def encode(value: Any) -> Message:
        if not isinstance(value, plain):
            value = _checked(to_builtins(value), kind, name)
        return _written(lambda: write(message(), to_builtins(value)), value, kind, name)

    return encode, lambda found: _checked(read(found), kind, name)


def _written(write: Callable[[], Message], value: Any, kind: Any, name: str | None = None) -> Message:
    try:
        return write()
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError, RecursionError) as error:
        if not isinstance(error, RecursionError):
            _checked(to_builtins(value), kind, name)  # says what does not fit, and where
        raise errors.CodecError(f"this value cannot be sent as protobuf: {error}") from error


def _checked(value: Any, kind: Any, name: str | None = None) -> Any:
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        found = _converted(error)
        if name is not None:
            found = errors.SchemaError(found.message.replace("$", f"$.{name}", 1))
        raise found from error
