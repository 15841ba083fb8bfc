"""Who comes in: what a connection speaks, whether there is room for it, and how long it may say nothing.

A link on a byte stream is looked at before it is read: its first bytes tell the dialect (`envelope`). Until then nothing is
said to it, and it has `connection_timeout` to begin. One that is too many is refused in its own dialect, if it says within
a moment which that is; one that waits to be spoken to is told in version 2, whose clients expect that.

All of `Reception` runs on the watcher's thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from .. import errors
from .._spi import Link, Reframing
from .._url import Url
from . import _versioned, events
from ._rate import Bucket
from ._servercore import ServerCore
from ._session import ServerConnection
from .dialects import Dialect
from .envelope import FIRST, Envelope, Unknown, Unspoken, UnsupportedVersion, recognise

if TYPE_CHECKING:
    from ._engine import Engine

_log = logging.getLogger("ipckit")

#: Clients that sent what is no protocol: so many are logged one by one in a second.
_COMPLAINTS = 10
#: Seconds that one too many has to say what it speaks.
_MOMENT = 0.1
#: So many of them at once; when there are more, the one that has waited longest is told in version 2.
_WAITING_ROOM = 64


class Reception:
    """Of one server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._refused: deque[tuple[float, ServerConnection]] = deque()
        self._numbers = itertools.count()
        self._patience: list[tuple[float, int, ServerConnection]] = []  # when to look whether it has been silent

    def core(self, dialect: Dialect) -> ServerCore:
        engine, options = self._engine, self._engine.options
        rate = options.requests_per_second
        core = ServerCore(
            dialect,
            targets=engine.services.fingerprints,
            max_calls=options.max_per_connection,
            rate=None if rate is None else Bucket(rate, options.burst_size or max(rate, 1)),
            counts=engine.counts,
        )
        if engine.stopping:
            core.goodbye()
        return core

    def admit(self, link: Link, excess: bool) -> ServerConnection | None:
        """A new connection. None: it was one too many, and knows it. What it speaks, `recognised` tells if it is not `spoken`."""
        dialect: Dialect | None = getattr(link, "dialect", None)  # a link may say how it is spoken to
        if dialect is not None or not issubclass(
            type(link), Reframing
        ):  # of the class: isinstance costs ten times as much
            dialect = dialect or self._engine.dialect()
            conn = ServerConnection(link, self.core(dialect), self._engine.url)
            if excess:
                self._tell(conn, [events.Failure(0, "TARGET_BUSY", self._full()), *self._refused_calls(link, dialect)])
                conn.close()
                self._engine.counts["connections_refused"] += 1
                return None
            return conn
        conn = ServerConnection(link, self.core(Unspoken()), self._engine.url)
        conn.foreign, conn.spoken = cast("Reframing", link), False
        if excess:
            conn.excess = True
            if len(self._refused) >= _WAITING_ROOM:
                self._turn_away(self._refused.popleft()[1], _versioned.Version2())
            self._refused.append((conn.since + _MOMENT, conn))
        else:
            self._expect(conn, conn.since)
        return conn

    def _refused_calls(self, link: Link, dialect: Dialect) -> list[events.Failure]:
        """Through a broker the calls come with who makes them: each is to be told, or nobody would answer it."""
        found: list[events.Failure] = []
        with suppress(errors.IpcError):
            while (frame := link.try_recv()) is not None:
                asked = [each.id for each in dialect.decode(frame) if isinstance(each, events.Call) and each.id]
                found += [events.Failure(id, "TARGET_BUSY", self._full()) for id in asked]
        return found

    def recognised(self, conn: ServerConnection) -> bool:
        """It has said enough to know what it speaks. Raises ProtocolError for what nobody speaks, and as `try_recv`."""
        link = conn.foreign
        assert link is not None
        first = link.try_glance(FIRST)
        if first is None:
            return False
        found = recognise(first)
        if isinstance(found, Unknown):
            link.reframe(0, found.uncounted)  # and no goodbye to a stranger
            if found.answer:
                with suppress(errors.IpcError):
                    conn.link.try_send(found.answer)
            raise errors.ProtocolError(found.why, url=self._engine.url, operation="accept")
        dialect = found()
        if conn.excess:
            self._turn_away(conn, dialect)
            return False
        if isinstance(dialect, Envelope):
            link.reframe(*dialect.uncounted)
            conn.envelope = True
        with conn.mutex:
            conn.core = self.core(dialect)
            conn.spoken = True
        return True

    def _full(self) -> str:
        return f"the server has {self._engine.options.max_connections} connections already"

    def _turn_away(self, conn: ServerConnection, dialect: Dialect) -> None:
        """It is told in this dialect, and lost: whoever settles it next buries it."""
        if conn.lost:
            return
        conn.core = self.core(dialect)
        if isinstance(dialect, Envelope) and conn.foreign is not None:
            conn.foreign.reframe(*dialect.uncounted)
            conn.core.outbox.extend(dialect.turn_away(self._engine.options.max_connections))
            self._tell(conn, [])
        else:
            self._tell(conn, [events.Failure(0, "TARGET_BUSY", self._full())])
        conn.lost = True
        self._engine.counts["connections_refused"] += 1
        self._engine.returned(conn)

    def _tell(self, conn: ServerConnection, failures: list[events.Failure]) -> None:
        for each in failures:
            conn.core.say(each)
        with suppress(errors.IpcError):
            conn.try_flush()

    # -- what time does

    def _expect(self, conn: ServerConnection, since: float) -> None:
        timeout = self._engine.options.connection_timeout
        if timeout is None:
            return
        heapq.heappush(self._patience, (since + timeout, next(self._numbers), conn))
        if len(self._patience) > 2 * self._engine.connections + 64:  # mostly of connections that are long gone
            self._patience = [each for each in self._patience if not each[2].lost]
            heapq.heapify(self._patience)

    def chores(self, now: float) -> list[float]:
        """Those whose time is up. Returns when to look again."""
        while self._refused and (self._refused[0][1].lost or self._refused[0][0] <= now):
            self._turn_away(self._refused.popleft()[1], _versioned.Version2())
        if self._patience and (self._patience[0][2].lost or self._patience[0][0] <= now):
            self._patient(heapq.heappop(self._patience)[2], now)  # one: then the others are looked at
        return [each[0][0] for each in (self._refused, self._patience) if each]

    def _patient(self, conn: ServerConnection, now: float) -> None:
        timeout = self._engine.options.connection_timeout
        if conn.lost or timeout is None or (conn.spoken and not conn.envelope):
            return  # an ipckit at the other end is looked after by the transport
        with conn.mutex:
            busy = bool(conn.core.calls)
        silent_since = now if busy else conn.active
        if silent_since + timeout > now:
            self._expect(conn, silent_since)
            return
        self._engine.counts["connections_idle_closed"] += 1
        why = f"nothing was heard for {timeout:g} s"
        with conn.mutex:
            if not conn.spoken and conn.foreign is not None:
                conn.foreign.reframe(0, 0)  # no goodbye to who never greeted us
            self._tell(conn, [events.Failure(0, "CONNECTION_CLOSED", why)])
        self._engine.lose(conn, errors.Timeout(why, url=self._engine.url))

    def waiting(self) -> list[ServerConnection]:
        """Those that are refused and not gone yet."""
        return [conn for _, conn in self._refused]


class Complaints:
    """The log of those who sent what is no protocol: some a second, and how many there were besides.

    Strangers must not fill a disk with what they send. From any thread.
    """

    def __init__(self, url: Url) -> None:
        self._url = url
        self._mutex = threading.Lock()
        self._bucket = Bucket(_COMPLAINTS, _COMPLAINTS)
        self._unsaid = 0

    def about(self, error: errors.ProtocolError) -> None:
        with self._mutex:
            if self._bucket.take(time.monotonic()):
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
        more = f"; and {unsaid} others since the last time" if unsaid else ""
        _log.warning("%s: lost a client: %s%s", self._url, error.message, more)


def farewell(conn: ServerConnection, error: errors.ProtocolError) -> None:
    """Why it is cut off, in words of its own, if they still reach it. With the mutex held."""
    code = "VERSION" if isinstance(error, UnsupportedVersion) else "PROTOCOL"
    conn.core.say(events.Failure(0, code, error.message))
    with suppress(errors.IpcError):
        conn.try_flush()
