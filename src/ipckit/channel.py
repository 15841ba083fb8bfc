"""Channel: whole messages, in order, between two parties.

    with ipckit.listen("unix://calc") as listener, listener.accept() as channel: ...
    with ipckit.connect("unix://calc", timeout=5) as channel: ...

Two shells over one core. `Frames` (`_frames.py`) is the logic, written once as steps over a Link. `Channel` runs the steps on
the caller's thread, `AsyncChannel` on the running loop; they hold nothing but one line per verb. Where the link is
`Fused` (native), the synchronous verbs are its own methods, bound in place of ours. How channels come to be: `opening.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from . import errors
from ._capabilities import Capabilities
from ._endpoint import Endpoint
from ._frames import Driven, Frames, fill
from ._spi import Fused, Giving, Link, Peer, Pollable
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


_FUSED = ("send", "recv", "recv_into", "send_many", "recv_many")  # what a Channel of bytes binds


class _BaseChannel(Endpoint, Generic[T]):
    _yielded = False

    def __init__(self, link: Link, url: Url, codec: Codec[T], capabilities: Capabilities) -> None:
        super().__init__(link, url, capabilities)
        self._link = link
        self._frames = Frames(link, url)
        self._encode = codec.encode
        self._decode = codec.decode
        self.codec = codec
        self._undecoded = deque[bytes]()  # received by recv_many, behind one that could not be decoded
        self._tx = Lane(self._gate, "send")
        self._rx = Lane(self._gate, "recv")
        self._fused: Fused = link if isinstance(link, Fused) else Driven(self._frames, self._tx, self._rx)

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
            return fill(buffer, frames[0], self.url)
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
        self._fused = Driven(
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
