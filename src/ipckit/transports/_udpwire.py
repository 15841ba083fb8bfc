"""The datagrams of topics over UDP, written and read (drawn in docs/wire/datagram.md).

    0      2         3      4                12
    +------+---------+------+----------------+---------------------------------------------+
    | "iK" | version | kind |  session       |  what the kind has                          |
    +------+---------+------+----------------+---------------------------------------------+

    D DATA       u64 number, frame                      publisher: a message; `frame` is a MESSAGE of docs/wire/queue.md
    K KEPT       u64 number, 8 B member, frame          publisher: an old one, for this member only
    N NUMBER     u64 number                             publisher: "my last number is this", now and then
    B BYE        u64 number                             publisher: as NUMBER, and there will be no more
    J JOIN       8 B member, 16 B cookie, patterns      subscriber: again and again; each renews its lease
    C CHALLENGE  8 B member, 16 B cookie                publisher: to who joins without a good cookie
    W WELCOME    8 B member, u64 number                 publisher: "when I first heard of you, my last number was this"
    L LEAVE      8 B member                             subscriber: at close

`session` is the publisher's, random; zeros in a JOIN to whom it has not heard of yet. `member` is random as well, and new for
each publisher. Patterns are UTF-8 with a space between them. No answer has more bytes than what asked for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .. import errors

DATA, KEPT, NUMBER, BYE, JOIN, CHALLENGE, WELCOME, LEAVE = b"DKNBJCWL"
SESSION = 8
MEMBER = 8
COOKIE = 16
NO_SESSION = bytes(SESSION)
NO_COOKIE = bytes(COOKIE)
#: What UDP over IPv4 can carry. On IPv6 it would be 20 more.
MAX_DATAGRAM = 65507
MAX_PATTERNS = 1000

_MAGIC = b"iK\x01"
_number = struct.Struct(">Q")
#: Where the kind stands.
KIND_AT = len(_MAGIC)
_HEAD = KIND_AT + 1 + SESSION
#: Before the frame of a DATA and of a KEPT.
DATA_HEAD = _HEAD + _number.size
KEPT_HEAD = DATA_HEAD + MEMBER
#: Numbers beyond this are nobody's: a million messages a second for 8900 years.
_LAST_NUMBER = 2**58


@dataclass(frozen=True, slots=True)
class Heard:
    """One datagram, understood. Of the fields, those that its kind has."""

    kind: int
    session: bytes
    number: int = 0
    member: bytes = b""
    cookie: bytes = b""
    patterns: tuple[str, ...] = ()
    frame_at: int = 0  # where the frame begins


def data(session: bytes, number: int) -> bytes:
    """What comes before the frame."""
    return _MAGIC + bytes((DATA,)) + session + _number.pack(number)


def kept(session: bytes, number: int, member: bytes) -> bytes:
    """What comes before the frame."""
    return _MAGIC + bytes((KEPT,)) + session + _number.pack(number) + member


def number(session: bytes, number: int, *, bye: bool = False) -> bytes:
    return _MAGIC + bytes((BYE if bye else NUMBER,)) + session + _number.pack(number)


def join(session: bytes, member: bytes, cookie: bytes, patterns: tuple[str, ...] = ()) -> bytes:
    return _MAGIC + bytes((JOIN,)) + session + member + cookie + " ".join(patterns).encode()


def challenge(session: bytes, member: bytes, cookie: bytes) -> bytes:
    return _MAGIC + bytes((CHALLENGE,)) + session + member + cookie


def welcome(session: bytes, member: bytes, number: int) -> bytes:
    return _MAGIC + bytes((WELCOME,)) + session + member + _number.pack(number)


def leave(session: bytes, member: bytes) -> bytes:
    return _MAGIC + bytes((LEAVE,)) + session + member


#: By kind: the bytes after the session, and whether more may follow.
_SHAPES = {
    DATA: (_number.size, True),
    KEPT: (_number.size + MEMBER, True),
    NUMBER: (_number.size, False),
    BYE: (_number.size, False),
    JOIN: (MEMBER + COOKIE, True),
    CHALLENGE: (MEMBER + COOKIE, False),
    WELCOME: (MEMBER + _number.size, False),
    LEAVE: (MEMBER, False),
}


def read(datagram: bytes | bytearray | memoryview, size: int) -> Heard:
    """The first `size` bytes, understood. Believes nothing; raises ProtocolError for what is no datagram of ours."""
    if size < _HEAD or bytes(datagram[: len(_MAGIC)]) != _MAGIC:
        raise errors.ProtocolError("a datagram that is not ours")
    kind = datagram[KIND_AT]
    length, more = _SHAPES.get(kind, (-1, False))
    rest = size - _HEAD
    if length < 0 or rest < length or (rest > length and not more):
        raise errors.ProtocolError("a datagram of a kind or length that none has")
    session = bytes(datagram[_HEAD - SESSION : _HEAD])
    if kind in (DATA, KEPT, NUMBER, BYE):
        said = _counted(datagram, _HEAD)
        if kind == KEPT:
            return Heard(kind, session, said, bytes(datagram[DATA_HEAD:KEPT_HEAD]), frame_at=KEPT_HEAD)
        return Heard(kind, session, said, frame_at=DATA_HEAD)
    at = _HEAD + MEMBER
    member = bytes(datagram[_HEAD:at])
    if kind == WELCOME:
        return Heard(kind, session, _counted(datagram, at), member)
    if kind == LEAVE:
        return Heard(kind, session, member=member)
    patterns = _patterns(bytes(datagram[at + COOKIE : size])) if kind == JOIN else ()
    return Heard(kind, session, member=member, cookie=bytes(datagram[at : at + COOKIE]), patterns=patterns)


def _counted(datagram: bytes | bytearray | memoryview, at: int) -> int:
    found: int = _number.unpack_from(datagram, at)[0]
    if found > _LAST_NUMBER:
        raise errors.ProtocolError("a number that nobody has counted to")
    return found


def _patterns(text: bytes) -> tuple[str, ...]:
    if not text:
        return ()
    if text.count(b" ") >= MAX_PATTERNS:
        raise errors.ProtocolError("too many patterns")
    try:
        found = tuple(text.decode().split(" "))
    except UnicodeDecodeError as error:
        raise errors.ProtocolError("patterns that are not UTF-8") from error
    if not all(found):
        raise errors.ProtocolError("an empty pattern")
    return found
