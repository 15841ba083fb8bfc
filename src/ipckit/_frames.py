"""Channel: whole messages, in order, between two parties.

    with ipckit.listen("unix://calc") as listener, listener.accept() as channel: ...
    with ipckit.connect("unix://calc", timeout=5) as channel: ...

Three layers. `_Frames` is the logic, written once as steps over a Link. `Channel` and `Listener` run the steps on the caller's
thread, `AsyncChannel` and `AsyncListener` on the running loop; they hold nothing but one line per verb. Where the link is
`Fused` (native), the synchronous verbs are its own methods, bound in place of ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from . import _options, errors
from ._capabilities import Capabilities
from ._endpoint import Endpoint, Opening
from ._spi import Buffer, Claiming, Fused, Giving, Link, Peer, Pollable, Prioritised, Spinning, Steps, Want
from ._spi import Listener as LinkListener
from ._url import Url
from ._wait import Lane, arun, run
from .codecs import RAW, Codec

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChannelStats:
    """Since the channel was opened. Bytes are payload, without framing."""

    messages_sent: int
    bytes_sent: int
    messages_received: int
    bytes_received: int


class _Frames:
    """The verbs as steps over one link. No thread, no loop, no codec."""

    __slots__ = ("_held", "_link", "_look", "counts", "url")

    def __init__(self, link: Link, url: Url) -> None:
        self._link = link
        self._look = link.spin_recv if isinstance(link, Spinning) else link.try_recv  # for who is about to sleep
        self._held: bytes | None = None  # a frame that was too large for the buffer of recv_into
        self.url = url
        self.counts = [0, 0, 0, 0]

    @property
    def holds(self) -> bool:
        return self._held is not None

    def send(self, frame: Buffer, priority: int = 0) -> Steps[None]:
        if self._try_send(frame, priority):
            self._count(frame)
        else:
            yield from self._accept(frame, priority)
        if not self._link.try_flush():
            yield from self._flush()

    def send_many(self, frames: Sequence[Buffer]) -> Steps[int]:
        done = 0
        try:
            for frame in frames:
                yield from self._accept(frame, 0)
                done += 1
            yield from self._flush()
        except errors.OutcomeUnknown:
            pass  # all that were counted are accepted; the rest goes out with the next call
        except errors.Timeout:
            if not done:
                raise
        return done

    def _accept(self, frame: Buffer, priority: int) -> Steps[None]:
        while not self._try_send(frame, priority):
            wait = self._link.arm(Want.SEND)
            if self._try_send(frame, priority):
                break
            yield wait
        self._count(frame)

    def _count(self, frame: Buffer) -> None:
        self.counts[0] += 1
        self.counts[1] += len(frame) if type(frame) is bytes else memoryview(frame).nbytes

    def _try_send(self, frame: Buffer, priority: int) -> bool:
        if not priority:
            return self._link.try_send(frame)
        if not isinstance(self._link, Prioritised):
            raise errors.Unsupported(
                "this transport has no priorities", url=self.url, operation="send", hint="see `ipckit transports`"
            )
        return self._link.try_send_priority(frame, priority)

    def _flush(self) -> Steps[None]:
        try:
            while not self._link.try_flush():
                wait = self._link.arm(Want.SEND)
                if self._link.try_flush():
                    return
                yield wait
        except errors.OutcomeUnknown:
            raise
        except errors.Timeout as timeout:
            raise errors.OutcomeUnknown(
                "the message was accepted, but not all of it has left",
                url=self.url,
                operation="send",
                hint="it goes out with the next call on this channel: do not send it again",
            ) from timeout

    def recv(self) -> Steps[bytes]:
        frame = self._try_recv(self._look)
        while frame is None:
            wait = self._link.arm(Want.RECV)
            frame = self._try_recv()
            if frame is None:
                yield wait
                frame = self._try_recv()
        return frame

    def recv_many(self, limit: int) -> Steps[list[bytes]]:
        if limit < 1:
            raise errors.BadOption(f"limit must be 1 or more, not {limit}", url=self.url, operation="recv_many")
        frames = [(yield from self.recv())]
        try:
            while len(frames) < limit and (frame := self._try_recv()) is not None:
                frames.append(frame)
        except errors.IpcError:
            pass  # sticky: the next call raises it, after these frames were delivered
        return frames

    def recv_into(self, buffer: bytearray | memoryview) -> Steps[int]:
        frame = yield from self.recv()
        try:
            return _fill(buffer, frame, self.url)
        except Exception:  # too small, read-only, no buffer at all: none of it may cost the message
            self._held = frame
            self.counts[2] -= 1
            self.counts[3] -= len(frame)
            raise

    def _try_recv(self, look: Callable[[], bytes | None] | None = None) -> bytes | None:
        if self._held is not None:
            frame: bytes | None = self._held
            self._held = None
        else:
            frame = (look or self._link.try_recv)()
        if frame is not None:
            self.counts[2] += 1
            self.counts[3] += len(frame)
        return frame

    def loan(self, size: int) -> Steps[AbstractContextManager[memoryview]]:
        link = self._claiming("loan")
        while (loan := link.try_loan(size)) is None:
            wait = self._link.arm(Want.SEND)
            if (loan := link.try_loan(size)) is not None:
                break
            yield wait
        return loan

    def borrow(self) -> Steps[AbstractContextManager[memoryview]]:
        link = self._claiming("borrow")
        if self._held is not None:
            return nullcontext(memoryview(self._try_recv() or b""))
        while (view := link.try_borrow()) is None:
            wait = self._link.arm(Want.RECV)
            if (view := link.try_borrow()) is not None:
                break
            yield wait
        return view

    def _claiming(self, operation: str) -> Claiming:
        if not isinstance(self._link, Claiming):
            raise errors.Unsupported(
                "this transport has no memory to lend", url=self.url, operation=operation, hint="shm:// has"
            )
        return self._link


def _fill(buffer: bytearray | memoryview, frame: bytes, url: Url) -> int:
    view = memoryview(buffer).cast("B")
    if len(frame) > len(view):
        raise errors.MessageTooLarge(
            f"the message has {len(frame)} bytes, the buffer {len(view)}",
            url=url,
            operation="recv_into",
            hint="it was kept: recv() returns it",
        )
    view[: len(frame)] = frame
    return len(frame)


class _Driven:
    """`Fused`, for a link that is not: the steps, run on the caller's thread."""

    __slots__ = ("_frames", "_rx", "_tx")

    def __init__(self, frames: _Frames, tx: Lane, rx: Lane) -> None:
        self._frames, self._tx, self._rx = frames, tx, rx

    def send(self, frame: Buffer, timeout: float | None = None, priority: int = 0) -> None:
        run(self._frames.send(frame, priority), self._tx, timeout)

    def recv(self, timeout: float | None = None) -> bytes:
        return run(self._frames.recv(), self._rx, timeout)

    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int:
        return run(self._frames.recv_into(buffer), self._rx, timeout)

    def send_many(self, frames: Sequence[Buffer], timeout: float | None = None) -> int:
        return run(self._frames.send_many(frames), self._tx, timeout)

    def recv_many(self, limit: int, timeout: float | None = None) -> list[bytes]:
        return run(self._frames.recv_many(limit), self._rx, timeout)

    def counters(self) -> tuple[int, int, int, int]:
        sent, bytes_sent, received, bytes_received = self._frames.counts
        return sent, bytes_sent, received, bytes_received


_FUSED = ("send", "recv", "recv_into", "send_many", "recv_many")  # what a Channel of bytes binds


class _BaseChannel(Endpoint, Generic[T]):
    _yielded = False

    def __init__(self, link: Link, url: Url, codec: Codec[T], capabilities: Capabilities) -> None:
        super().__init__(link, url, capabilities)
        self._link = link
        self._frames = _Frames(link, url)
        self._encode = codec.encode
        self._decode = codec.decode
        self.codec = codec
        self._undecoded = deque[bytes]()  # received by recv_many, behind one that could not be decoded
        self._tx = Lane(self._gate, "send")
        self._rx = Lane(self._gate, "recv")
        self._fused: Fused = link if isinstance(link, Fused) else _Driven(self._frames, self._tx, self._rx)

    @property
    def peer(self) -> Peer:
        """Who is at the other end, as far as the kernel tells."""
        return self._link.peer

    def stats(self) -> ChannelStats:
        return ChannelStats(*self._fused.counters())

    def _decoded(self, frames: list[bytes]) -> list[T]:
        """The values up to the first frame that is none; that one is the next call's error, if there are values before it."""
        values: list[T] = []
        for index, frame in enumerate(frames):
            try:
                values.append(self._decode(frame))
            except Exception:  # a codec may raise anything; no message is lost to its neighbour's error
                self._undecoded.extend(frames[index if values else index + 1 :])
                if not values:
                    raise
                break
        return values

    def _take_undecoded(self, limit: int) -> list[bytes]:
        frames: list[bytes] = []
        if self._undecoded and not self.closed:
            with suppress(IndexError):
                while len(frames) < limit:
                    frames.append(self._undecoded.popleft())
        return frames

    def _undecoded_into(self, buffer: bytearray | memoryview) -> int | None:
        frames = self._take_undecoded(1)
        if not frames:
            return None
        try:
            return _fill(buffer, frames[0], self.url)
        except Exception:
            self._undecoded.appendleft(frames[0])
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """For multiprocessing: an end that may be given away (`pipe://`) passes to a child. Raises Unsupported for others."""
        if self._yielded:
            self._gate.check("pickle")
        if not isinstance(self._link, Giving):
            raise errors.Unsupported(
                "this endpoint cannot pass to another process",
                url=self.url,
                operation="pickle",
                hint="pass the URL, and connect there; or use pipe://",
            )
        return type(self), (self._link, self.url, self.codec, self.capabilities)

    def yield_link(self, operation: str) -> Link:
        """Give the link to another pattern. From now on this channel raises Closed, and closing it does nothing.

        Raises: Closed; ConfigError while a call waits here, or a message was received and not taken.
        """
        if self._undecoded or self._frames.holds:
            raise errors.ConfigError(
                "a message waits in this channel", url=self.url, operation=operation, hint="recv() it first"
            )
        if self._gate.foreign and not isinstance(self._link, Giving):
            self._gate.refuse_foreign(operation)
        self._gate.surrender(f"this channel's link was taken over by {operation}()", operation)
        self._fused = _Driven(
            self._frames, self._tx, self._rx
        )  # which asks at the gate; a native link's own verbs do not
        for verb in _FUSED:
            self.__dict__.pop(verb, None)
        self._forget()
        self._yielded = True
        return self._link

    def fileno(self) -> int:
        """A descriptor that becomes readable when a message may have come. Raises Unsupported where there is none.

        Several may have come at once: when it is readable, `recv(0)` until it raises Timeout, and only then wait for it again.
        """
        if self.closed:
            raise errors.Closed("this endpoint is closed", url=self.url, operation="fileno")
        if not isinstance(self._link, Pollable):
            raise errors.Unsupported(
                "this transport has no one descriptor to wait for", url=self.url, operation="fileno"
            )
        return self._link.fileno()

    def _close(self) -> None:
        super()._close()
        if isinstance(self._link, Fused) and not self._yielded:  # its own calls wait inside it, not at our gate
            self._link.close()


class Channel(_BaseChannel[T]):
    """One end of a duplex channel, for threads.

    One thread may send while another receives; more are serialised. Every `timeout` is in seconds: None waits, 0 tries.

    All verbs raise: Closed (we closed it), PeerClosed, PeerDied, Timeout, ProtocolError, ForkedError.
    """

    def __init__(self, link: Link, url: Url, codec: Codec[T], capabilities: Capabilities) -> None:
        super().__init__(link, url, codec, capabilities)
        if codec is RAW:
            for verb in _FUSED:
                self.__dict__[verb] = getattr(self._fused, verb)

    def send(self, value: T, timeout: float | None = None, priority: int = 0) -> None:
        """Send one message, whole.

        Returns when it has left this process (on a broker: when the broker has it). `priority`: higher first, on transports
        that have priorities.

        Raises: MessageTooLarge; OutcomeUnknown when the time was up with part of the message sent.
        """
        self._fused.send(self._encode(value), timeout, priority)

    def recv(self, timeout: float | None = None) -> T:
        """The next message. Raises SchemaError or CodecError for one that is not what was declared; it is consumed."""
        frames = self._take_undecoded(1)
        return self._decode(frames[0] if frames else self._fused.recv(timeout))

    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int:
        """The next message's bytes into `buffer`; returns their number. Raises MessageTooLarge, and keeps the message."""
        count = self._undecoded_into(buffer)
        return self._fused.recv_into(buffer, timeout) if count is None else count

    def send_many(self, values: Sequence[T], timeout: float | None = None) -> int:
        """Send them all, batched. Returns how many were sent, which is fewer only when the time was up."""
        return self._fused.send_many([self._encode(value) for value in values], timeout)

    def recv_many(self, limit: int, timeout: float | None = None) -> list[T]:
        """Wait for one message, then take what is there, `limit` at most.

        Where one of them is not what was declared, the messages before it are returned, and the next call raises its error.
        """
        return self._decoded(self._take_undecoded(limit) or self._fused.recv_many(limit, timeout))

    def loan(self, size: int, timeout: float | None = None) -> AbstractContextManager[memoryview]:
        """`with channel.loan(n) as view:` writes a message of `size` bytes in place; the end of the block sends it."""
        return run(self._frames.loan(size), self._tx, timeout)

    def borrow(self, timeout: float | None = None) -> AbstractContextManager[memoryview]:
        """`with channel.borrow() as view:` reads the next message in place; the end of the block gives the memory back."""
        return run(self._frames.borrow(), self._rx, timeout)

    def close(self) -> None:
        """Immediate and idempotent. Messages sent before are still delivered; waiters here wake with `Closed`."""
        self._close()

    def __iter__(self) -> Iterator[T]:
        """Messages until the peer closes. Raises PeerDied if it died: the sequence is not complete then."""
        try:
            while True:
                yield self.recv()
        except errors.PeerClosed:
            return

    def __enter__(self) -> Channel[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncChannel(_BaseChannel[T]):
    """One end of a duplex channel, for tasks. The verbs of `Channel`, awaited; cancelling one loses no message."""

    async def send(self, value: T, timeout: float | None = None, priority: int = 0) -> None:
        await arun(self._frames.send(self._encode(value), priority), self._tx, timeout)

    async def recv(self, timeout: float | None = None) -> T:
        frames = self._take_undecoded(1)
        return self._decode(frames[0] if frames else await arun(self._frames.recv(), self._rx, timeout))

    async def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int:
        count = self._undecoded_into(buffer)
        return await arun(self._frames.recv_into(buffer), self._rx, timeout) if count is None else count

    async def send_many(self, values: Sequence[T], timeout: float | None = None) -> int:
        return await arun(self._frames.send_many([self._encode(value) for value in values]), self._tx, timeout)

    async def recv_many(self, limit: int, timeout: float | None = None) -> list[T]:
        frames = self._take_undecoded(limit)
        return self._decoded(frames or await arun(self._frames.recv_many(limit), self._rx, timeout))

    @asynccontextmanager
    async def loan(self, size: int, timeout: float | None = None) -> AsyncIterator[memoryview]:
        with await arun(self._frames.loan(size), self._tx, timeout) as view:
            yield view

    @asynccontextmanager
    async def borrow(self, timeout: float | None = None) -> AsyncIterator[memoryview]:
        with await arun(self._frames.borrow(), self._rx, timeout) as view:
            yield view

    async def close(self) -> None:
        self._close()

    async def __aiter__(self) -> AsyncIterator[T]:
        try:
            while True:
                yield await self.recv()
        except errors.PeerClosed:
            return

    async def __aenter__(self) -> AsyncChannel[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# -- listeners ----------------------------------------------------------------------------------------------------


def _accept(listener: LinkListener) -> Steps[Link]:
    while (link := listener.try_accept()) is None:
        wait = listener.arm(Want.RECV)
        if (link := listener.try_accept()) is not None:
            break
        yield wait
    return link


class _BaseListener(Endpoint, Generic[T]):
    def __init__(self, listener: LinkListener, codec: Codec[T], capabilities: Capabilities) -> None:
        super().__init__(listener, listener.url, capabilities)
        self._listener = listener
        self._codec = codec
        self._lane = Lane(self._gate, "accept", passing=True)


class Listener(_BaseListener[T]):
    """A name that peers connect to, for threads."""

    def accept(self, timeout: float | None = None) -> Channel[T]:
        """The next peer. A peer that fails its handshake is dropped and logged, and costs nobody else anything."""
        link = run(_accept(self._listener), self._lane, timeout)
        return Channel(link, self.url, self._codec, self.capabilities)

    def close(self) -> None:
        """Stop listening and remove the name. Accepted channels live on."""
        self._close()

    def __iter__(self) -> Iterator[Channel[T]]:
        """Peers until `close()`."""
        try:
            while True:
                yield self.accept()
        except errors.Closed:
            return

    def __enter__(self) -> Listener[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncListener(_BaseListener[T]):
    """A name that peers connect to, for tasks."""

    async def accept(self, timeout: float | None = None) -> AsyncChannel[T]:
        link = await arun(_accept(self._listener), self._lane, timeout)
        return AsyncChannel(link, self.url, self._codec, self.capabilities)

    async def close(self) -> None:
        self._close()

    async def __aiter__(self) -> AsyncIterator[AsyncChannel[T]]:
        try:
            while True:
                yield await self.accept()
        except errors.Closed:
            return

    async def __aenter__(self) -> AsyncListener[T]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


# -- opening ---------------------------------------------------------------------------------------------------------


class _Opening(Opening):
    """An `Opening` for this pattern, and the options of the transport's links."""

    def __init__(
        self, url: str | Url, codec: str | Codec[Any] | None, type: Any, require: Collection[str], operation: str
    ) -> None:
        super().__init__(url, codec, type, require, "channel", operation)
        if operation == "listen" and not self.capabilities.listen:
            raise errors.Unsupported(
                "this transport has no names to listen at", url=self.url, operation=operation, hint="use pair()"
            )
        self._options = _options.read(self.transport.options, self.url)

    def listen(self) -> Steps[LinkListener]:
        return self.transport.listen(self.url, self._options)

    def connect(self) -> Steps[Link]:
        return self.transport.connect(self.url, self._options)

    def pair(self) -> tuple[Link, Link]:
        return self.transport.pair(self.url, self._options)


@overload
def listen(url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()) -> Listener[bytes]: ...
@overload
def listen(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Listener[T]: ...
@overload
def listen(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> Listener[Any]: ...
def listen(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Listener[Any]:
    """Take a name that peers can connect to.

    Args:
        url: where; `Listener.url` says where it really is (the port that the system chose for port 0).
        timeout: seconds for what may take time (a broker); None waits.
        codec: "bytes" (default), "msgpack", "json", or a Codec.
        type: what messages are; validated on arrival.
        require: capabilities that the transport must have, such as {"zero_copy"}.

    Raises: BadUrl, UnknownScheme, BadOption, MissingDependency, Unsupported, AddressInUse, AccessDenied, Timeout.
    """
    opening = _Opening(url, codec, type, require, "listen")
    return Listener(opening.run(opening.listen(), timeout), opening.codec, opening.capabilities)


@overload
def connect(url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()) -> Channel[bytes]: ...
@overload
def connect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> Channel[T]: ...
@overload
def connect(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> Channel[Any]: ...
def connect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> Channel[Any]:
    """Reach a listener, waiting until there is one.

    `timeout`: seconds to wait for it; None waits for ever. The other arguments are those of `listen`.

    Raises: NothingListening when the time was up and there was none; otherwise as `listen`.
    """
    opening = _Opening(url, codec, type, require, "connect")
    return Channel(opening.run(opening.connect(), timeout), opening.url, opening.codec, opening.capabilities)


@overload
def pair(url: str | Url, *, require: Collection[str] = ()) -> tuple[Channel[bytes], Channel[bytes]]: ...
@overload
def pair(
    url: str | Url, *, codec: str | Codec[Any] | None = None, type: type[T], require: Collection[str] = ()
) -> tuple[Channel[T], Channel[T]]: ...
@overload
def pair(
    url: str | Url, *, codec: str | Codec[Any], require: Collection[str] = ()
) -> tuple[Channel[Any], Channel[Any]]: ...
def pair(
    url: str | Url, *, codec: str | Codec[Any] | None = None, type: Any = None, require: Collection[str] = ()
) -> tuple[Channel[Any], Channel[Any]]:
    """Two connected ends, where the transport makes them (`pipe://`, `unix://`, `inproc://`, `shm://`). Arguments as `listen`."""
    opening = _Opening(url, codec, type, require, "pair")
    left, right = opening.pair()
    return (
        Channel(left, opening.url, opening.codec, opening.capabilities),
        Channel(right, opening.url, opening.codec, opening.capabilities),
    )


@overload
async def alisten(
    url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()
) -> AsyncListener[bytes]: ...
@overload
async def alisten(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> AsyncListener[T]: ...
@overload
async def alisten(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> AsyncListener[Any]: ...
async def alisten(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> AsyncListener[Any]:
    """`listen`, awaited."""
    opening = _Opening(url, codec, type, require, "listen")
    return AsyncListener(await opening.arun(opening.listen(), timeout), opening.codec, opening.capabilities)


@overload
async def aconnect(
    url: str | Url, *, timeout: float | None = None, require: Collection[str] = ()
) -> AsyncChannel[bytes]: ...
@overload
async def aconnect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> AsyncChannel[T]: ...
@overload
async def aconnect(
    url: str | Url, *, timeout: float | None = None, codec: str | Codec[Any], require: Collection[str] = ()
) -> AsyncChannel[Any]: ...
async def aconnect(
    url: str | Url,
    *,
    timeout: float | None = None,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> AsyncChannel[Any]:
    """`connect`, awaited."""
    opening = _Opening(url, codec, type, require, "connect")
    link = await opening.arun(opening.connect(), timeout)
    return AsyncChannel(link, opening.url, opening.codec, opening.capabilities)


@overload
async def apair(
    url: str | Url, *, require: Collection[str] = ()
) -> tuple[AsyncChannel[bytes], AsyncChannel[bytes]]: ...
@overload
async def apair(
    url: str | Url,
    *,
    codec: str | Codec[Any] | None = None,
    type: type[T],
    require: Collection[str] = (),
) -> tuple[AsyncChannel[T], AsyncChannel[T]]: ...
@overload
async def apair(
    url: str | Url, *, codec: str | Codec[Any], require: Collection[str] = ()
) -> tuple[AsyncChannel[Any], AsyncChannel[Any]]: ...
async def apair(
    url: str | Url,
    *,
    codec: str | Codec[Any] | None = None,
    type: Any = None,
    require: Collection[str] = (),
) -> tuple[AsyncChannel[Any], AsyncChannel[Any]]:
    """`pair`, awaited."""
    opening = _Opening(url, codec, type, require, "pair")
    left, right = opening.pair()
    return (
        AsyncChannel(left, opening.url, opening.codec, opening.capabilities),
        AsyncChannel(right, opening.url, opening.codec, opening.capabilities),
    )
