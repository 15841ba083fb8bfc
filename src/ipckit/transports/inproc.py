"""`inproc://name`: threads and tasks of one process. The reference transport: read it first, the others do the same with more.

A listener is an entry in a table of this process. A link is two `_Way`s, one for each direction: a deque of frames, the bytes
put and taken, and a doorbell at each end. Promises: ordered, reliable, bounded (`capacity`); frames are copied when they are
sent; an end that is garbage-collected without a close has died, like a process that ends without a goodbye.

There is no lock. A way has one putter and one taker, each counts in a variable of its own, and the interpreter makes one store or
one deque call at a time: a store that precedes another in one thread is never seen after it in another. So a sleeper announces
itself and then looks again, and who puts something there rings only if somebody is announced.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from .. import errors
from .._capabilities import Capabilities
from .._options import LinkOptions, option, size
from .._spi import Buffer, Link, Listener, Peer, Steps, Transport, Wait, Want
from .._url import Url
from ._bell import Bell

#: What a frame costs besides its bytes, so that empty ones fill a way up as well.
_OVERHEAD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(LinkOptions):
    capacity: int = option(
        1 << 20, size, "bytes on their way in one direction before the sender waits; 64 more a message"
    )


class _Way:
    """One direction."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.put = 0  # bytes, with overhead; written by the sender only
        self.taken = 0  # the same, by the receiver only
        self.over: Callable[[], errors.PeerError] | None = None  # how one of its ends left; the other one raises it
        self.data = Bell()  # the receiver sleeps here
        self.room = Bell()  # the sender sleeps here


class InprocLink:
    """One end of two ways."""

    native = None  # nothing lies underneath

    def __init__(self, out: _Way, in_: _Way, url: Url, options: Options) -> None:
        self._ways: tuple[_Way, _Way] | None = (out, in_)  # None: closed
        self._url = url
        self._options = options
        self.peer = Peer(os.getpid(), os.getuid(), os.getgid())

    def try_send(self, frame: Buffer) -> bool:
        way, _ = self._open()
        if way.over:
            raise way.over()
        length = memoryview(frame).nbytes
        if length > self._options.limit:
            why = f"{length} bytes are above the limit of {self._options.limit}"
            raise errors.MessageTooLarge(why, url=self._url, operation="send", hint="raise limit= at both ends")
        cost, held = length + _OVERHEAD, way.put - way.taken
        if held and held + cost > self._options.capacity:  # an empty way takes any frame, or a large one could never go
            return False
        way.put += cost
        way.frames.append(bytes(frame))
        way.data.ring()
        return True

    def try_flush(self) -> bool:
        return True

    def try_recv(self) -> bytes | None:
        _, way = self._open()
        over = way.over  # read first: where it is set, all the frames that will ever come are there
        if not way.frames:
            if over:
                raise over()
            return None
        frame = way.frames.popleft()
        way.taken += len(frame) + _OVERHEAD
        way.room.ring()
        return frame

    def arm(self, want: Want) -> Wait:
        out, in_ = self._open()
        bells = [in_.data] * bool(want & Want.RECV) + [out.room] * bool(want & Want.SEND)
        return Wait(tuple(bell.announce() for bell in bells))

    def close(self) -> None:
        self._leave(partial(errors.PeerClosed, "the other end was closed", url=self._url))

    def __del__(self) -> None:  # the collector runs anywhere, even inside a call of ours: store and ring, nothing more
        self._leave(
            partial(errors.PeerDied, "the other end was dropped without a close", url=self._url, pid=os.getpid())
        )

    def _leave(self, over: Callable[[], errors.PeerError]) -> None:
        ways, self._ways = self._ways, None
        if ways:
            out, in_ = ways
            out.over = in_.over = over
            out.data.ring()
            in_.room.ring()

    def _open(self) -> tuple[_Way, _Way]:
        if not self._ways:
            raise errors.Closed("this end is closed", url=self._url)
        return self._ways


def _connected(url: Url, one: Options, other: Options) -> tuple[InprocLink, InprocLink]:
    options = Options(limit=min(one.limit, other.limit), capacity=min(one.capacity, other.capacity))
    there, back = _Way(), _Way()
    return InprocLink(there, back, url, options), InprocLink(back, there, url, options)


class InprocListener:
    """A name in the table, and the links that nobody has accepted yet."""

    native = None

    def __init__(self, url: Url, options: Options) -> None:
        self.url = url
        self._options = options
        self._backlog: deque[InprocLink] = deque()
        self._bell: Bell | None = Bell()  # None: closed

    def admit(self, url: Url, options: Options) -> InprocLink:
        ours, theirs = _connected(url, options, self._options)
        self._backlog.append(theirs)
        if bell := self._bell:
            bell.ring()
        else:  # closed meanwhile: one of us two turns the link away
            self._turn_away()
        return ours

    def try_accept(self) -> InprocLink | None:
        self._open()
        return self._backlog.popleft() if self._backlog else None

    def arm(self, want: Want) -> Wait:
        return Wait((self._open().announce(),))

    def close(self) -> None:
        if self._bell:
            self._bell = None
            del _listeners[self.url.name]
            self._turn_away()

    def _open(self) -> Bell:
        if not self._bell:
            raise errors.Closed("this listener is closed", url=self.url, operation="accept")
        return self._bell

    def _turn_away(self) -> None:
        with suppress(IndexError):
            while True:
                self._backlog.popleft().close()


_listeners: dict[str, InprocListener] = {}
_waiting: set[Bell] = set()  # of those who connect to a name that is not there yet
os.register_at_fork(after_in_child=_listeners.clear)  # the listening threads are not here


class Inproc(Transport[Options]):
    capabilities = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        pair=True,
        cross_process=False,
        peer_credentials=True,
        model="queues in memory",
        synchronisation="doorbells",
        use_case="threads and tasks of one program; tests",
    )
    options = Options

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        listener = InprocListener(url, options)
        if _listeners.setdefault(url.name, listener) is not listener:
            raise errors.AddressInUse("somebody in this process listens there already", url=url, operation="listen")
        for bell in tuple(_waiting):
            bell.ring()
        return listener
        yield  # a generator that never waits

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        bell = Bell()
        _waiting.add(bell)
        try:
            while (listener := _listeners.get(url.name)) is None:
                wait = Wait((bell.announce(),))
                if url.name not in _listeners:
                    yield wait
        except errors.Timeout as timeout:
            why = "nobody in this process listens there"
            raise errors.NothingListening(why, url=url, operation="connect") from timeout
        finally:
            _waiting.discard(bell)
        return listener.admit(url, options)

    def pair(self, url: Url, options: Options) -> tuple[Link, Link]:
        return _connected(url, options, options)


TRANSPORT = Inproc()
