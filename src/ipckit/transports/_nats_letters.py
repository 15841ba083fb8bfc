"""Letters between two parties of an exchange through NATS: what they say, and what shows that one is missing.

    kind u8 | number u32 be | content        docs/wire/rpc-brokers.md has all of it

Core NATS may lose letters, so those of a pair are numbered in each direction, and the others say how many have gone before. A
frame that is larger than a letter goes in parts. `Letters` keeps the count; what a gap means is for its owner to decide.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable

HEAD = struct.Struct(">BI")
FRAME, PART, WHO, MINE, NOT_MINE, BYE, LEFT, HERE, PROBE = range(9)
COUNTED = PART
FIRST = 0xFFFFFFFF  # the number of what needs none
_NUMBERS = 0x7FFFFFFF
_IDLE = 100  # ticks between two probes of one who is not busy

Write = Callable[[str, str, int, int, bytes | memoryview], None]


class Peer:
    """One of those whom letters are exchanged with. `busy`: something depends on it; `key`: its name in our own subjects."""

    __slots__ = ("busy", "expected", "idle", "key", "partial", "sent")

    def __init__(self, key: str, busy: Callable[[], bool]) -> None:
        self.key = key
        self.busy = busy
        self.idle = 0
        self.sent = self.expected = 0
        self.partial = bytearray()

    def due(self) -> bool:
        """At each tick: it is time to see whether it is there."""
        self.idle += 1
        if not (self.busy() or self.idle >= _IDLE):
            return False
        self.idle = 0
        return True


class Letters:
    """By address. `write(subject, reply, kind, number, content)` sends one. `limit`: bytes of a frame; `part`: of one letter.

    All of it runs on the client's loop.
    """

    def __init__(self, address: str, write: Write, limit: int, part: int) -> None:
        self._address, self._write = address, write
        self._limit, self._part = limit, part
        self.peers: dict[str, Peer] = {}
        self._keys: dict[str, str] = {}  # of peers, to addresses

    def meet(self, who: str) -> Peer:
        peer = self.peers.get(who)
        if peer is None:
            peer = self.peers[who] = Peer(secrets.token_hex(4), _never)
            self._keys[peer.key] = who
        return peer

    def forget(self, who: str) -> Peer | None:
        peer = self.peers.pop(who, None)
        if peer is not None:
            self._keys.pop(peer.key, None)
        return peer

    def called(self, key: str) -> str | None:
        """Whose key this is."""
        return self._keys.get(key)

    def post(self, to: str, frame: bytes) -> None:
        peer = self.meet(to)
        rest = memoryview(frame)
        while True:
            part, rest = rest[: self._part], rest[self._part :]
            self._write(f"{to}.s", f"{self._address}.p{peer.key}", PART if rest else FRAME, peer.sent, part)
            peer.sent = (peer.sent + 1) & _NUMBERS
            if not rest:
                return

    def tell(self, to: str, kind: int, content: bytes = b"") -> None:
        """What is not counted, but says how much was."""
        peer = self.peers.get(to)
        reply = f"{self._address}.p{peer.key}" if peer is not None else f"{self._address}.n"
        self._write(f"{to}.s", reply, kind, FIRST if peer is None else peer.sent, content)

    def shout(self, subject: str, kind: int, tag: str = "n", content: bytes = b"") -> None:
        """What belongs to no count. `tag`: what a refusal is about."""
        self._write(subject, f"{self._address}.{tag}", kind, FIRST, content)

    def in_order(self, who: str, kind: int, number: int) -> bool:
        """Nothing is missing before this one."""
        peer = self.peers.get(who)
        if peer is None:  # a new one, of whom nothing can be missing yet; or one that we have forgotten
            return kind == WHO or number == 0 or (number == FIRST and kind > COUNTED)
        return number == peer.expected or (number == FIRST and kind > COUNTED)

    def received(self, who: str, kind: int, content: bytes) -> bytes | None:
        """A frame, if it is whole with this. Raises ValueError for one above the limit."""
        peer = self.meet(who)
        peer.expected = (peer.expected + 1) & _NUMBERS
        if kind == FRAME and not peer.partial:
            return content
        if len(peer.partial) + len(content) > self._limit:
            raise ValueError("above the limit")
        peer.partial += content
        if kind == PART:
            return None
        frame, peer.partial = bytes(peer.partial), bytearray()
        return frame


def _never() -> bool:
    return False
