"""One stream of frames: what callers see of it, and the two coroutines that move them.

Callers put frames into `_outbox` and take them from `_inbox`, on any thread; on the loop, `carry` empties the one
and fills the other, for a client's call and for a server's context alike. Each holds `buffer` bytes at most; beyond that
stand gRPC's own windows, and then the sender waits.

A frame travels as a `google.protobuf.BytesValue`: the tag 0x0A, the length as a varint, the bytes; an empty
frame is an empty message.
"""

from __future__ import annotations

import asyncio
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import grpc
import grpc.aio

from .. import errors
from .._spi import Buffer, Peer, Wait, Want
from .._url import Url
from ._bell import Bell
from ._grpc_home import IoThread, leaving, park

if TYPE_CHECKING:
    from .grpc import Options

Read: TypeAlias = Callable[[], Awaitable[Any]]
Write: TypeAlias = Callable[[bytes], Awaitable[None]]
HalfClose: TypeAlias = Callable[[], Awaitable[None]]

_PARKED = object()
_TAG = 0x0A
_EACH = 64  # what one costs besides its bytes, so that empty ones fill a buffer as well

_DOUBT = 0.05  # seconds

_Code = grpc.StatusCode
_PROTOCOL = (_Code.RESOURCE_EXHAUSTED, _Code.INVALID_ARGUMENT, _Code.OUT_OF_RANGE, _Code.UNIMPLEMENTED)
_DENIED = (_Code.UNAUTHENTICATED, _Code.PERMISSION_DENIED)


def wrap(frame: Buffer) -> bytes:
    size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
    if not size:
        return b""
    head = bytearray((_TAG,))
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return b"".join((head, frame))


def unwrap(message: bytes) -> bytes:
    """Raises ValueError: it is something else."""
    if not message:
        return b""
    if message[0] != _TAG:
        raise ValueError("no BytesValue")
    size, at, byte = 0, 1, 0x80
    for shift in range(0, 35, 7):
        if at >= len(message) or byte < 0x80:
            break
        byte = message[at]
        at += 1
        size |= (byte & 0x7F) << shift
    if byte >= 0x80 or len(message) - at != size:
        raise ValueError("a BytesValue of another length than it says")
    return message[at:]


def map_grpc(error: BaseException, url: object, operation: str) -> errors.IpcError:
    """What this means in our words. Raise it `from` the error."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return errors.PeerDied(f"the stream broke: {error}", url=url, operation=operation)
    code, text = error.code(), error.details() or error.code().name
    if code in _PROTOCOL:
        return errors.ProtocolError(text, url=url, operation=operation)
    if code in _DENIED:
        return errors.AccessDenied(text, url=url, operation=operation)
    return errors.PeerDied(text, url=url, operation=operation)


@types.coroutine
def _park() -> Generator[Any, None, None]:
    """In a coroutine of a `Runner`: until somebody calls `wake`."""
    yield _PARKED


class Runner:
    """Drives a coroutine without a task, on the running loop. `done` has its end.

    For two reasons. It takes its first step, and the step after a `wake`, at once: a frame is on its way when `try_send`
    returns, and not one turn of the loop later. And asyncio.run() does not find it, to cancel it, when main() has
    returned: grpc.aio cuts the stream when a task is cancelled that reads or writes, before the last words are said.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._coroutine = coroutine
        self._parked = False
        self.done: asyncio.Future[None] = self._loop.create_future()
        self._step()

    def wake(self) -> None:
        if self._parked:
            self._parked = False
            self._step()

    def stop(self) -> None:
        if not self.done.done():
            self.done.cancel()
            self._coroutine.close()

    def _step(self, waited: asyncio.Future[Any] | None = None) -> None:
        if self.done.done():
            if waited is not None and not waited.cancelled():
                waited.exception()  # nobody wants it any more
            return
        try:
            wanted = self._coroutine.send(None)
        except StopIteration:
            self.done.set_result(None)
        except BaseException as error:
            self.done.set_exception(error)
            if not isinstance(error, Exception | asyncio.CancelledError):
                raise
        else:
            if wanted is _PARKED:
                self._parked = True
            elif wanted is None:
                self._loop.call_soon(self._step)
            else:
                wanted._asyncio_future_blocking = False
                wanted.add_done_callback(self._step)


class GrpcLink:
    """`Link`."""

    def __init__(self, home: IoThread, url: Url, path: Path | None, options: Options, peer: Peer, native: Any) -> None:
        self.peer = peer
        self.native = native
        self.limit = options.limit  # of what we send: ours, and the peer's once it is known
        self.closed = False
        self.dead = False  # the peer has gone without a goodbye, so there is nobody to say one to
        self._home, self._url, self._path = home, url, path
        self._buffer, self._takes, self._linger = options.buffer, options.limit, options.linger
        self._inbox = deque[bytes]()
        self._outbox = deque[bytes]()
        # Bytes, each counted by one side only: put into the outbox, taken from it, come into the inbox, received.
        self._put = self._written = self._come = self._received = 0
        self._end: errors.IpcError | None = None  # what comes after the inbox
        self._data, self._room = Bell(), Bell()
        self._reader: Runner | None = None
        self._writer: Runner | None = None
        self._pushed = False  # the writer will look
        self._full = False  # the reader waits for space

    # on any thread

    def try_send(self, frame: Buffer) -> bool:
        self._check("send")
        size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
        if size > self.limit:
            raise errors.MessageTooLarge(
                f"{size} bytes are above the limit of {self.limit}",
                url=self._url,
                operation="send",
                hint="raise limit= at both ends",
            )
        if self._outbox and self._put - self._written + size > self._buffer:
            return False
        if self._end is not None:
            self._raise("send")
        message = wrap(frame)
        self._put += len(message) + _EACH
        self._outbox.append(message)
        if not self._pushed:  # one call for all that come before it is made
            self._pushed = True
            self._home.do(self._push)
        return True

    def try_flush(self) -> bool:
        if not self._outbox:
            return True
        self._check("send")
        if self._end is not None:
            self._raise("send")
        return False

    def try_recv(self) -> bytes | None:
        if not self._inbox:
            self._check("recv")
            over = self._end is not None  # asked first: where it is set, all the frames that will ever come are there
            if not self._inbox:
                if over:
                    self._raise("recv")
                return None
        elif self.closed:
            self._check("recv")
        frame = self._inbox.popleft()
        self._received += len(frame) + _EACH
        if self._full and (self._come - self._received) * 2 <= self._buffer:
            self._home.do(self._pull)
        return frame

    def arm(self, want: Want) -> Wait:
        bells = [self._data] * bool(want & Want.RECV) + [self._room] * bool(want & Want.SEND)
        return Wait(tuple(bell.announce() for bell in bells))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._home.do(self._let_go)

    def _let_go(self) -> None:
        if self._end is None:
            leaving.add(self)
        self._data.close()  # here, where they are rung
        self._room.close()
        self._push()
        self._pull()

    def _push(self) -> None:
        self._pushed = False
        if self._writer is not None:
            self._writer.wake()

    def _pull(self) -> None:
        if self._reader is not None:
            self._reader.wake()

    def abandon(self) -> None:
        park(self._url, self._path)

    def _check(self, operation: str) -> None:
        if self.closed:
            raise errors.Closed("this endpoint is closed", url=self._url, operation=operation)

    def _raise(self, operation: str) -> NoReturn:
        end = self._end
        assert end is not None
        raise type(end)(end.message, url=self._url, operation=operation, hint=end.hint) from end.__cause__

    # on the loop

    async def _write_all(self, write: Write) -> None:
        """Until we are closed, and everything is written."""
        while True:
            while self._outbox:
                # Taken out before it is written: what the library has is no longer here to be waited for.
                message = self._outbox.popleft()
                self._written += len(message) + _EACH
                self._room.ring()
                await write(message)
            if self.closed:
                return
            await _park()

    async def _read_all(self, read: Read) -> None:
        """Until the peer has said its last word. Raises ValueError for a message that is no frame."""
        while (message := await read()) is not grpc.aio.EOF:
            frame = unwrap(message)
            if len(frame) > self._takes:
                raise ValueError(f"{len(frame)} bytes are above the limit of {self._takes}")
            if self.closed:
                continue
            self._come += len(frame) + _EACH
            self._inbox.append(frame)
            self._data.ring()
            while self._come - self._received > self._buffer and not self.closed:
                self._full = True  # and look once more: the caller takes first, and looks at this afterwards
                if self._come - self._received > self._buffer:
                    await _park()
                self._full = False

    def peer_takes(self, metadata: Any) -> None:
        for key, value in metadata:
            if key == "ipckit-limit" and str(value).isdecimal():
                self.limit = min(self.limit, int(value))

    async def carry(self, read: Read, write: Write, half_close: HalfClose | None) -> str | None:
        """Move frames until one side has ended. Returns what the peer did wrong, if that was the end.

        `half_close`: how a client says goodbye; then it waits for the server's. A server says it by returning.
        """
        self._reader, self._writer = Runner(self._read_all(read)), Runner(self._write_all(write))
        reader, writer = self._reader.done, self._writer.done
        try:
            try:
                await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
                if half_close is None and reader.done() and not self.closed:
                    # A client that was killed ends its messages as one that closes does, and a moment later we are cancelled.
                    await asyncio.sleep(_DOUBT)
            except asyncio.CancelledError:
                if not self.closed:  # the peer is gone (a server's handler), or the loop ends under us
                    raise
                # The loop ends, as after asyncio.run(main()): it waits for this task, so say what there is to say.
                await asyncio.wait({reader, writer}, timeout=self._linger, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not reader.done():
                if writer.exception() is not None:
                    await asyncio.wait({reader}, timeout=1)  # which knows better why
                elif half_close is not None:
                    await half_close()
                    await asyncio.wait({reader}, timeout=self._linger)
            return self._judge(reader if reader.done() else writer)
        finally:
            self._reader.stop()
            self._writer.stop()
            for end in (reader, writer):
                if not end.cancelled():
                    end.exception()  # it was looked at
            self._over(errors.PeerDied("the stream was cut", url=self._url))
            leaving.discard(self)

    def _judge(self, end: asyncio.Future[None]) -> str | None:
        if not end.done() or end.cancelled():
            return None
        error = end.exception()
        if error is None:
            if end is not (self._writer and self._writer.done):
                self._over(errors.PeerClosed("the peer closed", url=self._url))
        elif isinstance(error, ValueError):
            self._over(errors.ProtocolError(str(error), url=self._url))
            return str(error)
        else:
            self._over(map_grpc(error, self._url, "recv"), error)
            self.dead = isinstance(self._end, errors.PeerDied)
        return None

    def _over(self, error: errors.IpcError, cause: BaseException | None = None) -> None:
        if self._end is None:
            error.__cause__ = cause
            self._end = error
            self._outbox.clear()
            self._data.ring()
            self._room.ring()
