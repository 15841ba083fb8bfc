"""Calls through a broker, the server's side: a listener that makes links of what comes.

`Board` sorts what the exchange brings by who it is from; a `Session` is the link to one client. `_routing` is the other side.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Protocol, runtime_checkable

from .. import errors
from .._exchange import Came, Exchange
from .._spi import Link, Peer, Wait, Want
from .._url import Url
from ..transports._bell import Bell
from . import events
from ._routing import kind_and_id
from .dialects import CALL, CANCEL, CREDIT, END, FAILURE, HEAD, ITEM, RESULT, Native

#: Of one client: so many calls that are over are remembered, and what came for so many that have not come.
_PAST, _EARLY = 4096, 256
_OF_A_CALL = frozenset({ITEM, END, CREDIT, CANCEL})
#: How often the watcher looks in where a worker sorts, in seconds.
_LOOK_IN = 0.005
_native = Native()


@runtime_checkable
class Attached(Protocol):
    """A listener that brings everything that its clients send, not only the clients; so it is heard until the end."""

    def attach(self, engine: Any) -> None: ...

    def withdraw(self) -> None:
        """Take no new calls."""

    @property
    def settled(self) -> bool: ...


class Board:
    """A Listener: what comes through the exchange, sorted by who it is from. `try_accept` is what brings it.

    With one client alone, the worker who waits for its next call *leads*: it sleeps on the exchange itself and sorts, and the
    watcher looks in every few milliseconds. That saves a call two changes of threads. With more, the watcher sorts for all.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.url: Url = exchange.url
        self._sessions: dict[str, Session] = {}
        self._ready: deque[Link] = deque()
        self._micro: Any = None
        self._engine: Any = None
        self._sorting = threading.Lock()
        self._watcher: int | None = None  # the thread that accepts
        self._leader: Session | None = None
        self._bell = Bell()
        self.withdrawn = False

    @property
    def native(self) -> Any:
        return self.exchange.native

    def attach(self, engine: Any) -> None:
        """The engine that this is the listener of: what clients that are no ipckit's may call is its business."""
        from ._micro import Micro, Responding

        self._engine = engine

        if isinstance(self.exchange, Responding):
            self._micro = Micro(self.exchange, engine)
            self._ready.append(self._micro.link)

    @property
    def settled(self) -> bool:
        """It has withdrawn, and nothing is left of what came before."""
        if not (self.withdrawn and self.exchange.settled):
            return False
        with self._sorting:
            return not any(session.waiting for session in tuple(self._sessions.values()))

    def try_accept(self) -> Link | None:
        self._watcher = threading.get_ident()
        while not self._ready:
            if not self._sort():
                if self._engine is not None and self.settled:
                    engine, self._engine = self._engine, None
                    engine.settled()
                return None
        return self._ready.popleft()

    def _sort(self) -> bool:
        """What has come, to whom it concerns. False: nothing has."""
        with self._sorting:
            came = self.exchange.try_fetch()
            if came is not None:
                self._take(came)
        return came is not None

    def lead(self, session: Session) -> bool:
        """By who waits for it. True: sort for yourself; you are alone."""
        alone = threading.get_ident() != self._watcher and len(self._sessions) == 1 and not self.withdrawn
        if alone:
            self._leader = session
        elif self._leader is session:
            self._leader = None
            self._bell.ring()
        return alone

    def sort_for(self, session: Session) -> None:
        if self._leader is session:
            while not session.waiting and self._sort():
                pass

    def _take(self, came: Came) -> None:
        session = self._sessions.get(came.who)
        if came.what == "frame":
            if session is None:
                self._leader = None
                self._bell.ring()
                session = self._sessions[came.who] = Session(self, came.who)
                self.exchange.watch(came.who, session.busy)
                self._ready.append(session)
            session.put(came.body)
        elif came.what == "who":
            self.exchange.answer(came.who, came.id, session is not None and session.has(came.id))
        elif came.what == "request":
            if self._micro is not None:
                self._micro.request(came)
        elif session is not None:
            self._sessions.pop(came.who, None)
            kind = errors.PeerClosed if came.what == "left" else errors.PeerDied
            session.end(kind("the client is gone", url=self.url))

    def forget(self, session: Session) -> None:
        if self._leader is session:
            self._leader = None
            self._bell.ring()
        if self._sessions.get(session.who) is session:
            del self._sessions[session.who]
            self.exchange.drop(session.who)

    def withdraw(self) -> None:
        """Take no more calls."""
        if not self.withdrawn:
            self.withdrawn = True
            self._leader = None
            self._bell.ring()
            self.exchange.withdraw()

    def arm(self, want: Want) -> Wait:
        bell = self._bell.announce()
        if self._leader is not None:
            return Wait((bell,), _LOOK_IN)
        wait = self.exchange.arm(Want.RECV)
        return wait._replace(fds=(*wait.fds, bell))

    def close(self) -> None:
        self.withdraw()
        self.exchange.close()

    def abandon(self) -> None:
        self.exchange.abandon()


class Session:
    """A Link: one client, as one of the servers has it."""

    def __init__(self, board: Board, who: str) -> None:
        self.who = who
        self.peer = Peer(address=who)
        self._board = board
        self._exchange = board.exchange
        self._inbox: deque[bytes] = deque()
        self._calls: set[int] = set()
        self._past: dict[int, None] = {}
        self._early: dict[int, list[bytes]] = {}  # a broker may bring what follows a call before the call
        self._bell = Bell()
        self._end: errors.IpcError | None = None

    @property
    def native(self) -> Any:
        return self._exchange.native

    def busy(self) -> bool:
        return bool(self._calls)

    @property
    def waiting(self) -> bool:
        """Something has come that nobody has looked at."""
        return bool(self._inbox)

    def has(self, id: int) -> bool:
        return id in self._calls

    def put(self, frame: bytes) -> None:
        """By who fetches."""
        kind, id = kind_and_id(frame) if len(frame) >= HEAD.size else (0, 0)
        if kind == CALL and id:
            self._calls.add(id)
        elif kind in _OF_A_CALL and id not in self._calls:
            if id not in self._past:
                self._early.setdefault(id, []).append(frame)
                if len(self._early) > _EARLY:
                    del self._early[next(iter(self._early))]
            return
        elif kind == CANCEL:  # no answer will say that it is over
            self._finish(id)
        self._inbox.append(frame)
        if kind == CALL and self._early:
            for late in self._early.pop(id, ()):
                self.put(late)
        self._bell.ring()

    def end(self, error: errors.IpcError) -> None:
        if self._end is None:
            self._end = error
        self._bell.ring()

    def try_send(self, frame: Any) -> bool:
        if self._end is not None:
            self._raise("send")
        frame = bytes(frame)
        kind, id = kind_and_id(frame)
        try:
            if not self._exchange.try_post(self.who, frame):
                return False
        except errors.MessageTooLarge as error:
            kind = FAILURE
            self._exchange.try_post(self.who, _native.encode(events.Failure(id, "TOO_LARGE", error.message))[0])
        if kind in (RESULT, FAILURE, END):
            self._finish(id)
        return True

    def _finish(self, id: int) -> None:
        self._calls.discard(id)
        self._past[id] = None
        if len(self._past) > _PAST:
            del self._past[next(iter(self._past))]
        self._exchange.finish(self.who, id)

    def try_flush(self) -> bool:
        return self._exchange.try_flush()

    def try_recv(self) -> bytes | None:
        if not self._inbox:
            self._board.sort_for(self)
        while self._inbox:
            frame = self._inbox[0]
            kind, id = kind_and_id(frame) if self._board.withdrawn and len(frame) >= HEAD.size else (0, 0)
            if kind != CALL:
                return self._inbox.popleft()
            self._exchange.pass_on(self.who, id, frame)
            self._calls.discard(id)
            self._inbox.popleft()
        if self._end is not None:
            self._raise("recv")
        return None

    def _raise(self, operation: str) -> None:
        end = self._end
        assert end is not None
        raise type(end)(end.message, url=self._board.url, operation=operation) from end.__cause__

    def arm(self, want: Want) -> Wait:
        if self._end is not None:
            return Wait((), 0)
        bell = self._bell.announce()
        if not want & Want.SEND:
            if self._board.lead(self):
                wait = self._exchange.arm(Want.RECV)
                return wait._replace(fds=(*wait.fds, bell))
            return Wait((bell,))
        return Wait((bell,), self._exchange.arm(Want.SEND).at_most)

    def close(self) -> None:
        if not isinstance(self._end, errors.Closed):
            self._end = errors.Closed("this connection is closed", url=self._board.url)
            self._board.forget(self)

    def abandon(self) -> None:
        pass  # the board lets go of the exchange
