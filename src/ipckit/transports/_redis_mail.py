"""The mailboxes of redis://: streams, and how they are made, found, read, written and watched. The story is in `redis`."""

from __future__ import annotations

import os
import re
import socket
import time
import uuid
from collections import deque
from contextlib import suppress
from typing import Any

import msgspec

from .. import errors
from .._spi import Peer, Steps, Wait
from .._url import Url
from . import _mail
from ._mail import Card, Inbox, Outbox, Watch, Window
from ._redis_address import Address, Native
from ._redis_wire import Wire, map_redis, open_wire

_MAX_FRAME = 4 << 20  # of larger messages the server would hold a whole copy for each side at once
_WINDOW_BYTES = 16 << 20
_MAX_HELD = 1 << 20  # bytes of pipelined commands that the kernel has not taken
_TRIM = (256, 1 << 20)  # frames and bytes read, after which they are trimmed
_HANDSHAKE_TTL = 60.0  # of a mailbox that belongs to no channel yet
_ASK_EVERY = 0.5  # seconds between two questions whether the peer is connected


class Post:
    """Mailboxes on one server. See `_mail.Post`. Its own connection finds the listener and clears away."""

    priorities = 0

    def __init__(self, address: Address, window: int, ttl: float) -> None:
        self.url = address.url
        self.address = address
        self.ttl = ttl
        self.window: Window | None = Window(window, _WINDOW_BYTES)
        self._wire: Wire | None = None
        self._run = ""
        self._prefix = f"ipckit:{{{address.name}}}:"

    def wire(self) -> Steps[Wire]:
        if self._wire is None:
            wire = yield from open_wire(self.url, self.address.connection)
            try:
                info = yield from wire.ask("INFO", "server")
                found = re.search(rb"^run_id:(\w+)", info, re.MULTILINE)
                self._run = found[1].decode() if found else ""
            except BaseException:
                wire.close()
                raise
            self._wire = wire
        return self._wire

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def discard(self, *keys: str) -> None:
        with suppress(errors.PeerError):
            if self._wire is not None:
                self._wire.tell(None, "DEL", *keys)
                self._wire.pump()

    def abandon(self) -> None:
        if self._wire is not None:
            self._wire.abandon()

    # the listener's name

    @property
    def _listener(self) -> str:
        return self._prefix + "listener"

    def open_rendezvous(self) -> Steps[Inbox]:
        wire = yield from self.wire()
        inbox = yield from self._make("desk", self.ttl)
        card = msgspec.json.encode(inbox.card)
        lifetime = int(self.ttl * 1000)
        try:
            while not (yield from wire.ask("SET", self._listener, card, "NX", "PX", lifetime)):
                # Whoever was there is alive, or is replaced by exactly one of those who find it dead.
                yield from wire.ask("WATCH", self._listener)
                found = _read_card((yield from wire.ask("GET", self._listener)))
                if found is not None and (yield from self._alive(found)):
                    yield from wire.ask("UNWATCH")
                    raise errors.AddressInUse("another process listens there", url=self.url, operation="listen")
                yield from wire.ask("MULTI")
                yield from wire.ask("DEL", self._listener, str((found or {}).get("box", "")))
                yield from wire.ask("EXEC")
        except BaseException:
            inbox.close()
            raise
        inbox.listener = self._listener
        return inbox

    def find(self) -> Steps[Card | None]:
        wire = yield from self.wire()
        card = _read_card((yield from wire.ask("GET", self._listener)))
        return card if card is not None and (yield from self._alive(card)) else None

    def _alive(self, card: Card) -> Steps[bool]:
        """A server that was restarted counts its clients anew, so the number alone does not tell."""
        if card.get("run") != self._run or not isinstance(card.get("client"), int):
            return False
        wire = yield from self.wire()
        return bool((yield from wire.ask("CLIENT", "LIST", "ID", card["client"])))

    # sessions

    def open_inbox(self) -> Steps[Inbox]:
        yield from self.wire()
        return (yield from self._make("box", _HANDSHAKE_TTL))

    def _make(self, kind: str, ttl: float) -> Steps[_RedisInbox]:
        wire = yield from open_wire(self.url, self.address.connection)
        try:
            key = f"{self._prefix}{kind}:{uuid.uuid4().hex}"
            # The first entry makes the stream; it is never read, and goes with the first trim.
            yield from wire.ask("XADD", key, "0-1", "d", "")
            yield from wire.ask("PEXPIRE", key, int(ttl * 1000))
        except BaseException:
            wire.close()
            raise
        card: Card = {
            "box": key,
            "client": wire.number,
            "run": self._run,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        return _RedisInbox(self, wire, card)

    def open_outbox(self, card: Card) -> Steps[tuple[Outbox, Watch]]:
        key, client, pid = card.get("box"), card.get("client"), card.get("pid")
        if not (isinstance(key, str) and key.startswith(self._prefix) and len(key) < 300):
            raise errors.ProtocolError("the card names no stream of this listener", url=self.url)
        if not isinstance(client, int) or card.get("run") != self._run:
            raise errors.NothingListening("the server was restarted since", url=self.url)
        wire = yield from open_wire(self.url, self.address.connection)
        watch = _RedisWatch(self.url, wire, client, pid if isinstance(pid, int) else None, f"{card.get('host', '')}")
        return _RedisOutbox(self, wire, key, watch), watch


def _read_card(found: bytes | None) -> Card | None:
    try:
        return None if found is None else msgspec.json.decode(found, type=Card)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


# -- the mailboxes ----------------------------------------------------------------------------------------------------


class _RedisInbox:
    """One XREAD is outstanding whenever we have nothing to read."""

    def __init__(self, post: Post, wire: Wire, card: Card) -> None:
        self.card = card
        self.key = str(card["box"])
        self.native = Native(self.key, post.address)
        self.listener: str | None = None  # the key of the name, if this is a listener's
        self.watch: _RedisWatch | None = None  # of the peer, once this is the inbox of a channel
        self._post, self._wire = post, wire
        self._desk = ":desk:" in self.key
        self._asked = False
        self._frames = deque[bytes]()
        self._count = 0  # frames read: the id of the last is COUNT-0
        self._last = b"0-1"
        self._untrimmed = [0, 0]
        self._refresh_at = time.monotonic() + post.ttl / 8
        self._error: errors.IpcError | None = None
        self.ask()

    def ask(self) -> None:
        if self._asked or self._error is not None:
            return
        if self._untrimmed[0] >= _TRIM[0] or self._untrimmed[1] >= _TRIM[1] or (self._desk and self._untrimmed[0]):
            self._trim()
        self._asked = True
        self._wire.tell(self._read, "XREAD", "COUNT", 1024, "BLOCK", 0, "STREAMS", self.key, self._last)
        self._wire.pump()

    def _trim(self) -> None:
        """On the other connection, as its reply would wake who sleeps on this one."""
        wire = self._post._wire if self.watch is None else self.watch.wire
        if wire is not None:
            wire.tell(None, "XTRIM", self.key, "MINID", self._last)
            wire.pump()
            self._untrimmed = [0, 0]

    def _read(self, reply: Any) -> None:
        self._asked = False
        if isinstance(reply, Exception):
            self._error = errors.PeerError(f"the mailbox cannot be read: {reply}", url=self._post.url)
            return
        for number, fields in reply[0][1] if reply else ():
            self._last = number
            self._count += 1
            frame = fields[1] if fields is not None and len(fields) == 2 else b""
            if not self._desk and number != b"%d-0" % self._count:
                self._error = errors.ProtocolError("a frame is missing in the stream", url=self._post.url)
                return
            self._frames.append(frame)
            self._untrimmed[0] += 1
            self._untrimmed[1] += len(frame)

    def try_get(self) -> bytes | None:
        if not self._frames:
            if self._error is not None:
                raise self._error
            self.ask()  # before we say that there is nothing: whoever sleeps then is woken by what comes
            self._wire.pump()
        return self._frames.popleft() if self._frames else None

    def settled(self) -> bool:
        return self.watch is None or self.watch.settled(self.key, self._count)

    def arm(self) -> Wait:
        if not self._frames:
            self.ask()
        if self.listener is None:
            return self._wire.arm()
        if time.monotonic() > self._refresh_at and self._post._wire is not None:
            self._refresh_at = time.monotonic() + self._post.ttl / 8
            for key in (self.listener, self.key):
                self._post._wire.tell(None, "PEXPIRE", key, int(self._post.ttl * 1000))
            self._post._wire.pump()
        return Wait(self._wire.arm().fds, self._post.ttl / 8)

    def close(self) -> None:
        if self.listener is not None:
            # While this connection stands, nobody has taken the name from us.
            with suppress(errors.PeerError):
                self._wire.pump()
                self._post.discard(self.listener, self.key)
            self._post.close()
        elif self.watch is None:
            self._post.discard(self.key)
        self._wire.close()

    def abandon(self) -> None:
        self._wire.abandon()
        if self.listener is not None:
            self._post.abandon()


class _RedisOutbox:
    max_frame = _MAX_FRAME

    def __init__(self, post: Post, wire: Wire, key: str, watch: _RedisWatch) -> None:
        self.native = Native(key, post.address)
        self.key = key
        self.inbox: _RedisInbox | None = None  # our own, once this is a channel
        self._post, self._wire, self._watch = post, wire, watch
        self._desk = ":desk:" in key
        self._sent = 0
        self._unconfirmed = 0
        self._error: errors.IpcError | None = None

    def try_put(self, frame: bytes, priority: int = 0) -> bool:
        if self._wire.held >= _MAX_HELD:
            self._wire.pump()
            if self._wire.held >= _MAX_HELD:
                return False
        if self._error is not None:
            raise self._error
        self._add(frame)
        if self._unconfirmed == 1 or self._wire.held >= 64 << 10:
            self._wire.pump()
        return True

    def _add(self, frame: bytes) -> None:
        self._sent += 1
        self._unconfirmed += 1
        number = b"*" if self._desk else b"%d-0" % self._sent
        self._wire.tell(self._added, "XADD", self.key, "NOMKSTREAM", number, "d", frame)

    def _added(self, reply: Any) -> None:
        self._unconfirmed -= 1
        if isinstance(reply, Exception):
            self._error = map_redis(reply, self._post.url, "send")
            self._error.__cause__ = reply
        elif reply is None:
            self._error = errors.PeerClosed("the peer has removed its mailbox", url=self._post.url)

    def try_flush(self) -> bool:
        if self._unconfirmed:
            self._wire.pump()
        if self._error is not None:
            raise self._error
        return not self._unconfirmed

    def arm(self) -> Wait:
        return self._wire.arm()

    def close(self, farewell: bytes | None) -> None:
        with suppress(errors.PeerError):
            if farewell is not None and self._error is None:
                self._add(farewell)
            if self.inbox is not None:
                # The peer removes its own; one that was killed cannot.
                dead = isinstance(self._watch.gone(), errors.PeerDied)
                self._wire.tell(None, "DEL", self.inbox.key, *((self.key,) if dead else ()))
        self._wire.close()

    def abandon(self) -> None:
        self._wire.abandon()


class _RedisWatch:
    """Asks the server whether the connection that the peer reads with is still there."""

    def __init__(self, url: Url, wire: Wire, client: int, pid: int | None, host: str) -> None:
        self.peer = Peer(address=f"client {client} of the server" + (f", on {host}" if host else ""))
        self.boxes: tuple[str, ...] = ()  # whose life we prolong
        self.ttl = 0.0
        self._url, self.wire, self._client, self._pid = url, wire, client, pid
        self._asked = False
        self._ask_at = time.monotonic()
        self._prolong_at = 0.0
        self._dead = False
        self._end: int | None = None  # the last frame in our inbox, known once the peer is dead
        self._looking = False
        self._error: errors.IpcError | None = None

    def gone(self) -> errors.PeerError | None:
        if self._dead:
            return errors.PeerDied("the server lost the connection of the peer", url=self._url, pid=self._pid)
        now = time.monotonic()
        if not self._asked and now >= self._ask_at:
            self._asked = True
            self._ask_at = now + _ASK_EVERY
            if self.boxes and now > self._prolong_at:
                self._prolong_at = now + self.ttl / 8
                for key in self.boxes:
                    self.wire.tell(None, "PEXPIRE", key, int(self.ttl * 1000))
            self.wire.tell(self._answer, "CLIENT", "LIST", "ID", self._client)
        if self._asked:
            self.wire.pump()
        if self._error is not None:
            raise self._error
        return self.gone() if self._dead else None

    def _answer(self, reply: Any) -> None:
        self._asked = False
        if isinstance(reply, Exception):
            self._error = map_redis(reply, self._url, "recv")
            self._error.hint = "a channel needs CLIENT LIST"
        elif not reply:
            self._dead = True

    def settled(self, key: str, count: int) -> bool:
        """Is frame `count` the last in our inbox? What the server says after it lost the peer is final."""
        if self._end is None:
            if not self._looking:
                self._looking = True
                self.wire.tell(self._found, "XREVRANGE", key, "+", "-", "COUNT", 1)
            self.wire.pump()
        return self._end is not None and count >= self._end

    def _found(self, reply: Any) -> None:
        # No stream, or none of the peer's frames in it: nothing is to come.
        entry = reply[0][0] if isinstance(reply, list) and reply else b"0-0"
        self._end = int(entry.partition(b"-")[0])

    def arm(self) -> Wait:
        if self._asked or self._looking:
            return Wait(self.wire.arm().fds)
        return Wait((), max(self._ask_at - time.monotonic(), 0.0))

    def close(self) -> None:
        """The connection is the outbox's."""

    abandon = close


def make_channel(
    post: _mail.Post, inbox: Inbox, outbox: Outbox, watch: Watch, limit: int, peer_limit: int
) -> _mail.MailLink:
    """Both mailboxes of a channel know each other from here on."""
    assert isinstance(post, Post)
    assert isinstance(inbox, _RedisInbox)
    assert isinstance(outbox, _RedisOutbox)
    assert isinstance(watch, _RedisWatch)
    inbox.watch, outbox.inbox = watch, inbox
    watch.boxes, watch.ttl = (inbox.key, outbox.key), post.ttl
    return _mail.MailLink(post, inbox, outbox, watch, limit, peer_limit)
