"""What travels on a NATS subject of ours, and how a loss is seen. No I/O.

Core NATS delivers at most once: the server drops what a slow client does not fetch, and a reconnect loses what was under
way. So each payload says how many its sender has published before it, and a receiver that expects another number knows
that something is missing. Probes and credit are not counted but say the number too: so the loss of the last payloads
shows within one probe.

    kind u8 | number u64 | content
    MESSAGE     the message; in a handshake, a frame of `_rendezvous`
    MESSAGES    several: (length u32 | message) ...
    FIRST       size of the whole message u64 | its beginning
    MORE        the next part; the message is whole when its size is reached
    BYE         nothing: closed in order, nothing follows
    PROBE       nothing; not counted
    CREDIT      bytes u64 that were consumed since the session began, with OVERHEAD for each message or part; not counted
    CLAIM       the claimant's id; not counted. On the subject where claimants of a name meet
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .. import errors

MESSAGE, MESSAGES, FIRST, MORE, BYE, PROBE, CREDIT, CLAIM = range(1, 9)
COUNTED = BYE  # kinds up to this one are

_HEAD = struct.Struct(">BQ")
_HEAD_AND_U64 = struct.Struct(">BQQ")
_LENGTH = struct.Struct(">I")
#: Bytes that any payload has beside its content, FIRST included.
HEAD_SIZE = _HEAD_AND_U64.size
LENGTH_SIZE = _LENGTH.size
#: What a message or a part costs beside its bytes: small ones fill memory too.
OVERHEAD = 64

read_head = _HEAD.unpack_from


def pack(kind: int, number: int, content: bytes | memoryview = b"") -> bytes:
    return b"".join((_HEAD.pack(kind, number), content))


def pack_many(number: int, messages: Sequence[bytes]) -> bytes:
    parts = [_HEAD.pack(MESSAGES, number)]
    for message in messages:
        parts += (_LENGTH.pack(len(message)), message)
    return b"".join(parts)


def pack_first(number: int, size: int, content: memoryview) -> bytes:
    return b"".join((_HEAD_AND_U64.pack(FIRST, number, size), content))


def pack_credit(number: int, consumed: int) -> bytes:
    return _HEAD_AND_U64.pack(CREDIT, number, consumed)


def content(payload: bytes) -> bytes:
    return payload[_HEAD.size :]


def read_u64(payload: bytes) -> int:
    """The second number of FIRST and CREDIT. Raises ProtocolError."""
    if len(payload) < _HEAD_AND_U64.size:
        raise errors.ProtocolError(f"a payload of {len(payload)} bytes where {_HEAD_AND_U64.size} are the least")
    number: int = _HEAD_AND_U64.unpack_from(payload)[2]
    return number


def messages(payload: bytes) -> list[bytes]:
    """What MESSAGES holds. Raises ProtocolError."""
    found = []
    at, end = _HEAD.size, len(payload)
    while at < end:
        begin = at + LENGTH_SIZE
        if begin > end:
            raise errors.ProtocolError("a payload that ends inside a length")
        at = begin + _LENGTH.unpack_from(payload, at)[0]
        if at > end:
            raise errors.ProtocolError("a payload that ends inside a message")
        found.append(payload[begin:at])
    return found
