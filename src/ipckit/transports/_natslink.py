"""Mailboxes on subjects, and the Link over two of them.

`Inbox`, `Outbox` and `Watch` carry the handshake of `_rendezvous`; then `NatsLink` goes on with the same three. It is a Link of
its own, not `_mail.MailLink`, for three reasons: messages that are sent together travel in one payload (the client's
work per payload is most of the cost), a loss has to be noticed, and credit is given and used on the client's loop, where
neither thread of the caller has to wake up for it.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from .. import errors
from .._spi import Buffer, Peer, Wait, Want
from .._url import Url
from . import _natswire as wire
from ._bridge import Bell
from ._mail import Card
from ._natsclient import Connection

_FLOOD = 1024  # greetings that wait for a listener; further ones are dropped, and their senders try again
_PROBE_EVERY = 0.5  # seconds between two questions whether the peer is still there
_NO_WAIT = Wait(())
_ONE_TURN = Wait((), 0)


class Inbox:
    """A subject that we subscribe to. A rendezvous is written by many, so the numbers of its payloads say nothing."""

    def __init__(self, connection: Connection, subject: str, window: int | None) -> None:
        self.card: Card = {"subject": subject}
        if window is not None:
            self.card["window"] = window
        self.native = connection.client
        self.connection = connection
        self.payloads = deque[bytes]()  # that bring messages
        self.over: errors.IpcError | None = None  # nothing comes after the payloads, and why
        self.claimed: Callable[[str], None] | None = None  # somebody else claims the name too: its id
        self.withdrawn = False
        self.credited: Callable[[int], None] | None = None
        self._cut = connection.cut
        self._bell = Bell(connection.home)
        self._eager = connection.home.eager
        self._expected = 0
        # The sender stays below our window but for the last payload it may still send.
        self._room = -1 if window is None else window + wire.OVERHEAD + connection.client.max_payload
        self._came = self.consumed = 0
        self._subscription: Any = None
        connection.enter()
        connection.mailboxes.add(self)

    async def subscribe(self) -> None:
        deliver = self._deliver if self._room < 0 else self._deliver_numbered
        self._subscription = await self.connection.tap(str(self.card["subject"]), deliver)

    def withdraw(self) -> None:
        """On the loop: give the subject up."""
        self.withdrawn = True
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            self.connection.unsubscribe(subscription)

    def _deliver(self, message: Any) -> None:
        payload: bytes = message.data
        if len(payload) < wire.HEAD_SIZE:
            return
        kind = payload[0]
        if kind == wire.CLAIM and self.claimed is not None:
            self.claimed(wire.content(payload).decode("ascii", "replace"))
        elif kind == wire.MESSAGE and len(self.payloads) < _FLOOD:
            self.payloads.append(payload)
            self._bell.ring()

    def _deliver_numbered(self, message: Any) -> None:
        """On the loop, in the midst of the client's work: it must not raise."""
        if self.over is not None:
            return None
        payload: bytes = message.data
        try:
            kind, number = wire.read_head(payload)
        except Exception:
            return self._end(errors.ProtocolError(f"a payload of {len(payload)} bytes"))
        if number != self._expected:
            what = f"payload {number} came where {self._expected} was due: the NATS server has dropped messages"
            return self._end(errors.PeerError(what))
        if kind <= wire.COUNTED:
            self._expected += 1
            if kind == wire.BYE:
                return self._end(errors.PeerClosed("the peer closed"))
            self._came += len(payload)
            if self._came - self.consumed > self._room:
                return self._end(errors.ProtocolError("the peer sends more than it has credit for"))
            self.payloads.append(payload)
            self._bell.ring()
        elif kind == wire.CREDIT and self.credited is not None:
            try:
                self.credited(wire.read_u64(payload))
            except errors.ProtocolError as error:
                self._end(error)
        elif kind != wire.PROBE:
            self._end(errors.ProtocolError(f"a payload of unknown kind {kind}"))
        return None

    def _end(self, error: errors.IpcError) -> None:
        error.url = str(self.connection.url)
        self.over = error
        self.connection.ring()

    def why_not(self, operation: str) -> None:
        """Raise if nothing more will come."""
        if self.over is not None:
            raise self.over
        if self._room >= 0:
            self.connection.check(self._cut, operation)

    @property
    def whole(self) -> bool:
        return self.over is None and self.connection.cut == self._cut and not self.connection.home.broken

    def ring(self) -> None:
        self._bell.ring()

    def try_payload(self) -> bytes | None:
        if self._eager:
            self._bell.silence()
        if not self.payloads:
            self.connection.home.turn()
            if not self.payloads:
                return None
        return self.payloads.popleft()

    def try_get(self) -> bytes | None:
        payload = self.try_payload()
        if payload is None:
            self.why_not("open")
            return None
        self.consumed += len(payload)
        return wire.content(payload)

    def settled(self) -> bool:
        return True  # that nobody is there, the server says on the same connection, after all that was sent

    def arm(self) -> Wait:
        return self._bell.arm()

    def close(self) -> None:
        self.connection.home.do(self.withdraw)
        self.connection.mailboxes.discard(self)
        self.connection.leave()
        self._bell.close()

    def abandon(self) -> None:
        self.connection.abandon()
        self._bell.close()


class Outbox:
    """The peer's subject."""

    def __init__(self, connection: Connection, subject: str, max_frame: int, window: int) -> None:
        self.native = connection.client
        self.connection = connection
        self.subject = subject
        self.max_frame = max_frame
        self.window = window
        self.number = 0  # of the next payload
        connection.enter()

    def publish(self, kind: int, content: bytes | memoryview = b"") -> None:
        """On the loop."""
        number, self.number = self.number, self.number + 1
        self.connection.send(self.subject, wire.pack(kind, number, content))

    def try_put(self, frame: bytes, priority: int = 0) -> bool:
        self.connection.home.do(lambda: self.publish(wire.MESSAGE, frame))
        return True

    def try_flush(self) -> bool:
        return True  # the handshake waits for the answer anyway

    def arm(self) -> Wait:
        return _NO_WAIT

    def close(self, farewell: bytes | None) -> None:
        if farewell is not None:
            self.connection.home.do(lambda: self.publish(wire.BYE))
        self.connection.leave()

    def abandon(self) -> None:
        pass


class Watch:
    """Asks the server, twice a second, whether anybody subscribes to the peer's subject."""

    def __init__(self, outbox: Outbox) -> None:
        self.peer = Peer(address=outbox.subject)
        self.key = secrets.token_hex(4)
        self.nobody = False
        self._due = 0.0
        self._connection = outbox.connection
        self._cut = outbox.connection.cut
        self._outbox = outbox
        self._connection.enter(self)

    def tick(self) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _PROBE_EVERY
        self._connection.probe(self._outbox.subject, wire.pack(wire.PROBE, self._outbox.number), self.key)

    def verdict(self, *, nobody: bool) -> None:
        self.nobody = self.nobody or nobody

    def gone(self) -> errors.PeerError | None:
        if self.nobody:
            return errors.PeerDied("the peer's connection to the NATS server has ended", url=self._connection.url)
        if self._connection.cut != self._cut:
            return self._connection.broken()
        return None

    def arm(self) -> Wait:
        return _NO_WAIT

    def close(self) -> None:
        self._connection.leave(self)

    def abandon(self) -> None:
        pass


class NatsLink:
    """A Link. What is marked *loop* runs on the client's loop, one at a time; the rest on the caller's threads.

    Accepted messages lie in `_held` until `try_flush`, or until there is a payload's worth of them.
    """

    def __init__(self, url: Url, inbox: Inbox, outbox: Outbox, watch: Watch, limit: int, peer_limit: int) -> None:
        self.native = inbox.native
        self.peer = watch.peer
        self._url = url
        self._connection = inbox.connection
        self._home = inbox.connection.home
        self._inbox, self._outbox, self._watch = inbox, outbox, watch
        self._limit, self._send_limit = limit, min(limit, peer_limit)
        self._closed = False
        # sending
        self._bell = Bell(self._home)
        self._held = deque[bytes]()
        self._held_size = 0
        self._rest: memoryview | None = None  # of the one message that goes in parts
        self._sent = self._granted = 0
        self._turns = 0  # waited for the client to write
        # receiving
        self._messages = deque[bytes]()  # of one payload
        self._whole: bytearray | None = None  # what has come of a message in parts, and how long it will be
        self._whole_size = 0
        self._consumed = self._told = 0
        self._half = int(inbox.card["window"]) // 2
        self._end: errors.IpcError | None = None
        inbox.credited = self._credit
        self._connection.mailboxes.add(self)

    # sending

    def try_send(self, frame: Buffer) -> bool:
        size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
        if size > self._send_limit:
            raise errors.MessageTooLarge(
                f"{size} bytes, and the limit is {self._send_limit}", url=self._url, operation="send"
            )
        if self._closed or self._watch.nobody or not self._inbox.whole:
            self._raise("send")
        if self._rest is not None or self._sent - self._granted >= self._outbox.window:
            self._home.do(self._publish)  # what is held must not wait for the credit that it will bring
            if self._closed or self._watch.nobody or not self._inbox.whole:
                self._raise("send")
            if self._rest is not None or self._sent - self._granted >= self._outbox.window:
                return False
        if size <= self._outbox.max_frame:
            self._held.append(frame if isinstance(frame, bytes) else bytes(frame))
            self._held_size += size + wire.LENGTH_SIZE
            self._sent += size + wire.OVERHEAD
            if self._held_size > self._outbox.max_frame:
                self._home.do(self._publish)
        else:
            rest = memoryview(bytes(frame))
            self._home.do(lambda: self._publish_first(rest))
        return True

    def try_flush(self) -> bool:
        if self._held:
            self._turns = 0
            self._home.do(self._publish)
        if self._rest is None and self._connection.written:
            return True
        self._home.turn()
        if self._closed or self._watch.nobody or not self._inbox.whole:
            self._raise("send")
        return self._rest is None and self._connection.written

    def _publish(self) -> None:
        """Loop: what is held, in as few payloads as hold it."""
        held, self._held_size = self._held, 0
        batch: list[bytes] = []
        room = self._outbox.max_frame
        while held:
            message = held.popleft()
            if batch and room < len(message) + wire.LENGTH_SIZE:
                self._publish_batch(batch)
                batch, room = [], self._outbox.max_frame
            batch.append(message)
            room -= len(message) + wire.LENGTH_SIZE
        if batch:
            self._publish_batch(batch)

    def _publish_batch(self, batch: list[bytes]) -> None:
        if len(batch) == 1:
            self._outbox.publish(wire.MESSAGE, batch[0])
        else:
            number = self._outbox.number
            self._outbox.number += 1
            self._connection.send(self._outbox.subject, wire.pack_many(number, batch))

    def _publish_first(self, message: memoryview) -> None:
        """Loop."""
        self._publish()
        part = message[: self._outbox.max_frame]
        number = self._outbox.number
        self._outbox.number += 1
        self._connection.send(self._outbox.subject, wire.pack_first(number, len(message), part))
        self._sent += len(part) + wire.OVERHEAD
        self._rest = message[len(part) :]
        self._publish_rest()

    def _publish_rest(self) -> None:
        """Loop: as much as there is credit for."""
        rest = self._rest
        while rest is not None and self._sent - self._granted < self._outbox.window:
            part = rest[: self._outbox.max_frame]
            self._outbox.publish(wire.MORE, part)
            self._sent += len(part) + wire.OVERHEAD
            rest = rest[len(part) :] if len(rest) > len(part) else None
        self._rest = rest

    def _credit(self, consumed: int) -> None:
        """Loop: the peer has consumed so much."""
        if not self._granted <= consumed <= self._sent:
            raise errors.ProtocolError("credit for what was never sent")
        self._granted = consumed
        self._publish_rest()
        self._bell.ring()

    # receiving

    def try_recv(self) -> bytes | None:
        if self._closed or self._end is not None:
            self._raise("recv")
        while True:
            if self._messages:
                message = self._messages.popleft()
                self._consume(len(message))
                return message
            payload = self._inbox.try_payload()
            if payload is None:
                if self._watch.nobody or not self._inbox.whole:
                    self._raise("recv")
                return None
            self._inbox.consumed += len(payload)
            if payload[0] == wire.MESSAGE:
                message = wire.content(payload)
                self._consume(len(message))
                self._check_size(len(message))
                return message
            whole = self._unpack(payload)
            if whole is not None:
                return whole

    def _unpack(self, payload: bytes) -> bytes | None:
        """Anything but a lone message."""
        kind = payload[0]
        if kind == wire.MESSAGES:
            try:
                self._messages.extend(wire.messages(payload))
            except errors.ProtocolError as error:
                self._bad(error.message)
            for message in self._messages:
                self._check_size(len(message))
            return None
        if kind == wire.FIRST:
            begin = wire.HEAD_SIZE
            try:
                size = wire.read_u64(payload)
            except errors.ProtocolError as error:
                self._bad(error.message)
            self._check_size(size)
            if self._whole is not None:
                self._bad("a message in parts inside another")
            self._whole, self._whole_size = bytearray(), size  # grows with what comes, not with what is announced
        else:
            begin = wire.HEAD_SIZE - 8
            if self._whole is None:
                self._bad("a part of no message")
        part = memoryview(payload)[begin:]
        if len(self._whole) + len(part) > self._whole_size or not part:
            self._bad("parts that do not add up to their message")
        self._whole += part
        self._consume(len(part))
        if len(self._whole) < self._whole_size:
            return None
        message, self._whole = bytes(self._whole), None
        return message

    def _consume(self, size: int) -> None:
        self._consumed += size + wire.OVERHEAD
        if self._consumed - self._told >= self._half:
            self._told = self._consumed
            self._home.do(self._give_credit)

    def _give_credit(self) -> None:
        """Loop."""
        credit = wire.pack_credit(self._outbox.number, self._told)
        self._connection.send(self._outbox.subject, credit)

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            self._bad(f"a message of {size} bytes, above the limit of {self._limit}")

    # both

    def ring(self) -> None:
        self._bell.ring()

    def _bad(self, what: str) -> NoReturn:
        self._end = errors.ProtocolError(what, url=self._url)
        self._messages.clear()
        self._inbox.payloads.clear()
        self._raise("recv")

    def _raise(self, operation: str) -> NoReturn:
        """Say why nothing goes on."""
        if self._closed:
            raise errors.Closed("this link is closed", url=self._url, operation=operation)
        if self._end is None:
            end = self._inbox.over or self._watch.gone()
            if end is None:
                self._inbox.why_not(operation)
                end = self._connection.broken()
            if operation != "recv":
                raise _again(end, self._url, operation)
            if isinstance(end, errors.PeerClosed) and self._whole is not None:
                end = errors.PeerDied("the peer closed inside a message", url=self._url)
            self._end = end
        raise _again(self._end, self._url, operation) from self._end.__cause__

    def arm(self, want: Want) -> Wait:
        if want == Want.RECV:
            if self._held:
                self._home.do(self._publish)
            return self._inbox.arm()
        wait = self._bell.arm()
        if self._home.eager and not self._connection.written:
            # On the caller's loop the client writes one turn later. When the socket is full, only the server tells.
            self._turns += 1
            if self._turns <= 2:
                wait = _ONE_TURN
            else:
                self._home.do(self._connection.confirm)
        if want == Want.SEND:
            return wait
        other = self._inbox.arm()
        return Wait(tuple({*wait.fds, *other.fds}), wait.at_most if other.at_most is None else other.at_most)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._inbox.credited = None
        if self._inbox.whole and not self._watch.nobody and self._end is None:
            self._home.do(self._say_goodbye)
        self._connection.mailboxes.discard(self)
        self._inbox.close()
        self._watch.close()
        self._outbox.close(None)
        self._bell.close()

    def _say_goodbye(self) -> None:
        """Loop. Without the BYE, the peer hears that the rest of a message will not come."""
        self._publish()
        if self._rest is None:
            self._outbox.publish(wire.BYE)

    def abandon(self) -> None:
        self._closed = True
        self._inbox.abandon()
        self._bell.close()


def _again(error: errors.IpcError, url: Url, operation: str) -> errors.IpcError:
    return type(error)(error.message, url=url, operation=operation, hint=error.hint)
