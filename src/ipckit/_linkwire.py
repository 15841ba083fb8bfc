"""The frames of queues and topics over links, written and read. docs/wire/queue.md draws them.

The first byte is the kind. A message is two bytes and the body, when it has nothing else to say; a bit of the second byte
announces each field that it has. Messages are numbered by counting, from 1 on each link; acknowledgements name these numbers.

Reading believes nothing: what is too short, too long, unknown or no text is a `ProtocolError`, and costs that link.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from . import errors
from .message import Parcel, check_headers, check_id

VERSION = 1
HELLO, MESSAGE, ACK, NACK, END, REFUSED = range(1, 7)
SENDER, RECEIVER, PUBLISHER, SUBSCRIBER = range(1, 5)
ROLES = {SENDER: "a sender", RECEIVER: "a receiver", PUBLISHER: "a publisher", SUBSCRIBER: "a subscriber"}

#: What a sender that connects may send before it has heard the receiver's window.
FIRST = 64
MAX_WINDOW = 1 << 20

# Fields of a message, in this order. The gap comes first, so that one frame serves those with a gap and those without.
_GAP, _AGAIN, _ID, _NAME, _TOPIC, _HEADERS = 1, 2, 4, 8, 16, 32
_KNOWN = 63
_gap = struct.Struct(">Q")
_range = struct.Struct(">QI")
_nack = struct.Struct(">BQI")
_u16 = struct.Struct(">H")
_u32 = struct.Struct(">I")
_PLAIN = bytes((MESSAGE, 0))
_IDENTIFIED = bytes((MESSAGE, _ID | _TOPIC))  # what nearly every message of a topic begins with


@dataclass(frozen=True, slots=True)
class Hello:
    """Who is there. `session`: of a sender; `window`: of a receiver; `topics` and `group`: of a subscriber."""

    role: int
    session: bytes = b""
    window: int = 0
    topics: tuple[str, ...] = ()
    group: str | None = None


def hello(hello: Hello) -> bytes:
    head = bytes((HELLO, VERSION, hello.role))
    if hello.role == SENDER:
        return head + hello.session
    if hello.role == RECEIVER:
        return head + _u32.pack(hello.window)
    if hello.role == SUBSCRIBER:
        return head + _text(hello.group or "") + _u16.pack(len(hello.topics)) + b"".join(map(_text, hello.topics))
    return head


def message(parcel: Parcel) -> bytes:
    flags = 0
    fields: list[bytes] = []
    if parcel.redelivered:
        flags |= _AGAIN
        fields.append(_u32.pack(min(parcel.redelivered, 0xFFFFFFFF)))
    if parcel.id:
        short = _short(parcel.id)
        flags |= _NAME if short is None else _ID
        fields.append(_text(parcel.id) if short is None else short)
    if parcel.topic:
        flags |= _TOPIC
        fields.append(_text(parcel.topic))
    if parcel.headers:
        flags |= _HEADERS
        fields.append(_pack_headers(parcel.headers))
    if not flags:
        return _PLAIN + parcel.body
    return b"".join((bytes((MESSAGE, flags)), *fields, parcel.body))


def prefix(parcel: Parcel) -> bytes:
    """All of `message` but the body, for a transport that keeps the two apart."""
    if parcel.headers or parcel.redelivered or (short := _short(parcel.id)) is None:
        return message(replace(parcel, body=b""))
    return b"".join((_IDENTIFIED, short, _text(parcel.topic)))


def with_gap(frame: bytes, gap: int) -> bytes:
    """The same message, telling that `gap` were dropped right before it."""
    return b"".join((bytes((MESSAGE, frame[1] | _GAP)), _gap.pack(gap), memoryview(frame)[2:])) if gap else frame


def ack(numbers: Iterable[int]) -> bytes:
    """Ranges of numbers, first and count."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][0] + ranges[-1][1]:
            ranges[-1][1] += 1
        else:
            ranges.append([number, 1])
    return bytes((ACK,)) + b"".join(_range.pack(first, count) for first, count in ranges)


def nack(number: int, delay: float) -> bytes:
    return _nack.pack(NACK, number, min(int(delay * 1000), 0xFFFFFFFF))


def end(gap: int) -> bytes:
    return bytes((END,)) + _gap.pack(gap)


def refused(why: str) -> bytes:
    return bytes((REFUSED,)) + why.encode()[:500]


# -- reading --------------------------------------------------------------------------------------------------------


def kind_of(frame: bytes) -> int:
    if not frame:
        raise errors.ProtocolError("an empty frame")
    if frame[0] == REFUSED:
        raise errors.ProtocolError("the other side refuses us: " + frame[1:501].decode("utf-8", "replace"))
    return frame[0]


def unexpected(frame: bytes) -> errors.ProtocolError:
    return errors.ProtocolError(f"a frame of kind {frame[0]} has no place here")


def read_hello(frame: bytes, expected: int) -> Hello:
    reader = _Reader(frame, 1)
    version, role = reader.u8(), reader.u8()
    if version != VERSION:
        raise errors.ProtocolError(f"the other side speaks version {version}, we speak {VERSION}")
    if role != expected:
        there = ROLES.get(role, f"role {role}")
        raise errors.ProtocolError(f"there is {there} where {ROLES[expected]} should be")
    if role == SENDER:
        found = Hello(role, session=reader.take(16))
    elif role == RECEIVER:
        found = Hello(role, window=reader.u32())
        if not 1 <= found.window <= MAX_WINDOW:
            raise errors.ProtocolError(f"a window of {found.window}")
    elif role == SUBSCRIBER:
        group = reader.text() or None
        found = Hello(role, group=group, topics=tuple(reader.text() for _ in range(reader.u16())))
    else:
        found = Hello(role)
    reader.finish()
    return found


def read_message(frame: bytes) -> Parcel:
    if len(frame) > 1 and not frame[1]:
        return Parcel(frame[2:])
    reader = _Reader(frame, 1)
    flags = reader.u8()
    if flags & ~_KNOWN or flags & (_ID | _NAME) == _ID | _NAME:
        raise errors.ProtocolError(f"a message with the flags {flags:#x}")
    gap = reader.u64() if flags & _GAP else 0
    again = reader.u32() if flags & _AGAIN else 0
    id = reader.take(16).hex() if flags & _ID else reader.id() if flags & _NAME else ""
    topic = reader.text() if flags & _TOPIC else ""
    headers = reader.headers() if flags & _HEADERS else None
    parcel = Parcel(reader.rest(), id, topic=topic, redelivered=again, gap=gap)
    if headers:
        parcel.headers = headers
    return parcel


def read_prefix(prefix: bytes, body: bytes) -> Parcel:
    """The message that `prefix` and `body` make."""
    if prefix.startswith(_IDENTIFIED) and len(prefix) >= 20 and len(prefix) == 20 + _u16.unpack_from(prefix, 18)[0]:
        try:
            return Parcel(body, prefix[2:18].hex(), topic=prefix[20:].decode())
        except UnicodeDecodeError as error:
            raise errors.ProtocolError("text that is not UTF-8") from error
    if kind_of(prefix) != MESSAGE:
        raise unexpected(prefix)
    parcel = read_message(prefix)
    if parcel.body:
        raise errors.ProtocolError("a prefix that is too long")
    parcel.body = body
    return parcel


def read_ack(frame: bytes) -> Sequence[tuple[int, int]]:
    """(first, count) each."""
    if len(frame) == 1 or (len(frame) - 1) % _range.size:
        raise errors.ProtocolError("an acknowledgement of a length that none can have")
    return list(_range.iter_unpack(memoryview(frame)[1:]))


def read_nack(frame: bytes) -> tuple[int, float]:
    if len(frame) != _nack.size:
        raise errors.ProtocolError("a refusal of a length that none can have")
    _, number, delay = _nack.unpack(frame)
    return number, delay / 1000


def read_end(frame: bytes) -> int:
    reader = _Reader(frame, 1)
    gap = reader.u64()
    reader.finish()
    return gap


class _Reader:
    """A cursor over a frame that raises where it ends too soon."""

    def __init__(self, frame: bytes, at: int) -> None:
        self._frame, self._at = frame, at

    def take(self, size: int) -> bytes:
        found = self._frame[self._at : self._at + size]
        if len(found) != size:
            raise errors.ProtocolError("a frame that ends too soon")
        self._at += size
        return found

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def text(self) -> str:
        try:
            return self.take(self.u16()).decode()
        except UnicodeDecodeError as error:
            raise errors.ProtocolError("text that is not UTF-8") from error

    def id(self) -> str:
        try:
            return check_id(self.text())
        except errors.BadOption as error:
            raise errors.ProtocolError(error.message) from error

    def headers(self) -> Mapping[str, str]:
        try:
            return check_headers({self.text(): self.text() for _ in range(self.u16())})
        except errors.BadOption as error:
            raise errors.ProtocolError(error.message) from error

    def rest(self) -> bytes:
        return self._frame[self._at :]

    def finish(self) -> None:
        if self._at != len(self._frame):
            raise errors.ProtocolError("a frame that is too long")


def _text(value: str) -> bytes:
    data = value.encode()  # of headers, ids and topics, which are shorter than 64 KiB
    return _u16.pack(len(data)) + data


def _pack_headers(headers: Mapping[str, str]) -> bytes:
    return _u16.pack(len(headers)) + b"".join(_text(name) + _text(value) for name, value in headers.items())


def _short(id: str) -> bytes | None:
    """The 16 bytes of an id that is 32 hex digits, as ours are."""
    if len(id) != 32:
        return None
    try:
        data = bytes.fromhex(id)
    except ValueError:
        return None
    return data if data.hex() == id else None
