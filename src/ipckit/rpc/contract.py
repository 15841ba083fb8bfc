"""What a service promises, read from its annotations.

    class Shop(ipckit.Service):
        @ipckit.rpc(idempotent=True)
        def price(self, item: str) -> int: ...
        def order(self, order: Order) -> Receipt: ...           # answers to `order`, and to the message type `Order`
        def watch(self, item: str) -> Iterator[int]: ...        # server stream
        def upload(self, parts: Iterator[bytes]) -> int: ...    # client stream; both together: bidirectional

`contract_of` makes a `Contract` of a class, an instance or a function; `Method.wire` are its codecs. Values are validated where
they arrive, on both sides. `compat` compares two contracts, by the JSON-able `Contract.describe()`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import inspect
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, Self, TypeVar, overload

import msgspec

from .. import errors
from ..codecs import _with_path
from ._description import describe, fingerprint

F = TypeVar("F", bound=Callable[..., Any])
Format = Literal["msgpack", "json"]
_MARK = "__ipckit_rpc__"
_STREAMS = (
    collections.abc.Iterator,
    collections.abc.AsyncIterator,
    collections.abc.Generator,
    collections.abc.AsyncGenerator,
    collections.abc.Iterable,
    collections.abc.AsyncIterable,
)


class Shape(enum.Enum):
    """Who streams."""

    UNARY = "unary"
    SERVER_STREAM = "server stream"
    CLIENT_STREAM = "client stream"
    BIDIRECTIONAL = "bidirectional"

    @property
    def streams_in(self) -> bool:
        """The client sends a stream."""
        return self in (Shape.CLIENT_STREAM, Shape.BIDIRECTIONAL)

    @property
    def streams_out(self) -> bool:
        """The server sends a stream."""
        return self in (Shape.SERVER_STREAM, Shape.BIDIRECTIONAL)


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What `@ipckit.rpc(...)` says about a method."""

    idempotent: bool = False
    inline: bool | None = None


class Service:
    """The base of services: every public method with annotations can be called remotely.

    The same class is the contract: `client(url, Shop)` returns an object that is typed as a `Shop`, whose methods call the
    server.
    """

    def close(self) -> Any:
        """Of a client: close its connection (to be awaited where its calls are). A server does not call it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        closing = self.close()
        if inspect.isawaitable(closing):
            await closing


@overload
def rpc(function: F, /) -> F: ...
@overload
def rpc(*, idempotent: bool = False, inline: bool | None = None) -> Callable[[F], F]: ...
def rpc(function: Any = None, /, *, idempotent: bool = False, inline: bool | None = None) -> Any:
    """Mark a function, or a method of any class, as callable remotely.

    Args:
        function: what is marked, when used without parentheses.
        idempotent: calling it twice is calling it once; a client may repeat it after a lost connection.
        inline: True: it is short and never blocks, so run it on the thread that received it (or on the event loop). False: never
            there. None: a server of threads learns it from how long the calls take, an event loop takes it for False.
    """
    options = MethodOptions(idempotent, inline)

    def mark(function: F) -> F:
        setattr(function, _MARK, options)
        return function

    return mark if function is None else mark(function)


def _converted(error: msgspec.ValidationError, names: tuple[str, ...] = (), root: str = "$") -> errors.SchemaError:
    """Names in place of positions: `$[1].qty` of the second parameter `order` is `$.order.qty`."""
    text = root + _with_path(str(error)).removeprefix("$")
    for number, name in enumerate(names):
        if text.startswith(f"$[{number}]"):
            text = f"$.{name}{text[len(f'$[{number}]') :]}"
            break
    return errors.SchemaError(text)


def decoder(format: Format, type: Any, names: tuple[str, ...] = (), root: str = "$") -> Callable[[Any], Any]:
    """Raises SchemaError, CodecError. `names`: of the elements of an array. `root`: where the value stands."""
    decode = (msgspec.json if format == "json" else msgspec.msgpack).Decoder(type).decode

    def checked(data: Any) -> Any:
        try:
            return decode(data)
        except msgspec.ValidationError as error:
            raise _converted(error, names, root) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise errors.CodecError(f"this is no {format}: {error}") from error

    return checked


def _encoder(format: Format) -> Callable[[Any], bytes]:
    """The bare encoder: what it raises is turned by `unwritable` where it is caught, off the hot path."""
    encode: Callable[[Any], bytes] = (msgspec.json if format == "json" else msgspec.msgpack).Encoder().encode
    return encode


def unwritable(error: Exception, url: object = None, operation: str | None = None) -> errors.CodecError:
    return errors.CodecError(f"this value cannot be sent: {error}", url=url, operation=operation)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a method that is not a stream. `keyword`: it can be given by its name only."""

    name: str
    type: Any
    default: Any = inspect.Parameter.empty
    keyword: bool = False

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True, slots=True)
class Wire:
    """The codecs of one method in one format.

    `decode_args` returns the arguments in the order of `Method.parameters`; `encode_args` takes them like that.
    """

    encode_args: Callable[[tuple[Any, ...]], bytes]
    decode_args: Callable[[Any], tuple[Any, ...]]
    encode: Callable[[Any], bytes]
    decode_result: Callable[[Any], Any]
    decode_item: Callable[[Any], Any]


@dataclass(eq=False)
class Method:
    """One method of a contract.

    Attributes:
        result: type of the result, or of the items of the result stream.
        stream: name of the parameter that is a stream, or None; `item` is the type of its items.
        message: name of the type of its single Struct or dataclass, to which it answers as well; or None.
        coroutine: a coroutine function or an asynchronous generator function.
    """

    name: str
    function: Callable[..., Any]
    shape: Shape
    parameters: tuple[Parameter, ...]
    result: Any
    stream: str | None
    stream_index: int
    item: Any
    message: str | None
    coroutine: bool
    options: MethodOptions

    def __post_init__(self) -> None:
        self._wires: dict[tuple[Format, bool], Wire] = {}
        self._names = tuple(parameter.name for parameter in self.parameters)
        self._signature = inspect.Signature(
            [
                inspect.Parameter(
                    each.name,
                    inspect.Parameter.KEYWORD_ONLY if each.keyword else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=each.default,
                )
                for each in sorted(self.parameters, key=lambda each: each.keyword)
            ]
        )
        #: All arguments are positional and required: they can be taken as they are.
        self.plain = all(each.required and not each.keyword for each in self.parameters)

    def wire(self, format: Format, *, named: bool) -> Wire:
        """`named`: arguments as a map by name (or the single message itself), as the envelopes have it; else an array."""
        found = self._wires.get((format, named))
        if found is None:
            found = self._wires[format, named] = self._make_wire(format, named)
        return found

    def _make_wire(self, format: Format, named: bool) -> Wire:
        encode = _encoder(format)
        encode_args, decode_args = self._named(format) if named else self._positional(format)
        decode_result = decoder(format, self.result)
        decode_item = decoder(format, self.item, root=f"$.{self.stream}[]")
        return Wire(encode_args, decode_args, encode, decode_result, decode_item)

    def _positional(self, format: Format) -> tuple[Callable[[Any], bytes], Callable[[Any], tuple[Any, ...]]]:
        encode = _encoder(format)
        if self.plain:
            array = tuple[tuple(each.type for each in self.parameters)] if self.parameters else tuple[()]  # type: ignore[misc]
            return encode, decoder(format, array, self._names)
        decode = decoder(format, self._record(array_like=True), self._names)
        return encode, lambda data: msgspec.structs.astuple(decode(data))

    def _named(self, format: Format) -> tuple[Callable[[Any], bytes], Callable[[Any], tuple[Any, ...]]]:
        encode = _encoder(format)
        if self.message is not None:
            decode_message = decoder(format, self.parameters[0].type)
            return lambda args: encode(args[0]), lambda data: (decode_message(data),)
        names = self._names
        empty = encode(None)
        decode = decoder(format, self._record(array_like=False))

        def decode_args(data: Any) -> tuple[Any, ...]:
            return msgspec.structs.astuple(
                decode(b"{}" if format == "json" else b"\x80") if data == empty else decode(data)
            )

        return lambda args: encode(dict(zip(names, args, strict=True))), decode_args

    def _record(self, *, array_like: bool) -> type[msgspec.Struct]:
        fields: list[Any] = []
        for each in self.parameters:
            if each.required:
                fields.append((each.name, each.type))
            else:
                fields.append((each.name, each.type, msgspec.field(default_factory=partial(_same, each.default))))
        return msgspec.defstruct(self.name, fields, array_like=array_like, kw_only=not array_like)

    def bind(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        """The arguments in the order of `parameters`, and the stream. Raises TypeError, as calling the function would."""
        stream = None
        if self.stream is not None:
            if self.stream in named:
                stream = named.pop(self.stream)
            elif self.stream_index < len(args):
                stream = args[self.stream_index]
                args = (*args[: self.stream_index], *args[self.stream_index + 1 :])
            else:
                raise TypeError(f"{self.name}() needs the stream {self.stream!r}")
        if self.plain and not named and len(args) == len(self.parameters):
            return args, stream
        bound = self._signature.bind(*args, **named)
        bound.apply_defaults()
        return tuple(bound.arguments[name] for name in self._names), stream

    def invoke(self, function: Callable[..., Any], args: tuple[Any, ...], stream: Any) -> Any:
        """Call the handler with decoded arguments."""
        if self.plain and self.stream is None:
            return function(*args)
        positional: list[Any] = [arg for arg, each in zip(args, self.parameters, strict=True) if not each.keyword]
        if self.stream is not None:
            positional.insert(self.stream_index, stream)
        named = {each.name: arg for arg, each in zip(args, self.parameters, strict=True) if each.keyword}
        return function(*positional, **named)


@dataclass(eq=False)
class Contract:
    """The methods of one service. `methods` by name; `messages` by the type of the single message that a method takes.

    A type that several methods take stands for none of them: `Order` must not cancel what it was meant to make.
    """

    name: str
    methods: dict[str, Method]

    @cached_property
    def messages(self) -> dict[str, Method]:
        taken = Counter(method.message for method in self.methods.values())
        return {each.message: each for each in self.methods.values() if each.message and taken[each.message] == 1}

    def find(self, name: str) -> Method | None:
        return self.methods.get(name) or self.messages.get(name)

    @cached_property
    def description(self) -> dict[str, Any]:
        return describe(self)

    def describe(self) -> dict[str, Any]:
        """The contract as JSON: methods with their shapes, and the JSON Schema of every type."""
        return self.description

    @cached_property
    def fingerprint(self) -> str:
        """64 bits of SHA-256 of the description, in hex. Contracts that mean the same have the same one."""
        return fingerprint(self.description)


# -- reading annotations -----------------------------------------------------------------------------------------------

_contracts: dict[type, Contract] = {}


def contract_of(service: Any) -> Contract:
    """The contract of a Service class or instance, of any object with `@ipckit.rpc` methods, or of a function.

    Raises ConfigError, naming the method and the parameter, for what has no annotation or a type that cannot travel.
    """
    if isinstance(service, Contract):
        return service
    if isinstance(service, types.FunctionType | types.MethodType):
        options = getattr(service, _MARK, MethodOptions())
        return Contract(
            service.__name__, {service.__name__: _method(service.__name__, service, bound=True, options=options)}
        )
    cls = service if isinstance(service, type) else type(service)
    found = _contracts.get(cls)
    if found is None:
        found = _contracts[cls] = _contract_of_class(cls)
    return found


def target_name(service: Any) -> str:
    """Under which name a service is exposed unless another is given: its class's, in lower case."""
    if isinstance(service, types.FunctionType | types.MethodType):
        return service.__name__
    cls = service if isinstance(service, type) else type(service)
    return cls.__name__.lower()


def _contract_of_class(cls: type) -> Contract:
    methods = {}
    for name, function in _public(cls):
        methods[name] = _method(name, function, bound=False, options=_mark_of(cls, name) or MethodOptions())
    if not methods:
        raise errors.ConfigError(
            f"{cls.__name__} has no method that could be called",
            hint="subclass ipckit.Service, or mark methods with @ipckit.rpc",
        )
    return Contract(cls.__name__, methods)


def _public(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    every = issubclass(cls, Service)
    for name in dir(cls):
        function = inspect.getattr_static(cls, name)
        if name.startswith("_"):
            continue
        if isinstance(function, staticmethod | classmethod):
            if hasattr(function.__func__, _MARK):
                raise errors.ConfigError(
                    f"{cls.__name__}.{name} is no method of an instance", hint="what is called remotely takes `self`"
                )
        elif isinstance(inspect.unwrap(function) if callable(function) else None, types.FunctionType):
            inherited = every and not hasattr(Service, name)
            if inherited or _mark_of(cls, name) is not None:
                yield name, function


def _mark_of(cls: type, name: str) -> MethodOptions | None:
    """What was said about a method, by its class or by one that it overrides."""
    marks = (getattr(vars(each).get(name), _MARK, None) for each in cls.__mro__)
    return next((mark for mark in marks if mark is not None), None)


def _method(name: str, function: Callable[..., Any], *, bound: bool, options: MethodOptions) -> Method:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise errors.ConfigError(f"{function.__qualname__}: an annotation cannot be resolved: {error}") from error
    parameters: list[Parameter] = []
    stream, stream_index, item = None, -1, Any
    given = [*inspect.signature(function).parameters.values()]
    for index, each in enumerate(given if bound else given[1:]):
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            raise errors.ConfigError(f"{function.__qualname__}: *{each.name} cannot travel; name its parameters")
        if each.name not in hints:
            raise errors.ConfigError(f"{function.__qualname__}: the parameter {each.name!r} has no annotation")
        streamed = _stream_of(hints[each.name])
        if streamed is None:
            parameters.append(Parameter(each.name, hints[each.name], each.default, each.kind is each.KEYWORD_ONLY))
        elif stream is None:
            stream, stream_index, item = each.name, index, streamed[0]
        else:
            raise errors.ConfigError(f"{function.__qualname__}: only one parameter may be a stream")
    if "return" not in hints:
        raise errors.ConfigError(f"{function.__qualname__} has no annotation of its result (-> None?)")
    result, out = hints["return"], _stream_of(hints["return"])
    if out is not None:
        result = out[0]
    shape = {
        (False, False): Shape.UNARY,
        (False, True): Shape.SERVER_STREAM,
        (True, False): Shape.CLIENT_STREAM,
        (True, True): Shape.BIDIRECTIONAL,
    }[stream is not None, out is not None]
    only = parameters[0].type if len(parameters) == 1 and stream is None else None
    method = Method(
        name=name,
        function=function,
        shape=shape,
        parameters=tuple(
            sorted(parameters, key=lambda each: not each.required)
        ),  # keyword-only ones have no order of their own
        result=result,
        stream=stream,
        stream_index=stream_index,
        item=item,
        message=only.__name__ if isinstance(only, type) and _is_record(only) else None,
        coroutine=inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function),
        options=options,
    )
    try:
        method.wire("msgpack", named=False)
        method.wire("json", named=True)
        msgspec.json.schema_components([*(each.type for each in parameters), item, result])  # decoders take any class
    except TypeError as error:
        raise errors.ConfigError(f"{function.__qualname__}: a type that cannot travel: {error}") from error
    return method


def _stream_of(annotation: Any) -> tuple[Any] | None:
    origin = typing.get_origin(annotation) or annotation
    if origin not in _STREAMS:
        return None
    arguments = typing.get_args(annotation)
    return (arguments[0] if arguments else Any,)


def _is_record(kind: type) -> bool:
    return issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind)


def _same(value: Any) -> Any:
    return value
