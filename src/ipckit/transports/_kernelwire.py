"""The records of queues that the kernel keeps (mq, fifo), written and read. docs/wire/kernel-queues.md draws them.

A record is what one `mq_receive` or one `read` returns, or what a slot of a file holds. Its first byte is never zero: in a file,
zero says that the slot is free. Reading believes nothing: what is too short, too long or no text is a `ProtocolError`, and costs
that record.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import msgspec

from .. import errors
from ..message import Parcel, check_headers, check_id

MESSAGE, ELSEWHERE = 0x6D, 0x65  # "m": here it is; "e": it is in the file of this name
_SHORT, _HEADERS = 1, 2  # the id is 16 bytes that are shown in hex; there are headers
HEAD = struct.Struct(">BBBBI")  # kind, flags, priority, length of the id, length of the whole record
_LENGTH = struct.Struct(">I")
MOST_EXTRA = 1 << 20  # bytes of id and headers that a receiver grants beyond the limit of the body
_headers = msgspec.msgpack.Decoder(dict[str, str])


def message(parcel: Parcel) -> bytes:
    flags, name = 0, parcel.id
    try:
        id = bytes.fromhex(name) if len(name) == 32 else b""
    except ValueError:
        id = b""
    if id and id.hex() == name:
        flags = _SHORT
    else:
        id = name.encode()
    headers = b""
    if parcel.headers:
        flags |= _HEADERS
        packed = msgspec.msgpack.encode(dict(parcel.headers))
        headers = _LENGTH.pack(len(packed)) + packed
    size = HEAD.size + len(id) + len(headers) + len(parcel.body)
    return b"".join((HEAD.pack(MESSAGE, flags, parcel.priority, len(id), size), id, headers, parcel.body))


def elsewhere(name: str, priority: int) -> bytes:
    data = name.encode()
    return HEAD.pack(ELSEWHERE, 0, priority, 0, HEAD.size + len(data)) + data


def length(head: bytes | memoryview) -> int:
    """Bytes of the record that begins so. Raises ProtocolError."""
    if len(head) < HEAD.size:
        raise errors.ProtocolError("a record that ends too soon")
    kind, _, _, _, size = HEAD.unpack_from(head)
    if kind not in (MESSAGE, ELSEWHERE) or size < HEAD.size:
        raise errors.ProtocolError(f"{bytes(head[:8])!r} begins no record")
    return int(size)


def read(record: bytes) -> Parcel | str:
    """The message, or the name of the file that has it. Raises ProtocolError."""
    if length(record) != len(record):
        raise errors.ProtocolError("a record of another length than it says")
    kind, flags, priority, id_size, _ = HEAD.unpack_from(record)
    if kind == ELSEWHERE:
        return _text(record[HEAD.size :])
    at = HEAD.size + id_size
    raw = record[HEAD.size : at]
    if flags & ~(_SHORT | _HEADERS) or len(raw) != id_size or (flags & _SHORT and id_size != 16):
        raise errors.ProtocolError("a record that is no message")
    id = raw.hex() if flags & _SHORT else _id(raw)
    headers: Mapping[str, str] | None = None
    if flags & _HEADERS:
        size = record[at : at + _LENGTH.size]
        if len(size) < _LENGTH.size:
            raise errors.ProtocolError("a record that ends too soon")
        at += _LENGTH.size
        packed = record[at : at + int.from_bytes(size, "big")]
        at += int.from_bytes(size, "big")
        headers = _read_headers(packed)
        if at > len(record):
            raise errors.ProtocolError("a record that ends too soon")
    parcel = Parcel(record[at:], id, priority=priority)
    if headers:
        parcel.headers = headers
    return parcel


def _read_headers(packed: bytes) -> Mapping[str, str]:
    try:
        return check_headers(_headers.decode(packed))
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:  # bad UTF-8 in a key is no MsgspecError
        raise errors.ProtocolError("headers that are none") from error
    except errors.BadOption as error:
        raise errors.ProtocolError(error.message) from error


def _id(raw: bytes) -> str:
    try:
        return check_id(_text(raw)) if raw else ""
    except errors.BadOption as error:
        raise errors.ProtocolError(error.message) from error


def _text(raw: bytes) -> str:
    try:
        return raw.decode("ascii")
    except UnicodeDecodeError as error:
        raise errors.ProtocolError("text that is not ASCII") from error
