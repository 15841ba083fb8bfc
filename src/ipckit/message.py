"""What travels in queues and topics: a body with an identity.

A `Parcel` is what transports handle: bytes and names, the same on every one of them. A `Message` is what users hold: the
decoded value, and the verbs that settle it where the transport remembers what was not acknowledged.

Header names are the same everywhere (stream fields on Redis, NATS headers, gRPC metadata): lower case, `traceparent` as the
W3C has it.
"""

from __future__ import annotations

import enum
import itertools
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from ._options import LONGEST
from .errors import BadOption, IpcError

T = TypeVar("T")

_HEADER = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}\Z")
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # lone surrogates have no bytes
_MOST_HEADERS = 1000  # what a script's call takes is limited, on Redis
_LONGEST_HEADER = 0xFFFF
_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_NO_HEADERS: Mapping[str, str] = {}

#: A gap after which the publisher is another one, or was reached anew: nobody counted.
UNKNOWN = -1


class Verdict(enum.Enum):
    """What becomes of a message that was handed out."""

    ACK = "ack"  # done: never again
    NACK = "nack"  # again, to anybody, after a delay
    EXTEND = "extend"  # still at work: do not give it to somebody else yet


@dataclass(slots=True)
class Parcel:
    """One message on its way.

    Attributes:
        body: as the codec made it.
        id: unique; sending again with it makes no duplicate where the transport has deduplication.
        headers: names in lower case.
        priority: higher first, where the transport has priorities.
        topic: of publish/subscribe; empty in a queue.
        redelivered: how often it was handed out before.
        gap: how many messages were dropped right before this one; `UNKNOWN`: some, and nobody can say how many.
        token: what the transport needs to settle it.
        failure: why it was not delivered, written by the outlet that knows; several tasks may share one outlet.
    """

    body: bytes
    id: str = ""
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    priority: int = 0
    topic: str = ""
    redelivered: int = 0
    gap: int = 0
    token: Any = None
    failure: IpcError | None = None


_numbers = itertools.count()
_origin = ""


def _begin() -> None:
    """In this process, and again in a forked child."""
    global _origin
    _origin = os.urandom(12).hex()


_begin()
os.register_at_fork(after_in_child=_begin)


def new_id() -> str:
    """Unique: 96 random bits of this process and a count, in hex. A call to the kernel for each would be dear."""
    return f"{_origin}{next(_numbers):08x}"


def check_headers(headers: Mapping[str, str] | None, url: object = None) -> Mapping[str, str]:
    """Refuse what could not travel on every transport. Raises BadOption."""
    if not headers:
        return _NO_HEADERS
    if len(headers) > _MOST_HEADERS:
        raise BadOption(f"{len(headers)} headers, and {_MOST_HEADERS} are the most", url=url)
    for name, value in headers.items():
        if not isinstance(name, str) or not _HEADER.match(name):
            raise BadOption(f"{name!r} is no header name", url=url, hint="lower-case letters, digits, '_', '.', '-'")
        if not isinstance(value, str) or _NO_TEXT.search(value):
            raise BadOption(f"header {name!r} must be text without control characters", url=url)
        if len(value) * 4 > _LONGEST_HEADER and len(value.encode()) > _LONGEST_HEADER:
            raise BadOption(f"header {name!r} has more than {_LONGEST_HEADER} bytes", url=url)
    return dict(headers)


def check_id(id: str, url: object = None) -> str:
    if not isinstance(id, str) or not _ID.match(id):
        raise BadOption("a message id has 1 to 128 printable ASCII characters without spaces", url=url)
    return id


def check_delay(delay: float) -> float:
    if not 0 <= delay <= LONGEST:
        raise BadOption(f"a delay is from 0 to {LONGEST} seconds, not {delay!r}", operation="nack")
    return delay


def matches(pattern: str, topic: str) -> bool:
    """Whether the pattern covers the topic; the one meaning that every transport keeps."""
    wanted, levels = pattern.split("."), topic.split(".") if topic else []
    for i, want in enumerate(wanted):
        if want == ">":
            return True
        if i >= len(levels) or want not in ("*", levels[i]):
            return False
    return len(wanted) == len(levels)


def compiled(pattern: str) -> Callable[[str], bool]:
    """`matches` with its pattern read beforehand."""
    levels = pattern.split(".")
    rest = levels[-1] == ">"
    if rest:
        del levels[-1]
    fixed = [(i, level) for i, level in enumerate(levels) if level != "*"]
    count = len(levels)
    if not count:
        return lambda topic: True

    def matches(topic: str) -> bool:
        found = topic.split(".") if topic else []
        if len(found) < count or (len(found) > count and not rest):
            return False
        return all(found[i] == level for i, level in fixed)

    return matches


class _Base(Generic[T]):
    __slots__ = ("_parcel", "_settle", "value")

    def __init__(self, value: T, parcel: Parcel, settle: Callable[[Parcel, Verdict, float, float | None], Any]) -> None:
        self.value = value
        self._parcel = parcel
        self._settle = settle

    @property
    def id(self) -> str:
        """Its identity, the same at every delivery. Empty on transports that carry bare bytes."""
        return self._parcel.id

    @property
    def headers(self) -> Mapping[str, str]:
        return self._parcel.headers

    @property
    def priority(self) -> int:
        return self._parcel.priority

    @property
    def topic(self) -> str:
        return self._parcel.topic

    @property
    def redelivered(self) -> int:
        """How often it was handed out before, to whomever."""
        return self._parcel.redelivered

    @property
    def gap(self) -> int:
        """How many messages this subscriber missed right before it. -1: some, nobody can say how many (it reconnected)."""
        return self._parcel.gap

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id or '-'} {self.value!r:.80}>"


class Message(_Base[T]):
    """A message and, where the transport has acknowledgement, its fate. Settling twice is harmless.

    The verbs return when the transport has noted it. `timeout`: seconds; None waits, for a broker that is away as well. Raises
    Timeout, and then it is told later, by itself; Closed.
    """

    __slots__ = ()

    def ack(self, timeout: float | None = None) -> None:
        """Done."""
        self._settle(self._parcel, Verdict.ACK, 0.0, timeout)

    def nack(self, delay: float = 0.0, timeout: float | None = None) -> None:
        """Hand it out again, to anybody, in `delay` seconds."""
        self._settle(self._parcel, Verdict.NACK, check_delay(delay), timeout)

    def extend(self, timeout: float | None = None) -> None:
        """Still at work: start its time again."""
        self._settle(self._parcel, Verdict.EXTEND, 0.0, timeout)


class AsyncMessage(_Base[T]):
    """`Message`, awaited."""

    __slots__ = ()

    def ack(self, timeout: float | None = None) -> Awaitable[None]:
        return self._settle(self._parcel, Verdict.ACK, 0.0, timeout)  # type: ignore[no-any-return]

    def nack(self, delay: float = 0.0, timeout: float | None = None) -> Awaitable[None]:
        return self._settle(self._parcel, Verdict.NACK, check_delay(delay), timeout)  # type: ignore[no-any-return]

    def extend(self, timeout: float | None = None) -> Awaitable[None]:
        return self._settle(self._parcel, Verdict.EXTEND, 0.0, timeout)  # type: ignore[no-any-return]
