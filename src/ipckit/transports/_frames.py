"""The framing of byte streams in Python, for streams that the native core cannot read (TLS). No I/O.

4-byte big-endian length | payload       docs/wire/stream.md
"""

from __future__ import annotations

import struct
from typing import Any

from .. import _options

_HEADER = struct.Struct(">I")
HEADER_SIZE = _HEADER.size
_LARGEST = 0xFFFFFFFE  # ff ff ff ff is the goodbye


def _limit(text: str) -> int:
    value = _options.size(text)
    if value > _LARGEST:
        raise ValueError(f"at most {_LARGEST}, which is what a prefix of 4 bytes can say")
    return value


def limit_option() -> Any:
    return _options.option(_options.DEFAULT_LIMIT, _limit, "largest message, in bytes; larger ones are refused")


class FrameTooLong(ValueError):
    """A prefix announces more than the limit."""


class FrameDecoder:
    """Bytes in by `feed`, frames out by `next`. Memory grows with what came, not with what a prefix announces."""

    def __init__(self, limit: int) -> None:
        self.uncounted = 0  # bytes of a frame that its length does not count: a header of the peer's protocol
        self._limit = limit
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | memoryview) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._start = 0
        self._buffer += data

    def glance(self, count: int) -> bytes | None:
        """The next bytes, which stay, or None."""
        seen = bytes(self._buffer[self._start : self._start + count])
        return seen if len(seen) == count else None

    def _check_size(self) -> int:
        counted: int = _HEADER.unpack_from(self._buffer, self._start)[0]
        if counted > self._limit:
            raise FrameTooLong(f"length prefix {counted} is above the limit of {self._limit}")
        return counted + self.uncounted

    def next(self) -> bytes | None:
        """The next whole frame, or None. Raises FrameTooLong, as soon as the prefix is here."""
        start = self._start + HEADER_SIZE
        if len(self._buffer) < start:
            return None
        size = self._check_size()
        if len(self._buffer) < start + size:
            return None
        with memoryview(self._buffer) as view:
            frame = bytes(view[start : start + size])
        self._start = start + size
        if self._start == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        return frame

    @property
    def inside(self) -> bool:
        """What is here ends inside a frame."""
        at = self._start
        while len(self._buffer) - at >= HEADER_SIZE:
            at += HEADER_SIZE + self.uncounted + _HEADER.unpack_from(self._buffer, at)[0]
        return at != len(self._buffer)


def header(size: int) -> bytes:
    return _HEADER.pack(size)
