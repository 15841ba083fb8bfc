"""The versioned dialect: a header that says version, type and (from version 2 on) format, and whose length does not count it.

Clients of version 1 are read as such; the server writes version 2 to everybody, and pushes in JSON. Every question has a
`correlation_id`, so answers may overtake each other. A body that cannot be read is answered; a header that cannot be read
ends the connection.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ..errors import ProtocolError
from . import events
from .envelope import NAMES, Asked, Envelope, UnsupportedVersion, code_of, text_of
from .events import Event

REQUEST, RESPONSE, ERROR, HEARTBEAT, PUSH, SUBSCRIBE, UNSUBSCRIBE, DISCOVER, STREAM = range(1, 10)
JSON, MSGPACK = 1, 2
#: What a frame of ours begins with: version, type, format.
_HEADER = 3
_UNKNOWN = "unknown"  # the correlation id of who gave none that could be read
_REJECTED = "__acton_connection_rejected__"
#: Seconds; longer ones are as good as none.
_LONGEST = 10 * 365 * 86400.0

_Milliseconds = Annotated[int, msgspec.Meta(ge=0)]


class _Request(msgspec.Struct):
    correlation_id: str
    target: str
    message_type: str
    payload: msgspec.Raw
    expects_reply: bool = False
    expects_stream: bool = False
    response_timeout_ms: _Milliseconds = 30_000
    reply_to: str | None = None


class _Types(msgspec.Struct):
    correlation_id: str
    message_types: list[str]


class _Discover(msgspec.Struct):
    correlation_id: str
    include_actors: bool = True
    include_message_types: bool = True


class _Named(msgspec.Struct):
    correlation_id: str = _UNKNOWN


class _Capabilities(msgspec.Struct):
    messagepack: bool = True
    streaming: bool = True
    push: bool = True
    discovery: bool = True


class _ProtocolVersion(msgspec.Struct):
    current: int = 2
    min_supported: int = 1
    max_supported: int = 2
    description: str = "versioned envelope: v1 is JSON, v2 is JSON or MessagePack"
    capabilities: _Capabilities = msgspec.field(default_factory=_Capabilities)


class _Actor(msgspec.Struct):
    name: str
    ern: str


class _Response(msgspec.Struct, omit_defaults=True):
    correlation_id: str
    success: bool
    error: str | UnsetType = UNSET
    error_code: str | UnsetType = UNSET
    payload: msgspec.Raw | dict[str, Any] | UnsetType = UNSET
    subscribed_types: msgspec.Raw | UnsetType = UNSET
    protocol_version: _ProtocolVersion | UnsetType = UNSET
    actors: list[_Actor] | UnsetType = UNSET
    message_types: list[str] | UnsetType = UNSET


class _StreamFrame(msgspec.Struct, omit_defaults=True):
    correlation_id: str
    sequence: int
    is_final: bool
    error: str | UnsetType = UNSET
    error_code: str | UnsetType = UNSET
    payload: msgspec.Raw | UnsetType = UNSET


class _Push(msgspec.Struct):
    notification_id: str
    message_type: str
    payload: msgspec.Raw
    timestamp_ms: int


class _Codec:
    """One format, by its number."""

    def __init__(self, number: int, name: Literal["json", "msgpack"]) -> None:
        module: Any = msgspec.json if name == "json" else msgspec.msgpack
        self.number = number
        self.name: Literal["json", "msgpack"] = name
        self.read = {
            REQUEST: module.Decoder(_Request).decode,
            SUBSCRIBE: module.Decoder(_Types).decode,
            UNSUBSCRIBE: module.Decoder(_Types).decode,
            DISCOVER: module.Decoder(_Discover).decode,
        }
        self.whose: Callable[[bytes], _Named] = module.Decoder(_Named).decode
        self.write: Callable[[Any], bytes] = module.Encoder().encode


_CODECS = {JSON: _Codec(JSON, "json"), MSGPACK: _Codec(MSGPACK, "msgpack")}


def _frame(kind: int, body: Any = None, codec: _Codec = _CODECS[JSON]) -> bytes:
    return bytes((2, kind, codec.number)) + (b"" if body is None else codec.write(body))


def unsupported(version: int) -> tuple[bytes, int]:
    """A frame for who speaks a version that does not exist yet, and how much of it is header."""
    failure = events.Failure(0, "VERSION", f"version {version} is not supported, 1 and 2 are")
    return Version2().encode(failure)[0], _HEADER


class Versioned(Envelope):
    _ordered = False
    _version: int
    _kinds: frozenset[int]
    _codec: _Codec | None = None  # from the first frame on that has a payload

    @property
    def format(self) -> Literal["msgpack", "json"]:
        return self._spoken.name

    @property
    def push_format(self) -> Literal["msgpack", "json"]:
        return "json"

    @property
    def _spoken(self) -> _Codec:
        return self._codec or _CODECS[JSON]

    # -- what comes

    def decode(self, frame: bytes) -> Sequence[Event]:
        header = self.uncounted[0]
        if frame[0] != self._version:
            raise UnsupportedVersion(f"version {frame[0]} on a connection of version {self._version}")
        kind, number = frame[1], frame[2] if header == _HEADER else JSON
        codec = _CODECS.get(number)
        if kind not in self._kinds or codec is None:
            raise ProtocolError(f"a client sent type {kind:#04x} in format {number:#04x}")
        if kind == HEARTBEAT:
            return (events.Heartbeat(),)
        if self._codec is None:
            self._codec = codec
        elif codec is not self._codec:
            raise ProtocolError(f"a connection in {self._codec.name} sent {codec.name}")
        return (self._read(kind, frame[header:]),)

    def _read(self, kind: int, payload: bytes) -> Event:
        try:
            said = self._spoken.read[kind](payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return events.Malformed(self._questions.new(Asked(self._author(payload))), str(error))
        if isinstance(said, _Request):
            return self._call(said)
        if isinstance(said, _Discover):
            id = self._questions.new(Asked(said.correlation_id, kind="discovery"))
            return events.Discover(id, said.include_actors, said.include_message_types)
        id = self._questions.new(Asked(said.correlation_id, kind="subscription"))
        return (events.Subscribe if kind == SUBSCRIBE else events.Unsubscribe)(id, said.message_types)

    def _call(self, said: _Request) -> Event:
        oneway = not said.expects_reply and not said.expects_stream
        kind: Literal["stream", "oneway", "call"] = "stream" if said.expects_stream else "oneway" if oneway else "call"
        id = self._questions.new(Asked(said.correlation_id, said.message_type, kind))
        return events.Call(
            id,
            said.target,
            said.message_type,
            bytes(said.payload),
            None if oneway else min(said.response_timeout_ms / 1000, _LONGEST),
            reply_to=said.reply_to or "",
            stream=said.expects_stream,
            oneway=oneway,
        )

    def _author(self, payload: bytes) -> str:
        try:
            return self._spoken.whose(payload).correlation_id
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return _UNKNOWN

    # -- what goes

    def encode(self, event: Event) -> Sequence[bytes]:
        if isinstance(event, events.Heartbeat):
            return (_frame(HEARTBEAT),)
        if isinstance(event, events.Push):
            stamp = int(self._clock() * 1000)
            return (_frame(PUSH, _Push(str(uuid.uuid4()), event.type, msgspec.Raw(event.body), stamp)),)
        if isinstance(event, events.Failure) and not event.id:
            return (self._error(_UNKNOWN, event),)
        if not isinstance(
            event,
            events.Result | events.Failure | events.Item | events.End | events.Accepted | events.Discovered,
        ):
            return ()  # there is no word for it
        asked = self._questions.get(event.id)
        if asked is None:
            return ()
        if isinstance(event, events.Item):
            return self._questions.answer(event.id, (self._item(asked, event.body),), last=False)
        if isinstance(event, events.Result) and asked.kind == "stream":  # one value, for who expects a stream
            return self._questions.answer(event.id, (self._item(asked, event.body), self._end(asked)), last=True)
        return self._questions.answer(event.id, (self._last(event, asked),), last=True)

    def _item(self, asked: Asked, body: bytes) -> bytes:
        asked.sequence += 1
        return self._stream(asked, asked.sequence - 1, False, payload=msgspec.Raw(body))

    def _end(self, asked: Asked) -> bytes:
        return self._stream(asked, asked.sequence, True)

    def _last(self, event: Event, asked: Asked) -> bytes:
        correlation = asked.correlation or _UNKNOWN
        if isinstance(event, events.End):
            return self._end(asked)
        if isinstance(event, events.Failure):
            if asked.kind == "stream" and (asked.sequence or event.code == "REMOTE_ERROR"):
                code = NAMES[code_of(event, stream=True)].versioned
                return self._stream(asked, asked.sequence, True, error=text_of(event), error_code=code)
            return self._error(correlation, event)
        if isinstance(event, events.Accepted):
            return self._response(_Response(correlation, True, payload={"status": "delivered"}))
        if isinstance(event, events.Discovered):
            actors = [_Actor(name, f"ern:ipckit:rpc:target:{name}") for name in event.targets or ()]
            return self._response(
                _Response(
                    correlation,
                    True,
                    protocol_version=_ProtocolVersion(),
                    actors=UNSET if event.targets is None else actors,
                    message_types=UNSET if event.types is None else event.types,
                )
            )
        assert isinstance(event, events.Result)
        body = msgspec.Raw(event.body)
        if asked.kind == "subscription":
            return self._response(_Response(correlation, True, subscribed_types=body))
        return self._response(_Response(correlation, True, payload=body))

    def _response(self, body: _Response) -> bytes:
        return _frame(RESPONSE, body, self._spoken)

    def _stream(self, asked: Asked, sequence: int, final: bool, **more: Any) -> bytes:
        return _frame(STREAM, _StreamFrame(asked.correlation or _UNKNOWN, sequence, final, **more), self._spoken)

    def _error(self, correlation: str, failure: events.Failure) -> bytes:
        code = NAMES[code_of(failure)].versioned
        return _frame(ERROR, _Response(correlation, False, text_of(failure), code), self._spoken)

    def whose(self, frame: bytes) -> int:
        if frame[1] in (PUSH, HEARTBEAT):
            return 0
        return self._questions.blamed(_CODECS[frame[2]].whose(frame[_HEADER:]).correlation_id)

    def turn_away(self, limit: int) -> Sequence[bytes]:
        text = f"the server has {limit} connections already"
        code = NAMES["CONNECTION_LIMIT"].versioned
        return (_frame(ERROR, _Response(_REJECTED, False, text, code, payload={"limit": limit}), self._spoken),)


class Version1(Versioned):
    name = "versioned, v1"
    uncounted = (2, _HEADER)
    _version = 1
    _kinds = frozenset((REQUEST, HEARTBEAT))


class Version2(Versioned):
    name = "versioned, v2"
    uncounted = (_HEADER, _HEADER)
    _version = 2
    _kinds = frozenset((REQUEST, HEARTBEAT, SUBSCRIBE, UNSUBSCRIBE, DISCOVER))
