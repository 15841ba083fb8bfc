"""The server without its shells: connections, who receives from them, and where calls begin.

One *watcher* sleeps on the listener and on every connection that nobody attends. In a server of threads, a connection on
which something comes is given to a worker (`_attend`); where there is none to spare, and on an event loop, the watcher receives
itself. Any thread may lose a connection; the watcher alone watches links, and closes those that are lost.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from .. import errors
from .._linkwatch import Watch
from .._spi import Abandoning, Link, Listener, Steps, Wait, Want
from .._url import Url
from . import events
from ._attend import TICK, Attendance
from ._board import Attached
from ._connection import BROKEN
from ._crew import Crew
from ._exposed import Exposed, Services
from ._foreign import unfit
from ._intercepting import to_be_awaited
from ._limits import COUNTS, ServerOptions, ShutdownReport, statistics
from ._micro import MicroLink
from ._reception import Complaints, Reception, farewell
from ._servercore import Changed, ServerCall, Started
from ._serving import Job
from ._session import PAUSE, ServerConnection
from .context import CallContext
from .contract import unwritable
from .dialects import Dialect, Native

__all__ = ["Engine", "ServerOptions", "ShutdownReport"]

_log = logging.getLogger("ipckit")
_DOOR = "door"
_BREATH = 0.0004  # seconds after each connection that comes while more of them wait: those who are here have theirs
_TURN = Wait((), 0.0)


class Engine:
    """`resource` of a server's endpoint. The shells drive `watching()` and say where coroutines run (`loop`)."""

    def __init__(
        self,
        url: Url,
        listener: Listener,
        options: ServerOptions,
        interceptors: Sequence[Callable[..., Any]],
        *,
        threads: bool,
        dialect: Callable[[], Dialect] = Native,
    ) -> None:
        self.url = url
        self.listener = listener
        self.options = options
        self.interceptors = tuple(interceptors)
        self.awaited = to_be_awaited(self.interceptors)
        self.tracebacks = options.tracebacks
        self.services = Services()
        self.crew = Crew(options.workers, f"ipckit-{url.scheme}-server")
        self.loop: Callable[[], asyncio.AbstractEventLoop] | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.counts = dict.fromkeys(COUNTS, 0)
        self.stopping = False
        self.on_drained: Callable[[], Any] | None = None
        self._threads = threads
        self.dialect = dialect
        self._attendance = Attendance(self)
        self._reception = Reception(self)
        self._complaints = Complaints(url)
        self._connections: set[ServerConnection] = set()
        self._strangers: ServerConnection | None = (
            None  # one of them: no client, but where those come from who have no link
        )
        self._returned: deque[ServerConnection] = deque()  # to be heard, flushed and watched
        self._graves: deque[ServerConnection] = deque()  # lost, to be closed: after those that live
        self._timed: set[ServerConnection] = set()
        self._mutex = threading.Lock()  # guards what follows, and the watch's bell
        self._in_flight = 0
        self._watch = Watch()
        self._released = False
        self.closed = False
        self._door_armed = False
        if isinstance(listener, Attached):
            listener.attach(self)

    @property
    def native(self) -> Any:
        return self.listener.native

    # -- the watcher ---------------------------------------------------------------------------------------------------

    def watching(self) -> Steps[None]:
        """Until the engine is closed, or can get no more clients and has lost its last."""
        while not self.closed:
            self._open_door()
            for key in self._watch.ready():
                if isinstance(key, ServerConnection):
                    self._stir(key)
                else:
                    self._door_armed = False
            self._settle()
            if getattr(self.listener, "exhausted", False) and not self._connections:
                return
            until = self._chores()
            with self._mutex:
                wait = self._watch.sleep(until)
            if not (self._returned or self._graves or not self._door_armed or self.closed):
                yield wait
            elif not self._threads:
                yield _TURN  # handlers are tasks of the same loop: they get their turn, however much comes in

    def wake(self) -> None:
        """The watcher has something to do."""
        with self._mutex:
            if not self._released:
                self._watch.ring()

    def returned(self, conn: ServerConnection) -> None:
        """Nobody attends it any more, or something waits to be sent: the watcher sees to it."""
        (self._graves if conn.lost else self._returned).append(conn)
        self.wake()

    def _open_door(self) -> None:
        if self.stopping and not isinstance(self.listener, Attached):
            self._door_armed = True
            return
        if self._door_armed:
            return
        self._door_armed = True
        if self._let_in():
            self._watch.put(_DOOR, Wait((), _BREATH))
            return
        self._watch.put(_DOOR, self.listener.arm(Want.RECV))
        self._door_armed = not self._let_in()  # once more after it was told that we are about to sleep

    def _let_in(self) -> bool:
        """One of those who wait. True if there may be more: first it is the turn of those who are here."""
        link = self.listener.try_accept()
        if link is not None:
            self._admit(link)
        return link is not None

    def _admit(self, link: Link) -> None:
        strangers = isinstance(link, MicroLink)
        self.counts["connections_accepted"] += not strangers
        conn = self._reception.admit(link, not strangers and self.connections >= self.options.max_connections)
        if conn is None:
            return
        if strangers:
            self._strangers = conn
        if self.stopping:
            conn.core.goodbye()
        if not conn.excess:
            self._connections.add(conn)
        self._returned.append(conn)

    def _stir(self, conn: ServerConnection) -> None:
        """Something comes on a connection that nobody attends; or goes, where it was blocked."""
        if conn.spoken:  # who takes a long message, or sends one, is not silent for as long as that takes
            conn.active = time.monotonic()
        with conn.mutex:
            ours = conn.spoken and not conn.envelope
            alone = ours and not conn.core.calls and not conn.blocked and not conn.lost
        if self._threads and alone and self.crew.spare > 0:
            self._watch.drop(conn)
            self._attendance.attend(conn)
        else:
            self._returned.append(conn)

    def _settle(self) -> None:
        """Connections that nobody attends: hear what is there, send what can be sent, and watch them."""
        for _ in range(len(self._returned)):
            conn = self._returned.popleft()
            if conn.attendant is not None:
                continue  # it will be returned again
            if not conn.lost:
                try:
                    self._settle_one(conn)
                except BROKEN as error:
                    self.lose(conn, error)
            if conn.lost:
                self._bury(conn)
        if self._graves:  # one at a time, as they come
            conn = self._graves.popleft()
            if conn.attendant is None:
                self._bury(conn)

    def _settle_one(self, conn: ServerConnection) -> None:
        if not conn.spoken and not self._reception.recognised(conn):
            if not conn.lost:
                self._watch.put(conn, conn.link.arm(Want.RECV))
                if self._reception.recognised(conn):
                    self._returned.append(conn)
            return
        if not conn.blocked:
            self._hear(conn)
        with conn.mutex:
            before, conn.blocked = conn.blocked, not conn.try_flush()
            want = Want.RECV | Want.SEND if conn.blocked else Want.RECV
            flooding = conn.flooding
            if conn.overfull() or flooding:
                want = Want.SEND
            if conn.core.next_deadline is not None:
                self._timed.add(conn)
            if flooding:
                conn.core.refused = 0
            self._watch.put(conn, Wait((), PAUSE) if flooding and not conn.blocked else conn.link.arm(want))
        again = bool(want & Want.RECV) and (self._hear(conn) or self._look(conn))
        with (
            conn.mutex
        ):  # once more after it was told that we are about to sleep: room may have come, or been heard of just now
            stuck = conn.blocked
            if stuck and conn.try_flush():
                conn.blocked, again = False, True
        if (before or stuck) and not conn.blocked:
            self._roomy(conn)
        if again:
            self._returned.append(conn)

    def _roomy(self, conn: ServerConnection) -> None:
        with conn.mutex:
            calls = list(conn.core.calls.values())
        for call in calls:
            call.changed()

    def _hear(self, conn: ServerConnection) -> bool:
        """Take what is there. True if there was anything."""
        for taken in range(256):
            frame = conn.link.try_recv()
            if frame is None:
                return taken > 0
            self.received(conn, frame)
            if conn.flooding:
                break
        return True

    def _look(self, conn: ServerConnection) -> bool:
        """A loop with one client looks for its next call a little longer, where that has paid; else it would be woken for it."""
        if self._threads or len(self._connections) > 1 or conn.spin is None:
            return False
        frame = conn.spin()
        if frame is not None:
            self.received(conn, frame)
        return frame is not None

    def received(self, conn: ServerConnection, frame: bytes) -> None:
        """By the state machine. Raises ProtocolError."""
        self.counts["messages_received"] += 1
        conn.active = now = time.monotonic()
        with conn.mutex:
            happened = conn.core.receive(frame, now)
            if conn.core.next_deadline is not None:
                self._timed.add(conn)
        for each in happened:
            if isinstance(each, Started):
                self.start(conn, each.call)
            elif isinstance(each, Changed):
                each.call.changed()
            else:
                self._discovered(conn, each)
        self.flush(conn)

    def _discovered(self, conn: ServerConnection, asked: events.Discover) -> None:
        targets = sorted(self.services.fingerprints()) if asked.targets else None
        types = self.services.message_types() if asked.types else None
        with conn.mutex:
            conn.core.say(events.Discovered(asked.id, targets, types))

    def flush(self, conn: ServerConnection) -> None:
        """Send what can be sent; the rest goes out when there is room. From any thread."""
        try:
            with conn.mutex:
                freed = conn.core.freed
                if freed:
                    conn.core.freed = []
                idle = conn.lost or (not conn.core.outbox and not conn.blocked and conn.link.try_flush())
                before, conn.blocked = conn.blocked, not idle and not conn.try_flush()
                stuck = conn.blocked and not before and conn.attendant is None
        except BROKEN as error:
            self.lose(conn, error)
            return
        for call in freed:
            call.changed()
        if stuck:
            self.returned(conn)
        if before and not conn.blocked:
            self._roomy(conn)

    def _chores(self) -> float | None:
        """What is due: calls whose deadline has passed, workers that are held up. Returns when to look again."""
        now = time.monotonic()
        dues: list[float] = []
        for conn in tuple(self._timed):
            with conn.mutex:
                expired = conn.core.expire(now)
                due = conn.core.next_deadline
                if due is None:
                    self._timed.discard(conn)
                else:
                    dues.append(due)
            for call in expired:
                call.changed()
            if expired:
                self.flush(conn)
        if self._attendance.busy:
            self._attendance.relieve()
            dues.append(now + TICK)
        return min([*dues, *self._reception.chores(now)], default=None)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def start(self, conn: ServerConnection, call: ServerCall, *, elsewhere: bool = False) -> events.Failure | None:
        """Give it to its handler. Returns why not, where its caller has been told. `elsewhere`: not on the watcher's thread."""
        exposed = self.services.find(call.target, call.method)
        if exposed is None:
            refusal = self._unknown(call)
        elif conn.envelope and (why := unfit(self, call, exposed)) is not None:
            refusal = events.Failure(call.id, *why)
        elif not self.count_up(self.options.max_concurrent):
            self.counts["backpressure_rejections"] += 1
            refusal = events.Failure(call.id, "TARGET_BUSY", f"{self._in_flight} calls are under way")
        else:
            if call.oneway:
                with conn.mutex:
                    conn.core.accept(call)
            self._begin(Job(self, conn, call, exposed), exposed, elsewhere)
            return None
        with conn.mutex:
            conn.core.fail(call, refusal)
            conn.core.finish(call)
        return refusal

    def subscribed(self, type: str) -> bool:
        """Somebody has asked for pushes of this type."""
        return any(type in conn.core.subscribed for conn in tuple(self._connections))

    @property
    def connections(self) -> int:
        return len(self._connections) - (self._strangers in self._connections)

    def _begin(self, job: Job, exposed: Exposed, elsewhere: bool) -> None:
        if exposed.method.coroutine or (self.awaited and not exposed.open):
            assert self.loop is not None
            loop = self.loop()
            if self._threads or elsewhere:
                loop.call_soon_threadsafe(job.begin, loop)
            else:
                job.begin(loop)
        elif exposed.method.options.inline and (not self._threads or job.conn.envelope):
            job.run()
        else:
            self.crew.submit(job.run)

    def _unknown(self, call: ServerCall) -> events.Failure:
        if call.target not in self.services.contracts:
            return events.Failure(call.id, "UNKNOWN_TARGET", f"nothing is exposed as {call.target!r}")
        return events.Failure(call.id, "UNKNOWN_METHOD", f"{call.target!r} has no method {call.method!r}")

    def finished(self, job: Job) -> None:
        """A call is over."""
        job.conn.active = time.monotonic()
        self.flush(job.conn)
        self.count_down()

    def count_up(self, limit: int | None = None) -> bool:
        """One more call is under way. False: that would be more than `limit`."""
        with self._mutex:
            if limit is not None and self._in_flight >= limit:
                return False
            self._in_flight += 1
            return True

    def count_down(self) -> None:
        with self._mutex:
            self._in_flight -= 1
            self.counts["calls"] += 1
            last = self.stopping and not self._in_flight
        if last and self.on_drained is not None:
            self.on_drained()

    @property
    def crowded(self) -> bool:
        """So many calls are under way that each has to be counted."""
        return self._in_flight + self.options.workers > self.options.max_concurrent

    def failed(self, context: CallContext, error: BaseException) -> None:
        """A handler raised: the caller is told the type and the text; here it is logged whole."""
        self.counts["errors"] += 1
        _log.warning("%s: %s.%s raised", self.url, context.target, context.method, exc_info=error)

    def broadcast(self, type: str, value: Any) -> int:
        if type not in self.services.pushed:
            self.services.register(type)
        bodies: dict[str, bytes] = {}
        reached = 0
        for conn in tuple(self._connections):
            form = conn.core.dialect.push_format
            if form not in bodies:
                bodies[form] = self._pushable(form, value)
            with conn.mutex:
                full = conn.overfull() and not conn.lost
                dropped = full and conn.core.miss(type)
                sent = not conn.lost and not full and conn.core.push(type, bodies[form])
            if sent:
                reached += 1
                self.flush(conn)
                if not conn.blocked:
                    conn.active = time.monotonic()
            elif dropped:
                self.counts["pushes_dropped"] += 1
        self.counts["pushes"] += reached
        return reached

    def _pushable(self, form: str, value: Any) -> bytes:
        try:
            return msgspec.json.encode(value) if form == "json" else msgspec.msgpack.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise unwritable(error, self.url, "broadcast") from error

    # -- ends ----------------------------------------------------------------------------------------------------------

    def failing(self, error: Exception) -> None:
        """The watcher can go on no more: the server ends, rather than that it seems to be there."""
        _log.critical("%s: the server ends, by an error that it cannot serve on after", self.url, exc_info=error)

    def lose(self, conn: ServerConnection, error: errors.IpcError) -> None:
        """This connection is over: its calls are cancelled. From any thread; the watcher closes the link."""
        with conn.mutex:
            if conn.lost:
                return
            conn.lost = True
            if conn.envelope and isinstance(error, errors.ProtocolError):
                farewell(conn, error)
            cancelled = conn.core.lost()
        if isinstance(error, errors.ProtocolError):
            self.counts["protocol_errors"] += 1
            self._complaints.about(error)
        else:
            _log.debug("%s: lost a client: %s", self.url, error.message)
        for call in cancelled:
            call.changed()
        self.returned(conn)

    def _bury(self, conn: ServerConnection) -> None:
        self._connections.discard(conn)
        self._timed.discard(conn)
        self._watch.drop(conn)
        conn.close()

    def stats(self) -> Mapping[str, int]:
        quick = self._attendance.calls
        return statistics(
            {
                **self.counts,
                "calls": self.counts["calls"] + quick,
                "messages_received": self.counts["messages_received"] + quick,
                "errors": self.counts["errors"] + self.counts["protocol_errors"],
                "connections_active": self.connections,
                "in_flight": self.in_flight,
            }
        )

    @property
    def in_flight(self) -> int:
        return self._in_flight + self._attendance.in_flight()

    def stop(self) -> int:
        """Take no new connections and no new calls. Returns how many are under way."""
        self.stopping = True
        if isinstance(self.listener, Attached):
            self.listener.withdraw()
        for conn in tuple(self._connections):
            with conn.mutex:
                conn.core.goodbye()
        under_way = self.in_flight  # SYNC POINT: last call
        for conn in tuple(self._connections):
            self.flush(conn)
        self.wake()
        return under_way

    def drained(self) -> bool:
        return not self.in_flight and not (isinstance(self.listener, Attached) and not self.listener.settled)

    def settled(self) -> None:
        """No more calls will come, those are counted that have."""
        if self.on_drained is not None and not self.in_flight:
            self.on_drained()

    def abort(self) -> int:
        """Cut off what is still under way. Returns how many."""
        left = self.in_flight
        for conn in tuple(self._connections):
            with conn.mutex:
                cancelled = conn.core.abort()
            for call in cancelled:
                call.changed()
            self.flush(conn)
        return left

    def close(self) -> None:
        """Immediate, but for what the watcher is at: it ends, and `release` follows."""
        self.stopping = True
        self.closed = True
        self.wake()

    def release(self) -> None:
        """After the watcher has ended: nobody is using the listener, and no link but those that workers attend."""
        with self._mutex:
            self._released = True
            self._watch.close()
        self.listener.close()
        for conn in {*self._connections, *self._reception.waiting(), *self._graves}:
            with conn.mutex:
                conn.lost = True
                cancelled = conn.core.lost("shutdown")
                conn.gate.close()
                if self._attendance.leave(conn):
                    conn.close()
            for call in cancelled:
                call.changed()
        self._connections.clear()

    def abandon(self) -> None:
        """In a forked child."""
        for part in (self.listener, *(conn.link for conn in (*self._connections, *self._reception.waiting()))):
            if isinstance(part, Abandoning):
                part.abandon()
