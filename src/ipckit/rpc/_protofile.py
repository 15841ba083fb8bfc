"""The file of a contract: messages, enums and the service, and its text. `protobuf` tells how things are mapped.

Names come in this order: the user's types have theirs, and requests, responses and the group `Wrapped` give way.
"""

from __future__ import annotations

import re
import typing
from typing import TYPE_CHECKING, Any

from msgspec import NODEFAULT, inspect

from .. import errors
from ._protovalues import VALUE, WRAPPED, identifier
from .contract import Contract, Method

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import (
        DescriptorProto,
        EnumDescriptorProto,
        FieldDescriptorProto,
        FileDescriptorProto,
        ServiceDescriptorProto,
    )
    from google.protobuf.descriptor_pool import DescriptorPool

EMPTY = "google.protobuf.Empty"
#: A default that is there, whatever it is.
_SOMETHING = object()
_RECORDS = (inspect.StructType, inspect.DataclassType, inspect.TypedDictType)
_LISTS = (inspect.ListType, inspect.SetType, inspect.FrozenSetType, inspect.VarTupleType, inspect.CollectionType)
_SCALAR_TYPES = (
    (inspect.BoolType, "BOOL"),
    (inspect.IntType, "INT64"),
    (inspect.FloatType, "DOUBLE"),
    ((inspect.BytesType, inspect.ByteArrayType, inspect.MemoryViewType), "BYTES"),
    (
        (
            inspect.StrType,
            inspect.DateTimeType,
            inspect.DateType,
            inspect.TimeType,
            inspect.TimeDeltaType,
            inspect.UUIDType,
            inspect.DecimalType,
        ),
        "STRING",
    ),
)


def camel(name: str) -> str:
    """`add_item` to `AddItem`, as methods are called in protobuf."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_")) or name


def is_package(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name, re.ASCII) is not None


def is_record(kind: Any) -> bool:
    """It has a message of its own."""
    return _is_record(inspect.type_info(kind))


def _is_record(kind: inspect.Type) -> bool:
    return isinstance(kind, _RECORDS) and not getattr(kind, "array_like", False)


def add_well_known(pool: DescriptorPool) -> None:
    """The files that ours import, into a pool of our own."""
    from google.protobuf import descriptor_pb2, empty_pb2, struct_pb2

    for module in (empty_pb2, struct_pb2):
        found = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(found)
        pool.Add(found)


class Names:
    """Builds the file; knows what became of each name.

    Attributes:
        rpcs: methods to their names in the service; `requests` and `responses`: to the full names of their messages.
        enums: values by full name and number.
        nullable: (message, field) whose absence means None.
    """

    def __init__(self, contract: Contract, package: str) -> None:
        from google.protobuf import descriptor_pb2

        self._pb = descriptor_pb2.FieldDescriptorProto
        self._package = package
        self.file: FileDescriptorProto = descriptor_pb2.FileDescriptorProto(
            name=f"{package.replace('.', '/')}.proto", package=package, syntax="proto3"
        )
        self.service = identifier(contract.name)
        self.enums: dict[str, dict[int, Any]] = {}
        self.nullable: set[tuple[str, str]] = set()
        self._types: dict[Any, str] = {}
        self._taken = {self.service, WRAPPED}
        self._wrapped = descriptor_pb2.DescriptorProto(name=WRAPPED)
        methods = [*contract.methods.values()]
        self.rpcs = {each.name: camel(each.name) for each in methods}
        if len(set(self.rpcs.values())) < len(methods):
            self.rpcs = {each.name: identifier(each.name) for each in methods}
        kinds = {each.name: _kinds(each) for each in methods}
        for each in methods:  # the user's types take their names first
            for kind in kinds[each.name]:
                self._claim(kind)
        self.requests: dict[str, str] = {}
        self.responses: dict[str, str] = {}
        service = self.file.service.add(name=self.service)
        for each in methods:
            *parameters, item, result = kinds[each.name]
            self.requests[each.name] = self._request(each, parameters, item)
            self.responses[each.name] = self._response(each, result)
            rpc = service.method.add(
                name=self.rpcs[each.name],
                input_type=f".{self.requests[each.name]}",
                output_type=f".{self.responses[each.name]}",
            )
            if each.shape.streams_in:
                rpc.client_streaming = True
            if each.shape.streams_out:
                rpc.server_streaming = True
        if self._wrapped.nested_type:
            self.file.message_type.append(self._wrapped)
        used = self.file.SerializeToString()
        for path, name in (("google/protobuf/empty.proto", EMPTY), ("google/protobuf/struct.proto", VALUE)):
            if f".{name}".encode() in used:
                self.file.dependency.append(path)

    def _request(self, method: Method, parameters: list[inspect.Type], item: inspect.Type) -> str:
        if (field := item_of(method)) is None and method.stream is not None:
            return self._types[_key(item)]
        if takes_message(method):
            return self._types[_key(parameters[0])]
        made, full = self._message(f"{camel(method.name)}Request")
        for parameter, kind in zip(method.parameters, parameters, strict=True):
            self._field(made, full, parameter.name, kind, parameter.required, parameter.default)
        if field is not None:
            self._field(made, full, field, item, not method.parameters, _SOMETHING)
        return full

    def _response(self, method: Method, result: inspect.Type) -> str:
        if isinstance(result, inspect.NoneType):
            return EMPTY
        if _is_record(result):
            return self._types[_key(result)]
        made, full = self._message(f"{camel(method.name)}Response")
        self._field(made, full, "result", result, True, _SOMETHING)
        return full

    # -- types ---------------------------------------------------------------------------------------------------------

    def _free(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self._taken:
            name, number = f"{wanted}{number}", number + 1
        self._taken.add(name)
        return name

    def _message(self, wanted: str) -> tuple[DescriptorProto, str]:
        made = self.file.message_type.add(name=self._free(wanted))
        return made, f"{self._package}.{made.name}"

    def _claim(self, kind: inspect.Type) -> None:
        """Declare the records and enums that a type is made of."""
        kind, _ = _stripped(kind)
        if as_value(kind) or _key(kind) in self._types:
            return
        if isinstance(kind, inspect.EnumType):
            self._types[_key(kind)] = self._enum(kind.cls)
        elif isinstance(kind, _RECORDS):
            made, full = self._message(_name(kind.cls))
            self._types[_key(kind)] = full
            for field in kind.fields:
                self._claim(field.type)
                self._field(made, full, field.encode_name, field.type, field.required, _default_of(field))
        elif isinstance(kind, inspect.DictType):
            self._claim(kind.value_type)
        elif isinstance(kind, _LISTS):
            self._claim(kind.item_type)

    def _enum(self, cls: Any) -> str:
        made = self.file.enum_type.add(name=self._free(_name(cls)))
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", made.name).upper()
        numbered = all(type(each.value) is int and -(1 << 31) <= each.value < 1 << 31 for each in cls)
        values = [(each.name, each.value if numbered else place, each.value) for place, each in enumerate(cls, 1)]
        values.sort(key=lambda each: each[1] != 0)  # proto3 wants zero first
        if values[0][1] != 0:
            made.value.add(name=f"{prefix}_UNSPECIFIED", number=0)
        for label, number, _ in values:
            made.value.add(name=identifier(f"{prefix}_{label}".upper()), number=number)
        full = f"{self._package}.{made.name}"
        self.enums[full] = {number: value for _, number, value in values}
        return full

    def _field(
        self, owner: DescriptorProto, full: str, name: str, kind: inspect.Type, required: bool, default: Any
    ) -> None:
        field = owner.field.add(name=identifier(name), number=len(owner.field) + 1, label=self._pb.LABEL_OPTIONAL)
        if field.name != name:
            field.json_name = name
        if any(each.name == field.name for each in owner.field[:-1]):
            raise errors.ConfigError(f"{owner.name}: two fields are called {field.name!r} in protobuf")
        inner, nullable = _stripped(kind)
        if nullable and not required and default is not None:  # absent: the default; there and empty: None
            self._point(field, self._wrapper("Optional", inner))
        elif _is_many(inner) and not nullable and (required or not default):
            self._repeat(owner, full, field, inner)
        else:
            self._element(field, inner)
            if nullable or not required:
                self._optional(owner, field)
        if nullable and required:
            self.nullable.add((full, field.name))

    def _repeat(self, owner: DescriptorProto, full: str, field: FieldDescriptorProto, kind: Any) -> None:
        field.label = self._pb.LABEL_REPEATED
        if not isinstance(kind, inspect.DictType):
            self._element(field, kind.item_type)
            return
        entry = owner.nested_type.add(name=f"{camel(field.name)}Entry")
        entry.options.map_entry = True
        for number, (name, part) in enumerate((("key", kind.key_type), ("value", kind.value_type)), 1):
            inner = entry.field.add(name=name, number=number, label=self._pb.LABEL_OPTIONAL)
            self._element(inner, part)
        self._point(field, f"{full}.{entry.name}")

    def _element(self, field: FieldDescriptorProto, kind: inspect.Type) -> None:
        """What one value is: of a field, a list, or a map."""
        inner, nullable = _stripped(kind)
        if nullable:
            self._point(field, self._wrapper("Optional", inner))
        elif as_value(inner):
            self._point(field, VALUE)
        elif _is_many(inner):
            self._point(field, self._wrapper("Map" if isinstance(inner, inspect.DictType) else "List", inner))
        elif isinstance(inner, inspect.EnumType):
            field.type, field.type_name = self._pb.TYPE_ENUM, f".{self._types[_key(inner)]}"
        elif _is_record(inner):
            self._point(field, self._types[_key(inner)])
        else:
            field.type = getattr(self._pb, f"TYPE_{_scalar(inner)}")

    def _point(self, field: FieldDescriptorProto, message: str) -> None:
        field.type, field.type_name = self._pb.TYPE_MESSAGE, f".{message}"

    def _optional(self, owner: DescriptorProto, field: FieldDescriptorProto) -> None:
        """Its absence can be told; messages have that by nature."""
        if field.type != self._pb.TYPE_MESSAGE:
            field.proto3_optional = True
            field.oneof_index = len(owner.oneof_decl)
            owner.oneof_decl.add(name=f"_{field.name}")

    def _wrapper(self, what: str, kind: Any) -> str:
        """The message that stands for a list, a map or an optional where protobuf wants one value."""
        label = self._label(kind)
        name = f"Optional{label}" if what == "Optional" else label
        full = f"{self._package}.{WRAPPED}.{name}"
        if all(each.name != name for each in self._wrapped.nested_type):
            made = self._wrapped.nested_type.add(name=name)
            if what == "Optional":
                field = made.field.add(name="value", number=1, label=self._pb.LABEL_OPTIONAL)
                self._element(field, kind)
                self._optional(made, field)
            else:
                field = made.field.add(name="items", number=1, label=self._pb.LABEL_OPTIONAL)
                self._repeat(made, full, field, kind)
        return full

    def _label(self, kind: Any) -> str:
        inner, nullable = _stripped(kind)
        if nullable:
            return f"Optional{self._label(inner)}"
        if as_value(inner):
            return "Value"
        if isinstance(inner, inspect.DictType):
            return f"Map{self._label(inner.key_type)}To{self._label(inner.value_type)}"
        if isinstance(inner, _LISTS):
            return f"List{self._label(inner.item_type)}"
        if _key(inner) in self._types:
            return self._types[_key(inner)].rpartition(".")[2]
        return _scalar(inner).capitalize()


def _kinds(method: Method) -> list[inspect.Type]:
    """Its parameters, the item of its stream, its result."""
    return list(inspect.multi_type_info([*(each.type for each in method.parameters), method.item, method.result]))


def takes_message(method: Method) -> bool:
    """Its request is the record that is its only argument."""
    return method.message is not None and is_record(method.parameters[0].type)


def item_of(method: Method) -> str | None:
    """The field of the request that is the item of the stream; None: the request is the item, or nothing is streamed."""
    return None if method.stream is None or (not method.parameters and is_record(method.item)) else method.stream


def result_of(method: Method) -> str | None:
    """The field of the response that is the result; None: the response is the result."""
    return None if method.result in (None, type(None)) or is_record(method.result) else "result"


def _stripped(kind: inspect.Type) -> tuple[inspect.Type, bool]:
    """Without annotations and None; whether there was a None."""
    if isinstance(kind, inspect.Metadata):
        return _stripped(kind.type)
    if isinstance(kind, inspect.UnionType):
        left = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
        if len(left) == 1 and len(kind.types) == 2:
            inner, _ = _stripped(left[0])
            return inner, not as_value(inner)  # a Value says None by itself
    return kind, False


def as_value(kind: inspect.Type) -> bool:
    """Protobuf has no type for it."""
    if isinstance(kind, inspect.DictType):
        key, nullable = _stripped(kind.key_type)
        return nullable or not (_is_scalar(key) and _scalar(key) in ("STRING", "INT64"))
    if isinstance(kind, inspect.EnumType):
        return not len(kind.cls)
    return not (_is_record(kind) or isinstance(kind, _LISTS) or _is_scalar(kind))


def _is_many(kind: inspect.Type) -> bool:
    return isinstance(kind, (*_LISTS, inspect.DictType)) and not as_value(kind)


def _is_scalar(kind: inspect.Type) -> bool:
    if isinstance(kind, inspect.LiteralType):
        return len({type(each) for each in kind.values}) == 1
    return any(isinstance(kind, types) for types, _ in _SCALAR_TYPES)


def _scalar(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return "STRING" if isinstance(kind.values[0], str) else "INT64"
    return next(name for types, name in _SCALAR_TYPES if isinstance(kind, types))


def _key(kind: Any) -> Any:
    return getattr(kind, "cls", None) or id(kind)


def _name(cls: Any) -> str:
    inner = "_".join(_name(each) for each in typing.get_args(cls))
    name = getattr(typing.get_origin(cls) or cls, "__name__", str(cls))
    return identifier(f"{name}_{inner}" if inner else name)


def _default_of(field: inspect.Field) -> Any:
    """The default, or what is as empty or as full as it."""
    if field.default is not NODEFAULT:
        return field.default
    return [] if field.default_factory in (list, dict, set, frozenset, tuple) else _SOMETHING


# -- text --------------------------------------------------------------------------------------------------------------


def text(file: FileDescriptorProto) -> str:
    """As people write it, and protoc reads it."""
    parts = [
        f'syntax = "proto3";\n\npackage {file.package};',
        *(["\n".join(f'import "{each}";' for each in file.dependency)] if file.dependency else []),
        *(_service_text(each, file.package) for each in file.service),
        *("\n".join(_message_text(each, file.package, file.package)) for each in file.message_type),
        *("\n".join(_enum_text(each)) for each in file.enum_type),
    ]
    return "\n\n".join(parts) + "\n"


def _service_text(service: ServiceDescriptorProto, package: str) -> str:
    lines = [f"service {service.name} {{"]
    shadows = tuple(each.name for each in service.method)
    for each in service.method:
        sent = f"{'stream ' if each.client_streaming else ''}{_relative(each.input_type, package, shadows)}"
        back = f"{'stream ' if each.server_streaming else ''}{_relative(each.output_type, package, shadows)}"
        lines.append(f"  rpc {each.name}({sent}) returns ({back});")
    return "\n".join([*lines, "}"])


def _message_text(message: DescriptorProto, package: str, inside: str) -> list[str]:
    full = f".{inside}.{message.name}"
    maps = {f"{full}.{each.name}": each for each in message.nested_type if each.options.map_entry}
    shadows = tuple(each.name for each in message.field)
    lines = [f"message {message.name} {{"]
    for nested in message.nested_type:
        if not nested.options.map_entry:
            lines += [f"  {line}" for line in _message_text(nested, package, full[1:])]
    for field in message.field:
        if field.type_name in maps:
            key, value = maps[field.type_name].field
            kind = f"map<{_type_text(key, package, shadows)}, {_type_text(value, package, shadows)}>"
        else:
            label = "optional " if field.proto3_optional else "repeated " if field.label == field.LABEL_REPEATED else ""
            kind = f"{label}{_type_text(field, package, shadows)}"
        options = f' [json_name = "{field.json_name}"]' if field.json_name else ""
        lines.append(f"  {kind} {field.name} = {field.number}{options};")
    return [*lines, "}"]


def _enum_text(enum: EnumDescriptorProto) -> list[str]:
    return [f"enum {enum.name} {{", *(f"  {each.name} = {each.number};" for each in enum.value), "}"]


def _type_text(field: FieldDescriptorProto, package: str, shadows: tuple[str, ...]) -> str:
    if field.type_name:
        return _relative(field.type_name, package, shadows)
    return field.Type.Name(field.type).removeprefix("TYPE_").lower()


def _relative(name: str, package: str, shadows: tuple[str, ...]) -> str:
    """Without the package, unless a neighbour has the name: protoc would find that first."""
    short = name.removeprefix(f".{package}.").removeprefix(".")
    first = short.partition(".")[0]
    return name if first in shadows or first == package.partition(".")[0] else short
