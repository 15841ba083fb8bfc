"""Values to protobuf messages and back, by the descriptors alone: what msgspec calls builtins on one side.

A message of the group `Wrapped` stands for the list, map or optional that it wraps. `google.protobuf.Value` is any JSON value;
bytes in it are base64, and an integer that a double does not hold exactly is refused.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import msgspec

from .contract import unwritable

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor, FieldDescriptor
    from google.protobuf.message import Message

#: Where the messages are declared that protobuf needs around lists, maps and optionals.
WRAPPED = "Wrapped"
VALUE = "google.protobuf.Value"
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_EXACT = 1 << 53

Reader: TypeAlias = Callable[[Any], Any]
#: Fills a message and returns it.
Writer: TypeAlias = Callable[[Any, Any], Any]


def to_builtins(value: Any) -> Any:
    """Raises CodecError."""
    try:
        return msgspec.to_builtins(value, builtin_types=(bytes, bytearray, memoryview))
    except (TypeError, RecursionError) as error:
        raise unwritable(error) from error


def identifier(name: str) -> str:
    """A name that protobuf can say. What had to be changed is kept as the JSON name."""
    if _IDENTIFIER.match(name):
        return name
    cleaned = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}"


def key_of(field: FieldDescriptor) -> str:
    """The name of a field in our values."""
    return field.name if _IDENTIFIER.match(field.json_name) else field.json_name


class Converter:
    """Makes readers and writers, each once.

    Args:
        enums: values of enums by the enum's name and the number; of an enum that is not there, the names are the values.
        nullable: (message, field) whose absence means None; else it means that the default holds.
    """

    def __init__(self, enums: Mapping[str, Mapping[int, Any]], nullable: Set[tuple[str, str]]) -> None:
        self._enums = enums
        self._nullable = nullable
        self._readers: dict[str, Reader] = {VALUE: read_value}
        self._writers: dict[str, Writer] = {VALUE: write_value}

    # -- messages to values --------------------------------------------------------------------------------------------

    def reader_of(self, kind: type[Message]) -> Reader:
        return self.reader(cast("Descriptor", kind.DESCRIPTOR))

    def writer_of(self, kind: type[Message]) -> Writer:
        return self.writer(cast("Descriptor", kind.DESCRIPTOR))

    def reader(self, descriptor: Descriptor) -> Reader:
        found = self._readers.get(descriptor.full_name)
        if found is None:
            self._readers[descriptor.full_name] = lambda message: self._readers[descriptor.full_name](message)
            found = self._readers[descriptor.full_name] = self._make_reader(descriptor)
        return found

    def _make_reader(self, descriptor: Descriptor) -> Reader:
        fields = [self._field_reader(descriptor, field) for field in descriptor.fields]
        if _is_wrapper(descriptor):
            _, wrapped, _ = fields[0]
            return wrapped

        def read(message: Any) -> dict[str, Any]:
            found = {}
            for key, get, absent in fields:
                if absent is None or message.HasField(absent[0]):
                    found[key] = get(message)
                elif absent[1]:
                    found[key] = None
            return found

        return read

    def _field_reader(self, owner: Descriptor, field: FieldDescriptor) -> tuple[str, Reader, tuple[str, bool] | None]:
        """(key, what reads the field, (name, it is None when it is absent) of one that can be absent)"""
        name = field.name
        get: Reader
        if (of := _map_value(field)) is not None:
            value = self._element_reader(of)
            get = lambda message: {key: value(getattr(message, name)[key]) for key in getattr(message, name)}  # noqa: E731
            return key_of(field), get, None
        one = self._element_reader(field)
        if field.is_repeated:
            return key_of(field), lambda message: [one(each) for each in getattr(message, name)], None
        if _is_wrapper(owner):
            return (
                key_of(field),
                lambda message: one(getattr(message, name)) if message.HasField(name) else None,
                None,
            )
        absent = (name, (owner.full_name, name) in self._nullable) if field.has_presence else None
        return key_of(field), lambda message: one(getattr(message, name)), absent

    def _element_reader(self, field: FieldDescriptor) -> Reader:
        if field.message_type is not None:
            return self.reader(field.message_type)
        if field.enum_type is not None:
            known = self._enums.get(field.enum_type.full_name)
            if known is None:
                names = {each.number: each.name for each in field.enum_type.values}
                return lambda number: names.get(number, number)
            what = field.enum_type.name
            return lambda number: known.get(number, f"({what} number {number})")
        return _same

    # -- values to messages --------------------------------------------------------------------------------------------

    def writer(self, descriptor: Descriptor) -> Writer:
        found = self._writers.get(descriptor.full_name)
        if found is None:
            self._writers[descriptor.full_name] = lambda message, value: self._writers[descriptor.full_name](
                message, value
            )
            found = self._writers[descriptor.full_name] = self._make_writer(descriptor)
        return found

    def _make_writer(self, descriptor: Descriptor) -> Writer:
        fields = {key_of(field): self._field_writer(field) for field in descriptor.fields}
        takes_none = {key_of(field) for field in descriptor.fields if _takes_none(field)}
        if _is_wrapper(descriptor):
            (wrapped,) = fields.values()
            (none,) = (bool(takes_none),)

            def wrap(message: Any, value: Any) -> Any:
                if value is not None or none:
                    wrapped(message, value)
                return message

            return wrap

        def write(message: Any, values: Any) -> Any:
            if not isinstance(values, dict):
                raise TypeError(f"{descriptor.name} is a message, got {type(values).__name__}")
            for key, value in values.items():
                put = fields.get(key)
                if put is not None and (value is not None or key in takes_none):
                    put(message, value)
            return message

        return write

    def _field_writer(self, field: FieldDescriptor) -> Callable[[Any, Any], None]:
        name = field.name
        if (of := _map_value(field)) is not None:
            return self._map_writer(name, of)
        if field.message_type is not None:
            write = self.writer(field.message_type)
            if field.is_repeated:

                def extend(message: Any, values: Any) -> None:
                    into = getattr(message, name)
                    for value in values:
                        write(into.add(), value)

                return extend

            def fill(message: Any, value: Any) -> None:
                inner = getattr(message, name)
                inner.SetInParent()
                write(inner, value)

            return fill
        number = self._number(field)
        if field.is_repeated:
            return lambda message, values: getattr(message, name).extend([number(each) for each in values])
        return lambda message, value: setattr(message, name, number(value))

    def _map_writer(self, name: str, of: FieldDescriptor) -> Callable[[Any, Any], None]:
        if of.message_type is None:
            number = self._number(of)

            def update(message: Any, values: Any) -> None:
                into = getattr(message, name)
                for key, value in values.items():
                    into[key] = number(value)

            return update
        write = self.writer(of.message_type)

        def fill(message: Any, values: Any) -> None:
            into = getattr(message, name)
            for key, value in values.items():
                write(into[key], value)

        return fill

    def _number(self, field: FieldDescriptor) -> Callable[[Any], Any]:
        enum = field.enum_type
        if enum is None:
            return bytes if field.type == field.TYPE_BYTES else _same
        known = self._enums.get(enum.full_name)
        if known is None:
            return lambda name: name if isinstance(name, int) else enum.values_by_name[name].number
        numbers = {value: number for number, value in known.items()}
        return numbers.__getitem__


def _same(value: Any) -> Any:
    return value


def _map_value(field: FieldDescriptor) -> FieldDescriptor | None:
    """What a map holds; None: it is no map."""
    entry = field.message_type
    return entry.fields_by_name["value"] if entry is not None and entry.GetOptions().map_entry else None


def _is_wrapper(descriptor: Descriptor) -> bool:
    return descriptor.containing_type is not None and descriptor.containing_type.name == WRAPPED


def _takes_none(field: FieldDescriptor) -> bool:
    """None is a value of its own, and not absence."""
    kind = field.message_type
    if kind is None or field.is_repeated:
        return False
    return kind.full_name == VALUE or (_is_wrapper(kind) and kind.name.startswith("Optional"))


# -- google.protobuf.Value ---------------------------------------------------------------------------------------------


def write_value(message: Any, value: Any) -> Any:
    if value is None:
        message.null_value = 0
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, int | float):
        if isinstance(value, int) and not -_EXACT <= value <= _EXACT:
            raise OverflowError(f"{value} does not fit a google.protobuf.Value exactly")
        message.number_value = value
    elif isinstance(value, str):
        message.string_value = value
    elif isinstance(value, bytes | bytearray | memoryview):
        message.string_value = base64.b64encode(value).decode()
    elif isinstance(value, dict):
        message.struct_value.SetInParent()
        for key, each in value.items():
            write_value(message.struct_value.fields[str(key)], each)
    else:
        message.list_value.SetInParent()
        for each in value:
            write_value(message.list_value.values.add(), each)
    return message


def read_value(message: Any) -> Any:
    kind = message.WhichOneof("kind")
    if kind == "number_value":
        number = message.number_value
        return int(number) if number.is_integer() and abs(number) <= _EXACT else number
    if kind == "struct_value":
        fields = message.struct_value.fields
        return {key: read_value(fields[key]) for key in fields}
    if kind == "list_value":
        return [read_value(each) for each in message.list_value.values]
    return None if kind in (None, "null_value") else getattr(message, kind)
