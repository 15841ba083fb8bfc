"""What the two clients share: how procedures are found, what an error means, how contracts are compared, without waiting."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ... import _options, errors
from ..._spi import Steps, Wait
from ..._url import Url
from ...transports import _grpc_home, _grpc_place
from ...transports._grpc_place import PlaceOptions
from .. import compat
from .._calling import Base
from .._exposed import BUILT_IN
from .._protofile import add_well_known, camel
from .._protovalues import Converter, to_builtins
from .._request import Left, Request
from ..contract import Contract, Method, Shape
from ..protobuf import MethodSchema, schema_of
from ._info import INFO, SCHEMA
from ._status import error_of, failure_of

TARGETS, DESCRIBE, DESCRIPTOR, PUSHES = (INFO.methods[name] for name in ("targets", "describe", "descriptor", "pushes"))


class Line:
    """A grpcio channel, as the client's resource."""

    def __init__(self, url: Url, channel: Any, close: Callable[[], None]) -> None:
        self.link = self
        self.error: errors.IpcError | None = None
        self.native = channel
        self._url, self._close = url, close

    def close(self) -> None:
        self._close()

    def abandon(self) -> None:
        """In a forked child."""
        _grpc_home.park(self._url, _grpc_place.path_of(self._url))


class Routes(Base):
    """Mixed into both. Nothing here waits."""

    def _prepare(self) -> None:
        """At the end of the constructor."""
        _grpc_place.check(self.url)
        _grpc_home.use(self.url, "client")
        self._place_options = _options.read(PlaceOptions, self.url)
        self._credentials = _grpc_place.client_credentials(self.url, self._place_options)
        self._schemas: dict[tuple[str, Method], MethodSchema] = {}
        self._stubs: dict[str, Any] = {}
        self._learn(BUILT_IN, INFO)
        self._files: dict[str, bytes] = {}  # of targets that are called without a contract
        self._agreed: set[tuple[str, str]] = set()
        self._greeted = False  # the server is an ipckit's
        self._doubtful = False  # the connection was lost, and nobody has looked since
        self._held = ExitStack()  # what the address needs for as long as it is used

    def _arriving(self) -> Steps[str]:
        """The address in gRPC's words, once it can be there."""
        try:
            while True:
                target = self._held.enter_context(_grpc_place.target_of(self.url))
                if target is not None:
                    return target
                yield Wait((), 0.01)
        except errors.Timeout as error:
            raise errors.NothingListening("nobody listens there", url=self.url, operation="client") from error

    def _settings(self) -> list[tuple[str, Any]]:
        settings = [
            *_grpc_place.settings_of(self._place_options),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", _grpc_place.WINDOW),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.initial_reconnect_backoff_ms", 20),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if self._place_options.server_name is not None and self._credentials is not None:
            settings.append(("grpc.ssl_target_name_override", self._place_options.server_name))
        return settings

    # -- procedures ----------------------------------------------------------------------------------------------------

    def _learn(self, target: str, contract: Contract) -> None:
        schema = SCHEMA if target == BUILT_IN else schema_of(contract, target)
        for name, method in contract.methods.items():
            self._schemas[target, method] = schema.methods[name]

    def _schema(self, target: str, method: Method) -> MethodSchema:
        found = self._schemas.get((target, method))
        if found is None:  # without a contract
            found = _dynamic(method, self._files[target], self._described[target])
        return found

    def _stub(self, schema: MethodSchema, shape: Shape) -> Any:
        """What grpcio calls a procedure by."""
        found = self._stubs.get(schema.path)
        if found is None:
            line = self._lines.conn
            if line is None:
                raise errors.Closed("this endpoint is closed", url=self.url, operation="call")
            kind = f"{'stream' if shape.streams_in else 'unary'}_{'stream' if shape.streams_out else 'unary'}"
            found = self._stubs[schema.path] = getattr(line.link.native, kind)(schema.path)
        return found

    def _question(self, method: Method, args: tuple[Any, ...], deadline: float | None) -> Request:
        """To the server about itself."""
        return Request(BUILT_IN, method, args, None, dict(self._options.metadata), deadline)

    def _headers(self, request: Request) -> tuple[tuple[str, str], ...]:
        for name, value in request.metadata.items():
            if name.startswith("grpc-") or name.endswith("-bin") or not (value.isascii() and value.isprintable()):
                raise errors.BadOption(
                    f"gRPC cannot carry the header {name!r}: names of its own are taken, and values are printable ASCII",
                    url=self.url,
                    operation=request.operation,
                )
        return tuple(request.metadata.items())

    # -- what went wrong -----------------------------------------------------------------------------------------------

    def _error(self, error: Any, operation: str | None) -> errors.IpcError:
        """In our words, and noted."""
        if self.closed:
            return errors.Closed("this endpoint is closed", url=self.url, operation=operation)
        found = error_of(error, self.url, operation)
        unknown = error.code() is grpc.StatusCode.UNIMPLEMENTED and self._greeted
        if unknown and "not found" in (error.details() or "") and failure_of(error.trailing_metadata()) is None:
            # gRPC's own words for a path that nobody has. A target of ours answers for the methods that it lacks.
            return errors.UnknownTarget("nothing is exposed there", url=self.url, operation=operation)
        if isinstance(found, errors.PeerDied | errors.NothingListening):
            self._doubtful = True
        return found

    def _nobody(self, late: errors.DeadlineExceeded) -> errors.NothingListening:
        """There was no server in time; what came last in its place says most."""
        last = late.__cause__
        why = last.message if isinstance(last, errors.PeerDied | errors.NothingListening) else "nobody answers there"
        return errors.NothingListening(why, url=self.url, operation="client")

    # -- contracts -----------------------------------------------------------------------------------------------------

    def _differs(self, targets: Mapping[str, str], target: str, contract: Contract) -> bool:
        """Raises UnknownTarget."""
        theirs = targets.get(target)
        if theirs is None:
            have = ", ".join(sorted(targets)) or "nothing"
            raise errors.UnknownTarget(
                f"nothing is exposed as {target!r}", url=self.url, operation="client", hint=f"there is: {have}"
            )
        return theirs not in ("", contract.fingerprint)  # a user-compiled servicer is taken at its word

    def _fits(self, target: str, contract: Contract, description: dict[str, Any], file: bytes) -> None:
        """Raises SchemaError for what the server has changed and a caller of `contract` would break on."""
        broken = compat.check(contract.description, description)
        broken = broken or list(renumbered(schema_of(contract, target).file, file))
        if broken:
            raise errors.SchemaError(
                f"the server's {target!r} is not compatible with {contract.name}: " + "; ".join(broken),
                url=self.url,
                operation="client",
                hint="`ipckit contract check` compares the two",
            )


def renumbered(ours: descriptor_pb2.FileDescriptorProto, theirs: bytes) -> list[str]:
    """Fields that have the same name and another number or type: by name they would be compatible, in protobuf they are not."""
    file = descriptor_pb2.FileDescriptorProto.FromString(theirs)
    there = {message.name: {field.name: field for field in message.field} for message in file.message_type}
    found = []
    for message in ours.message_type:
        for field in message.field:
            other = there.get(message.name, {}).get(field.name)
            if other is not None and (other.number, other.type) != (field.number, field.type):
                found.append(f"{message.name}.{field.name}: has the number {field.number} here, {other.number} there")
    return found


def _dynamic(method: Method, file: bytes, description: Mapping[str, Any]) -> MethodSchema:
    """A method of a server that described itself: values are plain."""
    proto = descriptor_pb2.FileDescriptorProto.FromString(file)
    pool = descriptor_pool.DescriptorPool()  # type: ignore[no-untyped-call, unused-ignore]
    add_well_known(pool)
    pool.Add(proto)  # type: ignore[no-untyped-call, unused-ignore]
    definitions, said = description["$defs"], description["methods"][method.name]
    service, convert = proto.service[0], Converter({}, frozenset())
    rpc = next(each for each in service.method if each.name == camel(method.name))

    def message(name: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(name.lstrip(".")))  # type: ignore[no-untyped-call, unused-ignore]

    request, response = message(rpc.input_type), message(rpc.output_type)
    write, read = convert.writer(request.DESCRIPTOR), convert.reader(response.DESCRIPTOR)
    names = [each.name for each in method.parameters]
    item = None
    if method.shape.streams_in and (names or not _is_record(said["items"], definitions)):
        item = next(each.name for each in request.DESCRIPTOR.fields if each.name not in names)
    result = None if _is_record(said["result"], definitions) else "result"

    def written(fields: Any) -> Any:
        try:
            return write(request(), to_builtins(fields))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise errors.SchemaError(f"this is no {request.DESCRIPTOR.full_name}: {error}") from error

    def encode_args(args: tuple[Any, ...]) -> Any:
        if said.get("message") is not None:
            return written(args[0])
        return written({name: value for name, value in zip(names, args, strict=False) if not isinstance(value, Left)})

    def decode_result(found: Any) -> Any:
        fields = read(found)
        return fields if result is None else fields.get(result)

    def nobody(_: Any) -> Any:
        raise TypeError("this is the server's")

    return MethodSchema(
        method=method,
        rpc=rpc.name,
        path=f"/{proto.package}.{service.name}/{rpc.name}",
        request=request,
        response=response,
        opens=method.shape.streams_in and bool(names),
        encode_args=encode_args,
        decode_args=nobody,
        encode_item=lambda value: written(value if item is None else {item: value}),
        decode_item=nobody,
        has_item=lambda _: True,
        encode_result=nobody,
        decode_result=decode_result,
    )


def _is_record(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> bool:
    """It is a message by itself, and not the field of one."""
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return schema.get("type") == "object" and "properties" in schema


def left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


__all__ = ["DESCRIBE", "DESCRIPTOR", "PUSHES", "TARGETS", "Line", "Routes", "left"]
