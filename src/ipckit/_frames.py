"""The verbs of a Channel as steps over one link: try, arm, try again, wait. No thread, no loop, no codec.

`Frames` is the logic, written once, for every link. `Driven` runs its steps on the caller's thread with the methods of
`Fused`, so that a synchronous Channel has one way to call a native link and any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from . import errors
from ._spi import Buffer, Claiming, Link, Prioritised, Spinning, Steps, Want
from ._url import Url
from ._wait import Lane, run


class Frames:
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
            return fill(buffer, frame, self.url)
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


def fill(buffer: bytearray | memoryview, frame: bytes, url: Url) -> int:
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


class Driven:
    """`Fused`, for a link that is not: the steps, run on the caller's thread."""

    __slots__ = ("_frames", "_rx", "_tx")

    def __init__(self, frames: Frames, tx: Lane, rx: Lane) -> None:
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
