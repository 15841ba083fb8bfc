"""The envelope protocol: how programs that know nothing of ipckit call a server. Four dialects beside ours, on one port.

    prefix u32 be | body                          `_seed`       JSON or named MessagePack maps, nothing around them
    prefix u32 be | version | type | payload      `_versioned`  v1: JSON; the prefix counts the payload only
    prefix u32 be | version | type | format | payload           v2: JSON or MessagePack; what the server writes to both

The byte behind the first prefix tells them apart, and a connection keeps what it began with: `recognise`. docs/wire/envelope.md
has every field, docs/howto/listener.md shows it at work, ADR 18 weighs it.
"""

from __future__ import annotations

import builtins
import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import msgspec

from ..errors import ProtocolError
from .dialects import MAGIC, Dialect, Native
from .events import Event, Failure

#: What has to be seen of a connection before it can be told what it speaks: a prefix, and one byte.
FIRST = 5


class UnsupportedVersion(ProtocolError):
    """A versioned header of another version than the connection began with."""


class Names(NamedTuple):
    """What a failure is called: the word that a seed client looks for, and the versioned `error_code`."""

    seed: str
    versioned: str


#: Our codes (`failures.CODES`, and those that only a listener has) in the words of the two protocols.
NAMES = {
    "UNKNOWN_METHOD": Names("UnknownMessageType", "UNKNOWN_MESSAGE_TYPE"),
    "UNKNOWN_TARGET": Names("AgentNotFound", "ACTOR_NOT_FOUND"),
    "SCHEMA": Names("SerializationError", "SERIALIZATION_ERROR"),
    "CODEC": Names("SerializationError", "SERIALIZATION_ERROR"),
    "TOO_LARGE": Names("ProtocolError", "PROTOCOL_ERROR"),
    "PROTOCOL": Names("ProtocolError", "PROTOCOL_ERROR"),
    "VERSION": Names("ProtocolError", "UNSUPPORTED_PROTOCOL_VERSION"),
    "RATE_LIMITED": Names("RateLimited", "RATE_LIMITED"),
    "TARGET_BUSY": Names("TargetBusy", "TARGET_BUSY"),
    "DEADLINE_EXCEEDED": Names("Timeout", "TIMEOUT"),
    "CANCELLED": Names("ConnectionClosed", "CONNECTION_CLOSED"),
    "CONNECTION_CLOSED": Names("ConnectionClosed", "CONNECTION_CLOSED"),
    "CONNECTION_LIMIT": Names("ConnectionClosed", "CONNECTION_LIMIT_REACHED"),
    "SHUTTING_DOWN": Names("ConnectionClosed", "SHUTTING_DOWN"),
    "IO_ERROR": Names("IoError", "IO_ERROR"),
    "STREAM": Names("StreamError", "STREAM_ERROR"),
    "REMOTE_ERROR": Names("RemoteError", "REMOTE_ERROR"),
}


def code_of(failure: Failure, stream: bool = False) -> str:
    """A key of NAMES: what a handler raised is told apart as these protocols do."""
    if failure.code != "REMOTE_ERROR":
        return failure.code if failure.code in NAMES else "REMOTE_ERROR"
    raised = getattr(builtins, failure.type, None)
    if isinstance(raised, type) and issubclass(raised, OSError):
        return "DEADLINE_EXCEEDED" if issubclass(raised, TimeoutError) else "IO_ERROR"
    return "STREAM" if stream else "REMOTE_ERROR"


def text_of(failure: Failure) -> str:
    """For people. A handler's exception is named: `ValueError: no such item`."""
    if failure.traceback:
        return failure.traceback
    parts = [failure.type, failure.message] if failure.code == "REMOTE_ERROR" else [failure.message]
    return ": ".join(filter(None, parts)) + (
        f"; try again in {failure.retry_after:.3g} s" if failure.retry_after else ""
    )


class Asked(msgspec.Struct, gc=False):
    """What a dialect remembers of a question until its last answer.

    Attributes:
        correlation: the client's own name for it; None: it gave none.
        ordered: its answers come after those of earlier questions.
        about: the message type, for words about it.
        frames: answers that wait for those of earlier questions.
        held: the last item of a stream, until it is known whether it was the last.
    """

    correlation: str | None
    about: str = ""
    kind: Literal["call", "stream", "oneway", "subscription", "discovery"] = "call"
    ordered: bool = False
    sequence: int = 0
    held: bytes | None = None
    frames: list[bytes] = []
    complete: bool = False


class Questions:
    """Our ids for the client's, and the order of answers where the client has no other way to tell them apart."""

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._ids = itertools.count(1)
        self._asked: dict[int, Asked] = {}
        self._order: deque[int] = deque()  # of those without a correlation id
        self._released: list[int] = []

    def new(self, asked: Asked) -> int:
        id = next(self._ids)
        self._asked[id] = asked
        if self._ordered and asked.correlation is None:
            asked.ordered = True
            self._order.append(id)
        return id

    def blamed(self, correlation: str | None) -> int:
        """The question that a frame of ours answered, which turns out not to be sendable: something else has to be said."""
        for id, asked in self._asked.items():
            if asked.kind == "stream" and asked.sequence and asked.correlation == correlation:
                return id
        id = next(self._ids)  # its question is forgotten already; the turn is its own, so it does not wait for another
        self._asked[id] = Asked(correlation)
        return id

    def get(self, id: int) -> Asked | None:
        return self._asked.get(id)

    def waits(self, id: int) -> bool:
        asked = self._asked.get(id)
        return asked is not None and asked.ordered and self._order[0] != id

    def released(self) -> Sequence[int]:
        found, self._released = self._released, []
        return found

    def answer(self, id: int, frames: Sequence[bytes], last: bool) -> Sequence[bytes]:
        """What may be sent now that there is this answer."""
        asked = self._asked[id]
        if last:
            asked.complete = True
        if not asked.ordered:
            if last:
                del self._asked[id]
            return frames
        if self._order[0] != id:
            asked.frames.extend(frames)
            return ()
        return [*frames, *self._advance()] if last else frames

    def _advance(self) -> Sequence[bytes]:
        """The first in the order is complete: so may be those behind it, and the next one may begin."""
        out: list[bytes] = []
        while self._order and self._asked[self._order[0]].complete:
            del self._asked[self._order.popleft()]
            if self._order:
                following = self._asked[self._order[0]]
                out += following.frames
                following.frames = []
                self._released.append(self._order[0])
        return out


class Envelope(ABC):
    """A dialect of programs that are not ipckit's. `clock`: seconds since 1970, for the timestamps of pushes.

    Attributes:
        uncounted: bytes of header that the prefix does not count, of what comes and of what goes.
    """

    name: str
    named = True
    flow = False
    uncounted: ClassVar[tuple[int, int]]
    _ordered: ClassVar[bool]

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._questions = Questions(self._ordered)

    @property
    @abstractmethod
    def format(self) -> Literal["msgpack", "json"]: ...

    @property
    @abstractmethod
    def push_format(self) -> Literal["msgpack", "json"]: ...

    @abstractmethod
    def decode(self, frame: bytes) -> Sequence[Event]: ...

    @abstractmethod
    def encode(self, event: Event) -> Sequence[bytes]: ...

    @abstractmethod
    def whose(self, frame: bytes) -> int: ...

    @abstractmethod
    def turn_away(self, limit: int) -> Sequence[bytes]:
        """There are `limit` connections already: what the one too many is told."""

    def waits(self, id: int) -> bool:
        """The stream that answers this call is not to begin yet: answers have an order here."""
        return self._questions.waits(id)

    def released(self) -> Sequence[int]:
        """The calls that `waits` held back and holds no more. Each is told once."""
        return self._questions.released()


class Unspoken:
    """A connection that has said nothing yet: whatever we may have to say would be in the wrong tongue."""

    name = "unspoken"
    format: Literal["msgpack", "json"] = "msgpack"
    push_format: Literal["msgpack", "json"] = "msgpack"
    named = False
    flow = False

    def decode(self, frame: bytes) -> Sequence[Event]:
        raise ProtocolError("it was not recognised first")

    def encode(self, event: Event) -> Sequence[bytes]:
        return ()

    def whose(self, frame: bytes) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Unknown:
    """Bytes that begin none of the dialects. `answer`: a frame that might be understood; so much of it is header."""

    why: str
    answer: bytes = b""
    uncounted: int = 0


def recognise(first: bytes) -> Callable[[], Dialect] | Unknown:
    """What a connection speaks, by its first bytes, `FIRST` of them."""
    from . import _seed, _versioned

    byte = first[FIRST - 1]
    if byte == MAGIC:
        return Native
    if byte in b"{ \t\r\n":
        return _seed.SeedJson
    if 0x80 <= byte <= 0x8F or byte in (0xDE, 0xDF):
        return _seed.SeedMsgpack
    if byte == 1:
        return _versioned.Version1
    if byte == 2:
        return _versioned.Version2
    if 2 < byte < 9:  # the header of a version to come, by the looks of it
        return Unknown(f"version {byte} of the envelope protocol", *_versioned.unsupported(byte))
    return Unknown(f"the first byte {byte:#04x} begins none of the dialects")
