"""Calls through a broker: one link for a client, though each of its calls may be with another server.

`Router` is that link. It lets the frame of a new call go to the group, learns from the first answer which server has it,
and sends what else belongs to the call (items, credits, a cancellation) there. `_board` is the server's side. The state
machines above know nothing of all this.

Nobody confirms that he has taken a call: that would double the price of a short one. Instead, a client that has heard nothing
for a while *inquires*. When the server that has a call dies, that call fails and no other; who may repeat it does, and another
server takes it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from .. import errors
from .._exchange import Came, Exchange
from .._spi import Peer, Wait, Want
from . import events
from .dialects import (
    CALL,
    CANCEL,
    END,
    FAILURE,
    GOODBYE,
    HEAD,
    HELLO,
    PUSH,
    RESULT,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Native,
)
from .failures import NOT_TAKEN

#: How long a call may be without an answer before the client asks who has it, in seconds.
_ASK_AFTER = 0.5
#: Seconds in which a server that has not been heard of may say that it is there, before full ones speak for all.
_OTHERS = 0.5
_KIND = 0x7F  # the rest of the byte is a flag
_native = Native()


def kind_and_id(frame: bytes) -> tuple[int, int]:
    """(kind, id). Raises ProtocolError."""
    if len(frame) < HEAD.size:
        raise errors.ProtocolError(f"a frame of {len(frame)} bytes")
    _, kind, _, id, _ = HEAD.unpack_from(frame)
    return kind & _KIND, id


@dataclass(slots=True)
class _Way:
    """Where a call is. `asked`: when we sent it, or inquired last."""

    asked: float
    server: str = ""
    held: deque[bytes] = field(default_factory=deque)


class Router:
    """A Link. `mutex` guards the ways; an exchange takes frames from several threads."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._url = exchange.url
        self._mutex = threading.RLock()
        self._ways: dict[int, _Way] = {}
        self._made: deque[bytes] = deque()  # what the servers that are gone can no longer say
        self._stuck = False  # a way has frames that the exchange had no room for
        self._types: set[str] = set()
        self._hello: bytes | None = None
        self._greeter = ""
        self._full: set[str] = set()  # servers that have no room for us
        self._refusal: tuple[float, bytes] | None = None  # what the last of them said, and when it counts
        self._end: errors.IpcError | None = None
        for server in exchange.servers():
            self._meet(server)

    @property
    def native(self) -> Any:
        return self._exchange.native

    @property
    def peer(self) -> Peer:
        return Peer(address=self._url.path.lstrip("/"))

    # -- sending -------------------------------------------------------------------------------------------------------

    def try_send(self, frame: Any) -> bool:
        if self._end is not None:
            self._raise("call")
        frame = bytes(frame)
        kind, id = kind_and_id(frame)
        with self._mutex:
            try:
                return self._send(kind, id, frame)
            except errors.MessageTooLarge as error:
                way = self._ways.get(id)
                self._over(id)
                if way is not None and way.server:
                    self._exchange.try_post(way.server, _native.encode(events.Cancel(id))[0])
                self._fail(id, "TOO_LARGE", error.message)
                return True

    def _send(self, kind: int, id: int, frame: bytes) -> bool:
        if kind == CALL:
            server = self._exchange.try_call(id, frame)
            if server is not None and id:
                self._ways[id] = _Way(time.monotonic(), server)
            return server is not None
        if kind == HELLO:
            self._hello = frame
            self._greet()
            return True
        if kind in (SUBSCRIBE, UNSUBSCRIBE):
            self._subscription(frame)
            taken = [self._exchange.try_post(server, frame) for server in self._exchange.servers()]
            return all(taken)  # it does no harm to tell it to one of them twice
        way = self._ways.get(id)
        if way is None:  # it is over, and nobody wants this any more
            return True
        if not way.server and not way.held:
            self._inquire(id, way)
        way.held.append(frame)  # no more than the credit of its stream
        self._stuck |= not self._forward(way)
        return True

    def _forward(self, way: _Way) -> bool:
        """What is held, to the server that has the call. True: nothing is left that could go."""
        while way.server and way.held:
            frame = way.held[0]
            if not self._exchange.try_post(way.server, frame):
                return False
            way.held.popleft()
            kind, id = kind_and_id(frame)
            if kind == CANCEL:  # nothing comes after it
                self._over(id)
        return True

    def _greet(self) -> bool:
        """One of the servers that may have room for us. False: none may."""
        servers = [server for server in self._exchange.servers() if server not in self._full]
        if not servers or self._hello is None:
            return False
        self._greeter = random.choice(servers)
        self._exchange.try_post(self._greeter, self._hello)
        return True

    def _subscription(self, frame: bytes) -> None:
        event = _native.decode(frame)[0]
        if isinstance(event, events.Subscribe):
            self._types.update(event.types)
        elif isinstance(event, events.Unsubscribe):
            self._types.difference_update(event.types or tuple(self._types))

    def _inquire(self, id: int, way: _Way) -> None:
        way.asked = time.monotonic()
        self._exchange.inquire(id)

    def try_flush(self) -> bool:
        if self._stuck:
            with self._mutex:
                gone = [self._forward(way) for way in tuple(self._ways.values())]
                self._stuck = not all(gone)
        return self._exchange.try_flush() and not self._stuck

    # -- receiving -----------------------------------------------------------------------------------------------------

    def try_recv(self) -> bytes | None:
        while True:
            if self._made:
                return self._made.popleft()
            if self._end is not None:
                self._raise("call")
            came = self._exchange.try_fetch()
            if came is None:
                self._ask_about()
                return self._overdue()
            with self._mutex:
                frame = self._take(came)
            if frame is not None:
                return frame

    def _take(self, came: Came) -> bytes | None:
        what = came.what
        if what == "frame":
            return self._heard(came)
        if what == "here":
            self._meet(came.who)
        elif what == "mine":
            way = self._ways.get(came.id)
            if way is not None:
                self._found(way, came.who)
        elif what == "nobody":
            if came.id in self._ways:
                self._over(came.id)
                taken = not came.body
                self._fail(
                    came.id,
                    "PEER_DIED" if taken else NOT_TAKEN,
                    "the server that had taken the call is gone" if taken else "no server is there",
                )
        elif what in ("reset", "lost", "left"):
            self._gone(came)
        return None

    def _heard(self, came: Came) -> bytes | None:
        kind, id = kind_and_id(came.body)
        if kind == FAILURE and not id:
            self._refused(came)
            return None
        if came.who in self._full and kind != FAILURE:  # it has room by now
            self._full.discard(came.who)
            self._meet(came.who)
        if kind in (RESULT, FAILURE, END):
            self._over(id)
        elif kind == HELLO:
            if self._hello is None:
                return None  # another's, after the first was given up
            self._hello = self._refusal = None
        elif kind == GOODBYE:
            return None  # of one server; the broker gives it no more calls
        elif kind != PUSH and (way := self._ways.get(id)) is not None:
            self._found(way, came.who)
        return came.body

    def _refused(self, came: Came) -> None:
        """It has no room for us. That matters only if we have not been greeted, and nobody else has."""
        self._full.add(came.who)
        if self._hello is not None and came.who == self._greeter and not self._greet():
            self._refusal = time.monotonic() + _OTHERS, came.body

    def _overdue(self) -> bytes | None:
        """The refusal, when nobody has come who might do better."""
        with self._mutex:
            if self._refusal is None or time.monotonic() < self._refusal[0]:
                return None
            (_, frame), self._refusal = self._refusal, None
            return frame

    def _over(self, id: int) -> None:
        self._ways.pop(id, None)
        self._exchange.finish("", id)

    def _found(self, way: _Way, server: str) -> None:
        way.server = server
        self._stuck |= not self._forward(way)

    def _meet(self, server: str) -> None:
        self._exchange.watch(server, lambda: self._counts_on(server))
        if self._types:
            self._exchange.try_post(server, _native.encode(events.Subscribe(0, sorted(self._types)))[0])
        if self._refusal is not None and self._greet():
            self._refusal = None

    def _counts_on(self, server: str) -> bool:
        # Called where the broker's client works: it must not wait for the mutex.
        return self._hello is not None or any(way.server in (server, "") for way in tuple(self._ways.values()))

    def _gone(self, came: Came) -> None:
        code = "PEER_CLOSED" if came.what == "left" else "PEER_DIED"
        text = {"left": "the server has left", "lost": "the server that had the call is gone"}.get(
            came.what, "the server has lost the call"
        )
        for id, way in tuple(self._ways.items()):
            if way.server == came.who:
                self._over(id)
                self._fail(id, code, text)
            elif not way.server:
                self._inquire(id, way)
        if came.what != "reset":
            self._full.discard(came.who)
        if not self._exchange.servers():
            kind = errors.PeerClosed if came.what == "left" else errors.PeerDied
            self._end = kind("the last server of this name is gone", url=self._url)
        elif self._hello is not None and self._greeter == came.who:
            self._greet()
        elif came.what == "reset" and self._types and came.who not in self._full:
            self._meet(came.who)

    def _fail(self, id: int, code: str, why: str) -> None:
        self._made.extend(_native.encode(events.Failure(id, code, why)))

    def _ask_about(self) -> None:
        """The calls that nobody has answered for a while."""
        if self._ways:
            now = time.monotonic()
            with self._mutex:
                for id, way in tuple(self._ways.items()):
                    if not way.server and now - way.asked >= _ASK_AFTER:
                        self._inquire(id, way)

    def _raise(self, operation: str) -> None:
        end = self._end
        assert end is not None
        raise type(end)(end.message, url=self._url, operation=operation) from end.__cause__

    def arm(self, want: Want) -> Wait:
        if self._made or self._end is not None:
            return Wait((), 0)
        wait, refusal = self._exchange.arm(want), self._refusal
        # Who sleeps here already is not woken for each call that somebody else makes: it looks after them now and then.
        most = _ASK_AFTER if refusal is None else max(min(refusal[0] - time.monotonic(), _ASK_AFTER), 0)
        return wait._replace(at_most=most if wait.at_most is None else min(wait.at_most, most))

    def close(self) -> None:
        if not isinstance(self._end, errors.Closed):
            self._end = errors.Closed("this connection is closed", url=self._url)
            self._exchange.close()

    def abandon(self) -> None:
        self._exchange.abandon()
