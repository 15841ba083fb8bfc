"""One peer of a `Hub`: its inbox, its windows, its end.

What is under way is bounded here and not by zmq's high-water marks. Those would bound it as well, but a full pipe takes no
goodbye, cannot be waited for peer by peer, and on a Unix socket libzmq drops what the kernel still holds when the sender closes
while the receiver's pipe is full. So each side says how much it takes (`rcvhwm` frames, `window` bytes), the other stops
there, and consuming half of it sends a credit back.
"""

from __future__ import annotations

import errno
import struct
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import zmq

from .. import errors
from .._spi import Buffer, Peer, Steps, Wait, Want
from .._url import Url
from .._wait import Gate, Lane, no_timeout, run
from ._zmq_context import Sleeper, map_zmq
from ._zmq_hub import ACK, BYE, DATA, GREETING, REFUSED, VERSION, WELCOME, Hub

if TYPE_CHECKING:
    from .zmq import Options

#: What a connecting side may send before it is welcomed, frames and bytes: it cannot know the window yet.
FIRST = (16, 1 << 20)
_CREDIT = struct.Struct(">QQ")  # frames and bytes consumed since the beginning


class ZmqLink:
    """`Link` and `Fused`."""

    def __init__(self, hub: Hub, ident: bytes, url: Url, options: Options, peer: Peer) -> None:
        self.ident = ident
        self.fd = -1  # libzmq's, for what its monitor says
        self.inbox: deque[bytes] = deque()
        self.ended: tuple[type[errors.IpcError], str] | None = None  # what comes after the inbox
        self.welcomed = self.accepted = False
        self.data, self.room = Sleeper(), Sleeper()  # where our receiver and our sender sleep
        self.peer = peer
        self._hub, self._url = hub, url
        self._closed = False
        self._gate = Gate(url, self._woken)  # for those who sleep in our own blocking calls
        self._tx, self._rx = Lane(self._gate, "send"), Lane(self._gate, "recv")
        self._quiet = True  # nothing was received since we sent
        self._limit = self._send_limit = options.limit
        self._cap, self._takes = options.sndhwm, (options.rcvhwm, options.window)
        # What we may send until the next credit, and what we have received when it is time to give one; frames and bytes.
        self._window = (min(FIRST[0], self._cap), FIRST[1])
        self._half = (max(options.rcvhwm // 2, 1), max(options.window // 2, 1))
        self._send_until, self._send_until_bytes = self._window
        self._tell_at, self._tell_at_bytes = self._half
        self._sent, self._sent_bytes, self._acked, self._acked_bytes = 0, 0, 0, 0
        self._taken, self._taken_bytes, self._told, self._told_bytes, self._waiting_bytes = 0, 0, 0, 0, 0

    @property
    def native(self) -> Any:
        """The zmq.Socket, a ROUTER. Look, do not send: it is not thread-safe, and we count."""
        return self._hub.socket

    # what the hub tells us, with its lock held

    def greeting(self) -> bytes:
        return GREETING.pack(VERSION, *self._takes, self._cap, self._limit)

    def greeted(self, body: bytes) -> None:
        """The other side's numbers, from its HELLO or WELCOME."""
        _, frames, size, cap, limit = GREETING.unpack(body)
        self._window = (max(min(frames, self._cap), 1), max(size, 1))
        self._half = (max(min(self._takes[0], cap) // 2, 1), self._half[1])
        self._tell_at = min(self._tell_at, self._told + self._half[0])
        self._open_window()
        self._send_limit = min(self._limit, limit)
        self.welcomed = True

    def deliver(self, frame: bytes) -> None:
        if self.ended:
            return
        frames, size = self._takes
        if len(frame) > self._limit:
            self.end(errors.ProtocolError, f"a message of {len(frame)} bytes, above the limit of {self._limit}")
        elif self._taken + len(self.inbox) - self._told >= max(
            frames, FIRST[0]
        ) or self._taken_bytes + self._waiting_bytes - self._told_bytes >= max(size, FIRST[1]):
            self.end(errors.ProtocolError, "the peer sends more than it was told that we take")
        else:
            self.inbox.append(frame)
            self._waiting_bytes += len(frame)
            self.data.ring()

    def control(self, kind: bytes, body: bytes) -> bool:
        """False: the peer may not send this."""
        if kind == ACK and len(body) == _CREDIT.size:
            frames, size = _CREDIT.unpack(body)
            if not (self._acked <= frames <= self._sent and self._acked_bytes <= size <= self._sent_bytes):
                return False
            self._acked, self._acked_bytes = frames, size
            self._open_window()
            self.room.ring()
        elif kind == BYE:
            self.end(errors.PeerClosed, "the peer closed")
        elif kind == REFUSED:
            self.end(errors.ProtocolError, "the peer refuses us: " + body[:200].decode("utf-8", "replace"))
        elif kind == WELCOME and not self.welcomed and len(body) == GREETING.size and body[0] == VERSION:
            self.greeted(body)
            self.data.ring()
            self.room.ring()
        else:
            return False
        return True

    def _open_window(self) -> None:
        if self.ended or self._closed:
            return
        self._send_until, self._send_until_bytes = self._acked + self._window[0], self._acked_bytes + self._window[1]

    def lose(self) -> None:
        """The connection has ended, and all that it brought is in the inbox."""
        self.end(errors.PeerDied, "the connection ended without a goodbye")

    def end(self, kind: type[errors.IpcError], why: str) -> None:
        if not self.ended:
            self.ended = (kind, why)
            self._send_until = 0  # the one thing that a sender looks at
            self._hub.forget(self)
            self.data.ring()
            self.room.ring()

    # Link

    def try_send(self, frame: Buffer) -> bool:
        hub = self._hub
        size = len(frame) if type(frame) is bytes else memoryview(frame).nbytes
        if size > self._send_limit:
            raise self._too_large(size)
        hub.lock.acquire(False) or hub.enter()
        try:
            if self._sent >= self._send_until or self._sent_bytes >= self._send_until_bytes:
                return self._out_of_credit()
            # libzmq goes on taking frames for a listener that is gone, so look; a ROUTER's own peers it reports.
            if self._quiet and hub.dials and hub.changed():
                hub.drain()
                if self.ended:
                    self._raise("send")
            try:
                any(map(hub.send, (self.ident, frame), DATA))
            except zmq.ZMQError as error:
                self._failed(error)
            self._sent += 1
            self._sent_bytes += size
            self._quiet = True
            if hub.watched:
                hub.recheck()
            return True
        finally:
            hub.lock.release()

    def _out_of_credit(self) -> bool:
        if self._hub.foreign or self._closed:
            self._refuse("send")
        if not self.ended:
            self._hub.drain()
        if self.ended:
            self._raise("send")
        return False

    def _failed(self, error: zmq.ZMQError) -> NoReturn:
        if error.errno != errno.EHOSTUNREACH:
            raise map_zmq(error, self._url, "send") from error
        self._hub.drain()  # it may have said goodbye
        self.lose()
        self._raise("send")

    def try_flush(self) -> bool:
        """Always: libzmq's thread sends what it was given, whether we help or not."""
        return True

    def try_recv(self) -> bytes | None:
        if self._hub.foreign or self._closed:
            self._refuse("recv")
        if not self.inbox:
            if not self.ended:
                with self._hub.entered():
                    if not self._hub.closed:
                        self._hub.drain(self)
            if not self.inbox:
                if self.ended:
                    self._raise("recv")
                return None
        frame = self.inbox.popleft()
        self._waiting_bytes -= len(frame)
        self._taken += 1
        self._taken_bytes += len(frame)
        self._quiet = False
        if self._taken >= self._tell_at or self._taken_bytes >= self._tell_at_bytes:
            self._tell()
        return frame

    def _tell(self) -> None:
        """Give credit."""
        with self._hub.entered():
            self._told, self._told_bytes = self._taken, self._taken_bytes
            self._tell_at, self._tell_at_bytes = self._told + self._half[0], self._told_bytes + self._half[1]
            if not self.ended and not self._hub.closed:
                self._hub.post(self.ident, ACK, _CREDIT.pack(self._taken, self._taken_bytes))

    def arm(self, want: Want) -> Wait:
        if self._hub.foreign or self._closed:
            self._refuse("arm")
        with self._hub.entered():
            fds: tuple[tuple[int, int], ...] = ()
            for sleeper, bit in ((self.data, Want.RECV), (self.room, Want.SEND)):
                if want & bit:
                    fds += sleeper.announce(self._hub)
            return Wait(fds)

    def close(self) -> None:
        hub = self._hub
        if hub.foreign:
            return
        with hub.entered():
            closing, self._closed, self._send_until = not self._closed, True, 0
            if closing and not hub.closed:
                if not self.ended:
                    hub.post(self.ident, BYE)
                    if not hub.dials:  # a hub that dials has to know at its close that there is somebody to wait for
                        hub.forget(self)
                hub.detach(self)
        hub.finish()
        self._gate.close()

    def _woken(self) -> None:
        with self._hub.entered():
            self.data.close()
            self.room.close()

    def abandon(self) -> None:
        """For the hub, which has a hook of its own."""
        self._send_until = 0

    # Fused

    def send(self, frame: Buffer, timeout: float | None = None, priority: int = 0) -> None:
        if priority:
            raise errors.Unsupported("zmq has no priorities", url=self._url, operation="send")
        if timeout is not None and not timeout >= 0:
            raise no_timeout()
        if not self.try_send(frame):
            run(self._sending(frame), self._tx, timeout)

    def _sending(self, frame: Buffer) -> Steps[None]:
        while not self.try_send(frame):
            wait = self.arm(Want.SEND)
            if self.try_send(frame):
                return
            yield wait

    def recv(self, timeout: float | None = None) -> bytes:
        if timeout is not None and not timeout >= 0:
            raise no_timeout()
        hub = self._hub
        if hub.direct is self and timeout != 0 and hub.lock.acquire(False):
            started = timeout and time.monotonic()
            try:
                frame = hub.block(self, timeout)
            finally:
                hub.lock.release()
            if frame is not None:
                self._taken += 1
                self._taken_bytes += len(frame)
                self._quiet = False
                if self._taken >= self._tell_at or self._taken_bytes >= self._tell_at_bytes:
                    self._tell()
                return frame
            if timeout is not None and started is not None:
                left = timeout - (time.monotonic() - started)
                if left <= 0:
                    if (frame := self.try_recv()) is not None:
                        return frame
                    raise errors.Timeout(f"nothing happened within {timeout:g} s", url=self._url, operation="recv")
                timeout = left
        return run(self._receiving(), self._rx, timeout)

    def _receiving(self) -> Steps[bytes]:
        while (frame := self.try_recv()) is None:
            wait = self.arm(Want.RECV)
            if (frame := self.try_recv()) is not None:
                break
            yield wait
        return frame

    def recv_into(self, buffer: bytearray | memoryview, timeout: float | None = None) -> int:
        view = memoryview(buffer).cast("B")
        if view.readonly:  # found out later, it would cost the message
            raise BufferError("the buffer is read-only")
        frame = self.recv(timeout)
        if len(frame) > len(view):
            self._taken -= 1
            self._taken_bytes -= len(frame)
            self._waiting_bytes += len(frame)
            self.inbox.appendleft(frame)
            raise errors.MessageTooLarge(
                f"the message has {len(frame)} bytes, the buffer {len(view)}",
                url=self._url,
                operation="recv_into",
                hint="it was kept: recv() returns it",
            )
        view[: len(frame)] = frame
        return len(frame)

    def send_many(self, frames: Sequence[Buffer], timeout: float | None = None) -> int:
        if timeout is not None and not timeout >= 0:
            raise no_timeout()
        if (size := max((memoryview(frame).nbytes for frame in frames), default=0)) > self._send_limit:
            raise self._too_large(size)  # and nothing is sent
        deadline = None if timeout is None else time.monotonic() + timeout
        done = 0
        try:
            for frame in frames:
                if not self.try_send(frame):
                    left = None if deadline is None else max(deadline - time.monotonic(), 0)
                    run(self._sending(frame), self._tx, left)
                done += 1
        except errors.Timeout:
            if not done:
                raise
        return done

    def recv_many(self, limit: int, timeout: float | None = None) -> list[bytes]:
        if limit < 1:
            raise errors.BadOption(f"limit must be 1 or more, not {limit}", url=self._url, operation="recv_many")
        frames = [self.recv(timeout)]
        try:
            while len(frames) < limit and (frame := self.try_recv()) is not None:
                frames.append(frame)
        except errors.IpcError:
            pass  # it is raised again by the next call, after these frames were delivered
        return frames

    def counters(self) -> tuple[int, int, int, int]:
        return self._sent, self._sent_bytes, self._taken, self._taken_bytes

    # why not

    def _too_large(self, size: int) -> errors.MessageTooLarge:
        return errors.MessageTooLarge(
            f"{size} bytes are above the limit of {self._send_limit}",
            url=self._url,
            operation="send",
            hint="raise limit= at both ends",
        )

    def _refuse(self, operation: str) -> NoReturn:
        self._gate.refuse_foreign(operation)
        raise errors.Closed("this endpoint is closed", url=self._url, operation=operation)

    def _raise(self, operation: str) -> NoReturn:
        assert self.ended
        kind, why = self.ended
        if kind is errors.PeerDied:
            raise errors.PeerDied(why, url=self._url, operation=operation, pid=self.peer.pid)
        raise kind(why, url=self._url, operation=operation)
