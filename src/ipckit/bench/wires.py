"""What a contender is to the clock: connected ends that send and receive whole messages.

An opener is a context manager that makes one end: it is given an `End`, yields a `Wire` (or an `AsyncWire`) and cleans up
behind it. Ours and the raw clients are openers alike, so that the same loops time them all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

#: `drive` holds the clock: it sends, publishes, calls. `echo` answers, or only receives; of a crowd, each is one.
#: The side that has the name (`Plan.first`, the echo as a rule) opens first and says where it is.
Side = Literal["echo", "drive"]


@dataclass(frozen=True, slots=True)
class End:
    """What an opener is told.

    Attributes:
        side: which end to make.
        address: for the side that opens first where to listen; for the other what the first announced.
        announce: the side that opens first calls it once, with its address, before it waits for the peer.
        descriptors: inherited from the parent, where the ends cannot find each other by name (see `Handover`).
        options: the URL's options for the connecting side (`ca=...`), where they differ.
        loop: an address for `Wire.turn`, where this side talks to itself.
        audience: how many echoes there are.
    """

    side: Side
    address: str
    announce: Callable[[str], None]
    descriptors: tuple[int, ...] = ()
    options: str = ""
    loop: str = ""
    audience: int = 1


@dataclass(frozen=True, slots=True)
class Wire:
    """One open end. An end that only sends, or only receives, has `not_here` for the other.

    Attributes:
        flush: returns when what was sent has left the process; where `send` only puts it into a buffer.
        recv_soon: as `recv`, but raises TimeoutError when nothing comes for `QUIET` seconds; where messages may be lost.
        echo: answers so many messages. Given where a client library serves by calling us, so that
            answering inside its handler is what one would write.
        drain: takes so many messages and returns the time (perf_counter_ns) of the last; likewise.
        turn: all that becomes of one message, by one thread: sent, received, acknowledged.
    """

    send: Callable[[bytes], object]
    recv: Callable[[], bytes]
    send_many: Callable[[list[bytes]], object] | None = None
    recv_many: Callable[[int], list[bytes]] | None = None
    flush: Callable[[], object] | None = None
    recv_soon: Callable[[], bytes] | None = None
    echo: Callable[[int], object] | None = None
    drain: Callable[[int], int] | None = None
    turn: Callable[[bytes], object] | None = None


@dataclass(frozen=True, slots=True)
class AsyncWire:
    """As `Wire`, awaited, and nothing that may be lost."""

    send: Callable[[bytes], Awaitable[object]]
    recv: Callable[[], Awaitable[bytes]]
    send_many: Callable[[list[bytes]], Awaitable[object]] | None = None
    recv_many: Callable[[int], Awaitable[list[bytes]]] | None = None
    flush: Callable[[], Awaitable[object]] | None = None
    echo: Callable[[int], Awaitable[object]] | None = None
    drain: Callable[[int], Awaitable[int]] | None = None
    turn: Callable[[bytes], Awaitable[object]] | None = None


def not_here(*_: object) -> Any:
    """What an end does not do."""
    raise AssertionError("this end has no such verb")


Handed: TypeAlias = tuple[str, Sequence[int]]
#: Given the address of a pair without a name, makes it, and says for (echo, drive): the address, and the descriptors that
#: the worker inherits. They belong to the context.
Handover: TypeAlias = Callable[[str], AbstractContextManager[tuple[Handed, Handed]]]

Opener: TypeAlias = Callable[[End], AbstractContextManager[Wire]]
AsyncOpener: TypeAlias = Callable[[End], AbstractAsyncContextManager[AsyncWire]]

#: Seconds without a message after which the rest of a lossy flow counts as lost.
QUIET = 0.25
