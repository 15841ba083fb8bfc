"""The contract between transports and everything above them.

A transport never blocks. It *tries*; when it cannot go on it says *what to wait for*; the two drivers in `_wait` do the
waiting, one for threads and one for an event loop. So a transport is written once, and works in both shells.

    try_recv() -> None          nothing there
    arm(RECV)  -> Wait          "I am about to sleep": from now on, new data makes one of these descriptors ready
    try_recv() -> None          asked again: closes the race between the first try and the announcement
    (sleep on the Wait)

Rules that every implementation keeps, and the conformance suite checks:

* **Frames are whole.** A frame is accepted whole or not at all, and delivered whole or not at all.
* **`try_` never waits**, never raises for "full" or "empty" (these are return values), and may be called at any time.
* **`arm` precedes the last try.** After `arm(want)`, a change that would let `try_*` succeed makes the Wait ready. A Wait may
  be ready for nothing; whoever wakes tries again.
* **`close` is immediate and idempotent.** Frames accepted before it are still delivered if the peer lives.
  After it, `try_*` raises `Closed`.
* **A peer's end comes after its frames.** `try_recv` returns everything that was committed before it raises
  `PeerClosed` or `PeerDied`; then it raises the same again at every call. `try_send` raises it at once.
* **Bad input ends one link**, with `ProtocolError`, and nothing else.
* **Ownership.** `try_send` is done with the buffer when it returns. `try_recv` gives away a new `bytes`.
* **Threads.** One thread may send while another receives. The patterns serialise more than that.

Steps: an operation that may wait is a generator of `Wait`s (`Steps[T]`), returning its result. The driver throws `Timeout`
into it when the time is up, and closes it when the caller is cancelled; at each of these points nothing may be lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntFlag
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

from . import errors
from ._capabilities import Capabilities
from ._url import Url
from .message import Parcel, Verdict

T = TypeVar("T")

#: What may be sent: anything with a C-contiguous buffer.
Buffer: TypeAlias = bytes | bytearray | memoryview


class Want(IntFlag):
    RECV = 1  # a frame, or a connection to accept
    SEND = 2  # room for a frame, or for the rest of one

    __and__ = int.__and__  # type: ignore[assignment]  # asked before every sleep: an int in 0.1 us, not a member in 1


class Wait(NamedTuple):
    """What to sleep on: readiness of any of these descriptors, or `at_most` seconds.

    `fds` holds (descriptor, events), events as in `select.poll` (POLLIN 1, POLLOUT 4); errors and hang-ups always count as
    ready. `at_most` is for the few things that no descriptor announces, such as a TCP listener that is not there yet.
    A descriptor belongs to one endpoint only: an event loop knows one callback for each.
    """

    fds: tuple[tuple[int, int], ...]
    at_most: float | None = None


Steps: TypeAlias = Generator[Wait, None, T]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as far as the kernel tells. None: unknown."""

    pid: int | None = None
    uid: int | None = None
    gid: int | None = None
    address: str | None = None


class Link(Protocol):
    """Whole frames to and from one peer."""

    @property
    def native(self) -> Any:
        """The object underneath (socket, queue, broker client), for what ipckit does not wrap."""

    @property
    def peer(self) -> Peer: ...

    def try_send(self, frame: Buffer) -> bool:
        """Take the frame, or return False when there is no room now.

        A link may keep the unsent rest of *one* accepted frame; it goes out with `try_flush`, or with any later call.

        Raises: MessageTooLarge (nothing was sent, the link stays good), PeerClosed, PeerDied, Closed.
        """

    def try_flush(self) -> bool:
        """True when nothing that was accepted is still held in this process (or unconfirmed by the broker)."""

    def try_recv(self) -> bytes | None:
        """The next frame, or None when there is none now. Raises: PeerClosed, PeerDied, ProtocolError, Closed."""

    def arm(self, want: Want) -> Wait:
        """Announce that we are about to sleep. While an accepted rest is unsent, waiting to RECV also drives it out."""

    def close(self) -> None: ...


class Listener(Protocol):
    """A name that peers connect to."""

    @property
    def url(self) -> Url:
        """Where it can be reached: the URL given, with the port that the system chose."""

    @property
    def native(self) -> Any: ...

    def try_accept(self) -> Link | None:
        """The next peer, or None. A peer that fails its handshake is dropped and logged, never raised."""

    def arm(self, want: Want) -> Wait: ...

    def close(self) -> None:
        """Stop listening and remove the name. Links that were accepted live on."""


# -- small optional promises, each tied to a capability ----------------------------------------------------------


@runtime_checkable
class Pollable(Protocol):
    """`fileno`: one descriptor that becomes readable when a frame may have come. Capability `fileno`."""

    def fileno(self) -> int: ...


@runtime_checkable
class Spinning(Protocol):
    """Links that may find it cheaper to look again and again for a few µs than to sleep (option `spin=`)."""

    def spin_recv(self) -> bytes | None:
        """`try_recv`, that before it answers None looks again for as long as pays, 50 µs at most, without the GIL.

        For the event loop, which would otherwise sleep and be woken: 20 µs of a round trip. It holds the loop up that
        long, so `auto` looks less often where looking has not paid.
        """


@runtime_checkable
class Reframing(Protocol):
    """A link on a byte stream whose peer may be a program of another make, with a protocol of its own on frames like ours.

    For whoever accepted it, before anything was sent or received: look at what comes first, then say how to go on.
    """

    def try_glance(self, count: int, /) -> bytes | None:
        """The next bytes of the stream, prefix included, which stay where they are; None while there are fewer.

        Raises: what `try_recv` does.
        """

    def reframe(self, uncounted_in: int, uncounted_out: int, /) -> None:
        """From here on a frame begins with a header of so many bytes, which its length does not count, and we write no goodbye:
        such a peer would take it for a length.
        """


@runtime_checkable
class Prioritised(Protocol):
    """Frames with a priority, higher first. Capability `priorities`."""

    def try_send_priority(self, frame: Buffer, priority: int) -> bool: ...


@runtime_checkable
class Abandoning(Protocol):
    """Links and listeners that hold descriptors. Called in a forked child, where no other thread lives.

    Let go of the descriptors and of nothing else: no goodbye, no name removed, no lock taken. Without it the child would keep
    the connection open after its parent died, and the peer would never hear of the death. Afterwards every call raises
    `ForkedError`.
    """

    def abandon(self) -> None: ...


@runtime_checkable
class Fused(Protocol):
    """A link whose blocking calls are one call each: try, spin, sleep, all underneath, with the GIL released.

    A Channel binds them in place of its own, so that nothing of Python stands between the caller and them. They keep the
    same contract as the loops that they replace, and serialise concurrent callers themselves.
    """

    def send(self, frame: Buffer, timeout: float | None = None, priority: int = 0) -> None: ...
    def recv(self, timeout: float | None = None) -> bytes: ...
    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int: ...
    def send_many(self, frames: Sequence[Buffer], timeout: float | None = None) -> int:
        """How many were accepted in time. Raises MessageTooLarge before any is sent."""

    def recv_many(self, limit: int, timeout: float | None = None) -> list[bytes]: ...
    def counters(self) -> tuple[int, int, int, int]:
        """Frames sent, bytes sent, frames received, bytes received."""


@runtime_checkable
class Claiming(Protocol):
    """Frames written and read in place. Capability `zero_copy`.

    Both return a context manager over a memoryview, or None when it must wait. Leaving a loan's block normally commits the
    frame, leaving it by an exception takes it back; leaving a borrow's block gives the memory back to the sender. A view
    that is kept past its block raises `BufferError` at the end of the block; the memory behind it stays valid, and stays
    occupied, until the last such view is gone.
    """

    def try_loan(self, size: int) -> AbstractContextManager[memoryview] | None: ...
    def try_borrow(self) -> AbstractContextManager[memoryview] | None: ...


@runtime_checkable
class Giving(Protocol):
    """An end that may become another process's: it can be pickled by multiprocessing, while it is unused."""

    def give(self, operation: str) -> None:
        """From now on it is the other process's; closing it here says no goodbye. Raises ConfigError if it was used."""

    def __reduce__(self) -> tuple[Any, ...]: ...


# -- the transport itself ----------------------------------------------------------------------------------------

OptionsT = TypeVar("OptionsT")


class Transport(ABC, Generic[OptionsT]):
    """One scheme (or a family of them): its declarations, and how its endpoints are opened.

    A module in `ipckit.transports` ends with its one instance; `_registry` finds it there. Importing the module must not
    import the backend: `capabilities` has to be readable where it is not installed.
    """

    #: What it promises; a scheme of the family that differs overrides `capabilities_of`.
    capabilities: ClassVar[Capabilities]
    #: A frozen dataclass made of `_options.option()` fields: what stands behind the `?` of the URL.
    options: ClassVar[type[Any]]
    #: Modules that must be importable, and the extra that brings them (`pip install ".[extra]"`).
    requires: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    #: The module that makes calls its own way (`Server`, `AsyncServer`, `Client`, `AsyncClient`: subclasses of those of
    #: `ipckit.rpc`), by its name, because a transport imports no pattern. None: calls go over its links.
    calls: ClassVar[str | None] = None

    def capabilities_of(self, url: Url) -> Capabilities:
        return self.capabilities

    @abstractmethod
    def listen(self, url: Url, options: OptionsT) -> Steps[Listener]:
        """Take the name. Raises AddressInUse if a live listener has it; a name left by a dead one is replaced."""

    @abstractmethod
    def connect(self, url: Url, options: OptionsT) -> Steps[Link]:
        """Reach the listener, waiting for one until the driver throws `Timeout`; then raise NothingListening."""

    def pair(self, url: Url, options: OptionsT) -> tuple[Link, Link]:
        """Two connected ends."""
        raise errors.Unsupported("this transport makes no pairs", url=url, hint="use listen() and connect()")


# -- queues and topics -------------------------------------------------------------------------------------------


class Outlet(Protocol):
    """The sending side of a queue, or a publisher. `try_` never waits; `arm`, `close` and threads as for a Link."""

    @property
    def native(self) -> Any: ...

    def try_put(self, parcel: Parcel) -> bool:
        """Take the parcel, or return False when there is no room now.

        Raises: MessageTooLarge; Unsupported for a header, priority or topic that this transport cannot carry.
        """

    def try_flush(self) -> bool:
        """True when everything that was put is the responsibility of somebody who outlives us (or, where nobody does, has
        left this process), or has a `failure`. Raises what concerns all of them.
        """

    def arm(self, want: Want) -> Wait: ...

    def counters(self) -> Mapping[str, int]:
        """Since it was opened: "sent", "bytes_sent", and what this transport has to say ("dropped", "reconnects" ...)."""

    def close(self) -> None: ...


class Intake(Protocol):
    """The receiving side of a queue, or a subscriber."""

    @property
    def native(self) -> Any: ...

    def try_get(self) -> Parcel | None: ...

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        """Take the verdict, or return False when there is no room now. A parcel that was settled, or needs no settling, is
        taken and forgotten. `delay`: seconds, of NACK.
        """

    def try_flush(self) -> bool:
        """True when every verdict is noted where it counts."""

    def arm(self, want: Want) -> Wait: ...

    def counters(self) -> Mapping[str, int]:
        """Since it was opened: "received", "bytes_received", and what this transport has to say ("redelivered" ...)."""

    def close(self) -> None: ...


@runtime_checkable
class Batching(Protocol):
    """An outlet that takes several at once for less than one after the other costs."""

    def try_put_many(self, parcels: Sequence[Parcel]) -> int:
        """Take from the first on as many as there is room for, and no bad one; `try_put` says what the next one meets."""


@runtime_checkable
class SpinningIntake(Intake, Protocol):
    """As `Spinning`, for an intake."""

    def spin_get(self) -> Parcel | None:
        """`try_get`, that before it answers None looks again for as long as pays, 50 µs at most, without the GIL."""


@runtime_checkable
class Draining(Protocol):
    """An outlet whose messages depend on this process until they are acknowledged."""

    def try_drain(self) -> bool:
        """True when none of them does. `arm(Want.RECV)` announces that we sleep until then."""


@runtime_checkable
class Located(Protocol):
    """An outlet or intake that listens: where it can be reached, with the port that the system chose."""

    @property
    def url(self) -> Url: ...


class Publishing(Outlet, Protocol):
    """An Outlet that fans out."""

    def subscribers(self) -> int:
        """How many subscribers are there now. `arm(Want.RECV)` announces that we sleep until there are more.

        `counters()` has the number as it was known last ("subscribers"), and may be asked by any thread at any time.
        """


OnFull: TypeAlias = Literal["block", "drop_old", "drop_new", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishTerms:
    """What a publisher asks for: what a slow subscriber costs, and how many last messages of a topic a late one is given."""

    on_full: OnFull = "block"
    retain: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueTerms:
    """How a receiver wants to take part.

    Attributes:
        group: receivers of one group share the messages, each group gets them all; None: the transport's only group.
        manual: the user acknowledges; else it is done for them when they ask for the next message.
    """

    group: str | None = None
    manual: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicTerms:
    """How a subscriber wants to take part.

    Attributes:
        topics: patterns of dot-separated levels; `*` is one level, `>` the rest.
        group: subscribers of one group share the messages; None: each gets them all.
    """

    topics: tuple[str, ...] = (">",)
    group: str | None = None


class Queues(ABC, Generic[OptionsT]):
    """Mixed into a Transport that has queues of its own. The others get them over links (`_linkqueue`)."""

    queue_options: ClassVar[type[Any]]

    def serves(self, url: Url) -> bool:
        """False: at this URL queues and topics go over links all the same."""
        return True

    @abstractmethod
    def sender(self, url: Url, options: OptionsT) -> Steps[Outlet]: ...

    @abstractmethod
    def receiver(self, url: Url, options: OptionsT, terms: QueueTerms) -> Steps[Intake]: ...


class SidedQueues(Queues[OptionsT]):
    """Queues without a place of their own for messages: one side has the name (`listen`)."""

    @abstractmethod
    def sender(self, url: Url, options: OptionsT, listen: bool = False) -> Steps[Outlet]: ...

    @abstractmethod
    def receiver(self, url: Url, options: OptionsT, terms: QueueTerms, listen: bool = True) -> Steps[Intake]: ...


class Topics(ABC, Generic[OptionsT]):
    """Mixed into a Transport that has topics of its own. The others get them over links (`_linkhub`)."""

    topic_options: ClassVar[type[Any]]

    def serves(self, url: Url) -> bool:
        """False: at this URL queues and topics go over links all the same."""
        return True

    @abstractmethod
    def publisher(self, url: Url, options: OptionsT, terms: PublishTerms) -> Steps[Publishing]: ...

    @abstractmethod
    def subscriber(self, url: Url, options: OptionsT, terms: TopicTerms) -> Steps[Intake]: ...
