"""The native core: what Python cannot do without the GIL, or not at all (atomics).

`StreamLink` and `RingLink` implement `ipckit._spi.Link`, `Pollable` and `Fused`; `RingLink` also `Claiming`.
Their contract is in `_spi`; here stands what is particular to them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from .._spi import Buffer, Peer, Wait, Want

# Why a native link gives up; the first argument of `fail`. Numbers are shared with module.h.
CLOSED: int  # we closed it
ENDED: int  # end of file; detail: True if inside a frame, else False
GOODBYE: int  # the peer closed in order
TIMED_OUT: int  # nothing happened
UNKNOWN: int  # timed out or interrupted with part of the frame sent: the rest is kept and goes out with the next call
TOO_LARGE: int  # detail: (size, limit). The link stays good
PROTOCOL: int  # detail: str, what is wrong. The link is closed to further use
SYSTEM: int  # detail: errno
UNSUPPORTED: int  # detail: str

Fail = Callable[[int, str, Any], BaseException]  # (reason, operation, detail) -> the exception to raise

class StreamLink:
    """Length-prefixed frames (u32 big-endian) over one or two descriptors, which it owns.

    A socket is set to blocking, because recv itself is the cheapest sleep; anything else to non-blocking. A link that is dropped
    without a close() says no goodbye. If the constructor raises, the descriptors are still the caller's.
    """

    def __init__(
        self,
        rfd: int,
        wfd: int,  # may equal rfd
        fail: Fail,
        on_fork: Callable[[], None],  # first use in a forked child: raise ForkedError, or return to go on
        limit: int,  # bytes; a longer prefix is PROTOCOL before anything is allocated
        spin_ns: int,  # -1: auto
        goodbye: bool,  # write ff ff ff ff at close, and expect it
        wait: Callable[..., Wait],  # the Wait class
        native: Any,
        peer: Peer,
    ) -> None: ...
    native: Any
    peer: Peer
    def try_send(self, frame: Buffer, /) -> bool: ...
    def try_flush(self) -> bool: ...
    def try_recv(self) -> bytes | None: ...
    def spin_recv(self) -> bytes | None: ...
    def try_glance(self, count: int, /) -> bytes | None:
        """The next `count` bytes (64 at most), which stay where they are; None while there are fewer. Raises as `try_recv`."""
    def reframe(self, uncounted_in: int, uncounted_out: int, /) -> None:
        """From here on a frame begins with a header of so many bytes that its length does not count; and no goodbyes."""
    def arm(self, want: Want, /) -> Wait: ...
    def send(self, frame: Buffer, timeout: float | None = None, priority: int = 0) -> None: ...
    def recv(self, timeout: float | None = None) -> bytes: ...
    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int: ...
    def send_many(self, frames: Sequence[Buffer], timeout: float | None = None) -> int: ...
    def recv_many(self, limit: int, timeout: float | None = None) -> list[bytes]: ...
    def counters(self) -> tuple[int, int, int, int]: ...
    def fileno(self) -> int: ...
    def close(self, goodbye: bool = True) -> None:
        """`goodbye=False`: just let go of the descriptors (the end lives on in another process).

        A thread that still receives from a socket let go of like this wakes with the next bytes, or the end.
        """
    def detach(self) -> tuple[int, int]:
        """Give up the descriptors, non-blocking, without closing them. Raises ValueError if anything is buffered."""

class RingLink:
    """Two shared-memory rings, one for each direction, and their doorbells.

    The descriptors are the link's once the constructor has returned; when it raises, they are still the caller's. `on_fork` must
    raise: a ring belongs to the process that opened it.

    Frames up to a chunk (a sixteenth of the ring, 16 to 256 KiB) are one record; longer ones, up to `limit`, stream. A sender
    that never waits hears of its peer's death within a tick of the coarse clock (1 to 10 ms), everybody who waits at once.
    While a loan is open its link sends nothing else. Borrows may overlap; memory goes back when the last of them ends.
    """

    def __init__(
        self,
        memory: int,  # memfd with the layout of layout.h: checked, mapped, and closed
        bells: tuple[int, int, int, int],  # eventfds: (ring 0 data, ring 0 space, ring 1 data, ring 1 space); owned
        control: int,  # connected Unix socket; its end of file is the peer's end; owned
        side: int,  # 0 sends on ring 0, 1 on ring 1
        fail: Fail,
        on_fork: Callable[[], None],
        limit: int,
        spin_ns: int,  # -1: auto
        wait: Callable[..., Wait],
        native: Any,
        peer: Peer,
    ) -> None: ...
    native: Any
    peer: Peer
    def try_send(self, frame: Buffer, /) -> bool: ...
    def try_flush(self) -> bool: ...
    def try_recv(self) -> bytes | None: ...
    def spin_recv(self) -> bytes | None: ...
    def arm(self, want: Want, /) -> Wait: ...
    def send(self, frame: Buffer, timeout: float | None = None, priority: int = 0) -> None: ...
    def recv(self, timeout: float | None = None) -> bytes: ...
    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int: ...
    def send_many(self, frames: Sequence[Buffer], timeout: float | None = None) -> int: ...
    def recv_many(self, limit: int, timeout: float | None = None) -> list[bytes]: ...
    def try_loan(self, size: int, /) -> AbstractContextManager[memoryview] | None: ...
    def try_borrow(self) -> AbstractContextManager[memoryview] | None: ...
    def counters(self) -> tuple[int, int, int, int]: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...
    def abandon(self) -> None:
        """In a forked child: let go of descriptors and memory. Elsewhere: nothing."""

def ring_create(capacity: int) -> int:
    """A sealed memfd (CLOEXEC) holding two rings of `capacity` bytes each, formatted and allocated. Raises OSError."""

class CastOut:
    """The publishing side of topics in shared memory: an arena of payloads, and a queue of references for each subscriber.

    Never waits. Calls must be serialised; large copies let go of the GIL meanwhile.
    """

    def __init__(self, size: int, backlog: int, policy: int) -> None:
        """`size`: bytes of payloads, a power of two. `policy`: 0 block, 1 drop_old, 2 drop_new, 3 error. Raises OSError."""
    def memory(self) -> int:
        """The arena's descriptor, to be passed on. It stays ours."""
    def admit(self, slots: int, bell: int, /) -> tuple[int, int]:
        """Room for one more subscriber: its slot, and the descriptor of its queue, which is the caller's. Raises OSError."""
    def remove(self, slot: int, /) -> None: ...
    def put(self, slots: bytes, prefix: bytes, body: Buffer, force: bool = False, /) -> int:
        """Give one message to those slots (u32 in native order): 0 done, 1 no room now (block), 2 somebody is full (error).
        4 more: somebody is `broken`.

        `force`: past the backlog; what finds no room is dropped, and counted. Raises OSError when the system has no memory.
        """
    def skip(self, slot: int, /) -> None:
        """This one is not given the message: one more is missing there."""
    def want_room(self) -> None:
        """Announce that we are about to wait for room: a subscriber that takes a message rings its room bell."""
    def keeps_up(self, slot: int, /) -> bool:
        """Its queue is below the backlog."""
    def counts(self) -> tuple[int, int]:
        """References queued now, messages dropped since it was opened."""
    def broken(self) -> list[int]:
        """Slots whose subscriber wrote what cannot be. They are given nothing any more; remove them."""
    def close(self, goodbye: bool = True, /) -> None: ...

class CastIn:
    """The subscribing side of topics in shared memory. Maps the payloads read-only. Never waits; calls must be serialised."""

    def __init__(
        self,
        arena: int,
        queue: int,
        control: int,
        data_bell: int,
        room_bell: int,
        limit: int,
        spin_ns: int,  # -1: auto
        peer: Peer,
    ) -> None:
        """Descriptors stay the caller's; all but arena and queue must stay open. Raises ValueError: what is wrong with them."""
    def try_take(self) -> tuple[int, bytes, bytes] | int | None:
        """(how many were dropped before it, prefix, body); None: nothing there; GOODBYE or ENDED. Raises ValueError: broken."""
    def spin_take(self) -> tuple[int, bytes, bytes] | int | None:
        """`try_take`, that before it answers None looks again for as long as pays, 50 µs at most, without the GIL."""
    def arm(self) -> None:
        """Announce that we are about to sleep until `data_bell` or `control` is readable."""
    def trailing(self) -> int:
        """After GOODBYE: how many were dropped at the end."""
    def close(self) -> None: ...

def floor(mechanism: str, size: int, rounds: int, cpus: tuple[int, int]) -> list[int]:
    """Round-trip times in ns of the bare mechanism in C, between two pinned processes; see floor.h for the names."""

def floor_mechanisms() -> tuple[str, ...]:
    """What `floor` knows; not every mechanism carries every size (ValueError)."""

def floor_throughput(mechanism: str, size: int, count: int, cpus: tuple[int, int]) -> int:
    """Nanoseconds in which `count` messages of `size` bytes went one way."""

# System calls that Python lacks (Linux). They raise OSError, and never wait: the queue is O_NONBLOCK.

def mq_send(mqd: int, frame: Buffer, priority: int) -> bool:
    """False when the queue is full."""

def mq_receive(mqd: int, buffer: bytearray | memoryview) -> int:
    """Bytes of the message that is in `buffer` now; -1 when the queue is empty. The buffer is as long as a frame may be."""

def watch_directory(path: Path) -> int:
    """A descriptor (inotify) that tells which files of the directory were closed after writing, or got their name there."""

class _Sync:
    """Memory that processes share, mapped; the descriptor is its own from then on. ValueError: this is no such object."""

    def __new__(
        cls, fd: int, kind: int, fail: Callable[[int, str, int], BaseException], take: bool = False
    ) -> Self: ...
    _fd: int
    _inherited: bool

class Mutex(_Sync):
    """`lock.h`. Whatever raises, the lock is not held then."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool: ...
    def release(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def _recover(self, timeout: float | None, /) -> bool: ...
    def _abandon(self) -> None: ...
    def _owner(self) -> tuple[int, float, int] | None: ...
    def _is_owned(self) -> bool: ...
    def _word(self) -> int: ...
    def _release_all(self) -> None: ...
    def _watch(self) -> None: ...
    def _attempt(self, claim: int, /) -> Attempt: ...

class Crowd(_Sync):
    """`crowd.h`. Slots are counted from 1 here; 0 is none."""

    def _enter(
        self, role: int, operation: str, block: bool = True, timeout: float | None = None, /
    ) -> tuple[int, int, int]: ...  # verdict (DONE, INHERITED, or WAIT: not in time), slot, how many were there before
    def _wait(self, timeout: float | None, lock: Mutex, /) -> bool: ...
    def _leave(self, role: int, operation: str, slot: int = 0, abandon: bool = False, /) -> None: ...
    def _post(self, count: int, /) -> None: ...
    def _notify(self, count: int, /) -> None: ...
    def _open(self, slot: int, /) -> None: ...
    def _break(self, slot: int, /) -> None: ...
    def _reset(self) -> None: ...
    def _count(self, role: int, waiting: bool, /) -> int: ...
    def _is_mine(self, role: int, /) -> bool: ...
    def _value(self) -> int: ...
    def _flags(self) -> tuple[int, int]: ...
    def _people(self) -> list[tuple[int, int, bool, tuple[int, float, int]]]: ...
    def _attempt(self, role: int, lock: Mutex | None = None, /) -> Attempt: ...
    def _event_wait(self, timeout: float | None, /) -> bool: ...
    def _event_set(self) -> None: ...
    def _event_clear(self) -> None: ...
    def _event_is_set(self) -> bool: ...

class Attempt:
    """One way in for a task of an event loop."""

    slot: int
    before: int
    def poll(self) -> int | None: ...
    def arm(self, eventfd: int, /) -> None: ...
    def now(self) -> int | None: ...
    def give_up(self) -> bool: ...

def own_methods(cls: type[Mutex], /) -> None:
    """Give a subclass its own copies of the methods that have to be fast."""

def sync_format(fd: int, kind: int, value: int, limit: int, /) -> None:
    """Write a new object into an empty file, and allocate it. Raises OSError."""

def sync_supported() -> bool:
    """Robust futexes work here."""

class Exporter:
    """Exports the buffer of another object: each view belongs to the object that it was made from, and keeps that alive.

    What exported directly lives as long as the Exporter, because numpy.ndarray(buffer=x) holds x and not its buffer.
    """

    def _export(self, source: object, /) -> None: ...
    def _view(self) -> memoryview: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...

class Latest:
    """`latest.h`, in writable memory that is already formatted (else ValueError). Numbers count the values from 1.

    Calls methods of its subclass: `_claim()` before this process writes first, and `_trouble(what, detail)`, which raises, when
    it is "closed", the memory "damaged", or a value of `detail` bytes too "large".
    """

    def __new__(cls, memory: Buffer, /) -> Self: ...
    _seen: int  # the number of the value that was read last
    def read(self) -> Any: ...
    def read_into(self, buffer: Buffer, /) -> int | None: ...
    def write(self, value: Any, /) -> int: ...
    def _await(self, seen: int, timeout: float | None, /) -> bool: ...
    def _watch(self, seen: int, eventfd: int, /) -> LatestWatch | None: ...
    def _number(self) -> int: ...
    def _writer(self) -> int: ...
    def _let_go(self) -> None: ...

class LatestWatch:
    """A thread of the core that waits for a newer value; dismissed with the object."""

def latest_bytes(capacity: int, /) -> int:
    """How much memory a Latest takes for values of up to `capacity` bytes; 0: too large."""

def latest_format(memory: Buffer, capacity: int, /) -> None:
    """Write an empty one into zeros."""
