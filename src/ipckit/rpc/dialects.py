"""Frames to events and back. `Native` is what two ipckits speak, over any link; docs/wire/rpc.md has its bytes.

The first byte of a connection's first frame tells the dialect: 0xC1 is ours (MessagePack never begins with it, nor do JSON
and the versioned headers of the envelope protocol). A dialect is a small class per connection; it may keep state, such as an
item that waits for the word whether it was the last. It never fails but by `ProtocolError`, which costs the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from ..errors import MessageTooLarge, ProtocolError
from . import events
from .events import Event

#: magic, kind, bytes of the head, correlation id, number (by kind)
HEAD = struct.Struct(">BBHII")
MAGIC = 0xC1
_METADATA = 0x80  # a flag of the kind: the head is a MessagePack array [name, {metadata}]

HELLO, CALL, RESULT, FAILURE, ITEM, END, CREDIT, CANCEL = range(1, 9)
SUBSCRIBE, UNSUBSCRIBE, PUSH, GOODBYE, HEARTBEAT = range(9, 14)

#: The first bytes of the two frames that the shells may write and read themselves when nothing else is going on.
CALL_MARK = bytes((MAGIC, CALL))
RESULT_MARK = bytes((MAGIC, RESULT, 0, 0))

#: Bodies of frames from here on are not copied out of them.
_LARGE = 4096
_LONGEST_TTL = 0xFFFFFFFF / 1000


class Dialect(Protocol):
    """How one connection talks.

    Attributes:
        format: what bodies are written in.
        push_format: what the bodies of pushes are written in.
        named: arguments are a map by name, or the single message itself; else an array.
        flow: streams have credits. Without them the link alone holds a producer back.
    """

    name: str

    @property
    def format(self) -> Literal["msgpack", "json"]: ...

    @property
    def push_format(self) -> Literal["msgpack", "json"]: ...

    named: bool
    flow: bool

    def decode(self, frame: bytes) -> Sequence[Event]: ...

    def encode(self, event: Event) -> Sequence[bytes]: ...

    def whose(self, frame: bytes) -> int:
        """The call that a frame of ours belongs to; 0 for none."""


class Native:
    """Ours: a fixed header of 12 bytes, a name, a body in MessagePack."""

    name = "native"
    format: Literal["msgpack", "json"] = "msgpack"
    push_format: Literal["msgpack", "json"] = "msgpack"
    named = False
    flow = True

    def decode(self, frame: bytes) -> Sequence[Event]:
        try:
            return (_decode(frame),)
        except (struct.error, msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            raise ProtocolError(f"this is no frame of ours: {error}") from error

    def encode(self, event: Event) -> Sequence[bytes]:
        return (_ENCODE[type(event)](event),)

    def whose(self, frame: bytes) -> int:
        id: int = HEAD.unpack_from(frame)[3]
        return id


def _decode(frame: bytes) -> Event:
    body: Any  # bytes, or where they are many a view of them
    magic, marked, length, id, number = HEAD.unpack_from(frame)
    kind = marked & ~_METADATA
    start = HEAD.size + length
    if magic != MAGIC or start > len(frame):
        raise ValueError("its header is wrong")
    head, body = frame[HEAD.size : start], frame[start:] if len(frame) < _LARGE else memoryview(frame)[start:]
    if kind == CALL:
        return _call(marked, head, body, id, number)
    if kind == ITEM:
        return events.Item(id, body, len(frame))
    if kind == RESULT:
        return events.Result(id, body)
    if kind == PUSH:
        return events.Push(head.decode(), body, number)
    if kind == FAILURE:
        failure = _failure(body)
        failure.id = id
        return failure
    if kind == CREDIT:
        return events.Credit(id, number)
    if kind in (END, CANCEL):
        return events.End(id) if kind == END else events.Cancel(id)
    if kind in (SUBSCRIBE, UNSUBSCRIBE):
        types = _names(body)
        return events.Subscribe(id, types) if kind == SUBSCRIBE else events.Unsubscribe(id, types)
    if kind == HELLO:
        return _hello(body)
    if kind in (GOODBYE, HEARTBEAT):
        return events.Goodbye() if kind == GOODBYE else events.Heartbeat()
    raise ValueError(f"there is no kind {kind}")


_hello = msgspec.msgpack.Decoder(events.Hello).decode
_failure = msgspec.msgpack.Decoder(events.Failure).decode
_names = msgspec.msgpack.Decoder(list[str]).decode
_with_metadata = msgspec.msgpack.Decoder(tuple[str, dict[str, str]]).decode
_pack = msgspec.msgpack.Encoder().encode


def _call(marked: int, head: bytes, body: Any, id: int, number: int) -> events.Call:
    metadata: dict[str, str] = {}
    if marked & _METADATA:
        name, metadata = _with_metadata(head)
    else:
        name = head.decode()
    target, _, method = name.rpartition(".")
    return events.Call(id, target, method, body, number / 1000 if number else None, metadata)


def milliseconds(ttl: float | None) -> int:
    """A time to live as it travels: 0 is none, and what is over is 1."""
    return 0 if ttl is None else max(1, round(min(ttl, _LONGEST_TTL) * 1000))


def _frame(kind: int, id: int = 0, number: int = 0, head: bytes = b"", body: bytes = b"") -> bytes:
    return HEAD.pack(MAGIC, kind, len(head), id, number) + head + body


def _encode_call(event: events.Call) -> bytes:
    name = f"{event.target}.{event.method}"
    if event.metadata:
        head = _pack((name, event.metadata))
        if len(head) > 0xFFFF:
            raise MessageTooLarge(f"metadata of {len(head)} bytes; 65535 are allowed")
        return _frame(CALL | _METADATA, event.id, milliseconds(event.ttl), head, event.body)
    return _frame(CALL, event.id, milliseconds(event.ttl), name.encode(), event.body)


_ENCODE: dict[type, Any] = {
    events.Hello: lambda event: _frame(HELLO, body=_pack(event)),
    events.Call: _encode_call,
    events.Result: lambda event: _frame(RESULT, event.id, body=event.body),
    events.Failure: lambda event: _frame(FAILURE, event.id, body=_pack(event)),
    events.Item: lambda event: _frame(ITEM, event.id, body=event.body),
    events.End: lambda event: _frame(END, event.id),
    events.Credit: lambda event: _frame(CREDIT, event.id, event.count),
    events.Cancel: lambda event: _frame(CANCEL, event.id),
    events.Subscribe: lambda event: _frame(SUBSCRIBE, event.id, body=_pack(event.types)),
    events.Unsubscribe: lambda event: _frame(UNSUBSCRIBE, event.id, body=_pack(event.types)),
    events.Push: lambda event: _frame(PUSH, number=event.missed, head=event.type.encode(), body=event.body),
    events.Goodbye: lambda event: _frame(GOODBYE),
    events.Heartbeat: lambda event: _frame(HEARTBEAT),
}
