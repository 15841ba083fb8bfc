"""The server without its shells: connections, who receives from them, and where handlers run.

One *watcher* sleeps on the listener and on every connection that nobody attends. In a server of threads, a connection on
which something comes is given to a worker, which *attends* it: it blocks in the link's own receive, and runs short methods
itself, so that a call costs no change of threads. Nobody is blocked by a handler that turns out to be long: the watcher
looks at the workers every few milliseconds, takes the connection over from one that is still in the same call, and the
method is run on threads of its own from then on, until it has been short for a while (ADR 21). On an event loop the watcher
is a task that receives for everybody.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from .. import errors
from .._linkwatch import Watch
from .._spi import Abandoning, Fused, Link, Listener, Steps, Wait, Want
from .._url import Url
from . import events, failures
from ._connection import BROKEN
from ._crew import Crew
from ._serving import Exposed, Job
from .context import CallContext, here
from .contract import Contract, Service, contract_of, rpc
from .dialects import CALL, HEAD, MAGIC, RESULT, Dialect, Native
from .protocol import Changed, ServerCall, ServerCore, Started

_log = logging.getLogger("ipckit")
_DOOR = "door"

#: How often the watcher looks whether a worker is still in the same call, in seconds.
_TICK = 0.005
#: How long a worker waits for the next call on its connection before it gives the connection back, in seconds.
_LINGER = 0.064
#: Bytes of answers that may wait for a client that does not read; beyond them it is not heard either.
_BACKLOG = 4 << 20


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How a server serves.

    Attributes:
        workers: threads for handlers that are functions.
        max_connections: more are told that it is full, and closed.
        max_concurrent: calls under way in all; more are refused with TargetBusy.
        max_per_connection: the same, for each client.
        tracebacks: callers are sent the traceback of what a handler raised.
    """

    workers: int = 64
    max_connections: int = 10_000
    max_concurrent: int = 10_000
    max_per_connection: int = 1000
    tracebacks: bool = False


@dataclass(frozen=True, slots=True)
class ShutdownReport:
    """How a server ended: calls under way when it began to, those that were finished, those that were cut off."""

    in_flight_at_start: int
    drained_gracefully: int
    forced_closed: int


class ServerConnection:
    """One client. `mutex` guards the core, its outbox, and who attends it."""

    def __init__(self, link: Link, core: ServerCore) -> None:
        self.link = link
        self.core = core
        self.mutex = threading.Lock()
        self.fused: Fused | None = link if isinstance(link, Fused) else None
        self.attendant: Worker | None = None
        self.watched = False
        self.blocked = False  # something waits to be sent
        self.lost = False
        self.since = time.monotonic()

    def roomy(self, call: ServerCall) -> bool:
        """A producer may go on."""
        return (call.credit > 0 and not self.blocked) or call.done

    def try_flush(self) -> bool:
        """Send what the core has to say, with the mutex held."""
        outbox = self.core.outbox
        while outbox:
            if not self.link.try_send(outbox[0]):
                return False
            outbox.popleft()
        return self.link.try_flush()


class Worker:
    """A thread of the crew while it attends a connection. `frame` is the call that it is in, for the watcher to see."""

    __slots__ = ("began", "conn", "exposed", "frame", "seen", "taken")

    def __init__(self, conn: ServerConnection) -> None:
        self.conn = conn
        self.frame: bytes | None = None
        self.seen: bytes | None = None
        self.taken: ServerCall | None = None
        self.exposed: Exposed | None = None
        self.began = 0.0

    def context(self) -> CallContext | None:
        """What `current()` answers in a handler that runs here."""
        frame, exposed = self.frame, self.exposed
        if frame is None or exposed is None:
            return None
        ttl = HEAD.unpack_from(frame)[4]
        return CallContext(
            exposed.target,
            exposed.method.name,
            {},
            self.began + ttl / 1000 if ttl else None,
            self.conn.link.peer,
            lambda: None if self.taken is None else self.taken.cancelled,
        )


class _BuiltIn(Service):
    """The target `ipckit`: what the server says about itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @rpc(idempotent=True, inline=True)
    def describe(self, target: str) -> dict[str, Any]:
        """The contract of a target. Raises UnknownTarget."""
        found = self._engine.services.get(target)
        if found is None:
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}")
        return found.describe()

    @rpc(idempotent=True, inline=True)
    def targets(self) -> dict[str, str]:
        """What is exposed, with the fingerprints of the contracts."""
        return self._engine.fingerprints()


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
        self.tracebacks = options.tracebacks
        self.crew = Crew(options.workers, f"ipckit-{url.scheme}-server")
        self.loop: Callable[[], asyncio.AbstractEventLoop] | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.services: dict[str, Contract] = {}
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.stopping = False
        self._threads = threads
        self._dialect = dialect
        self._table: dict[bytes, Exposed] = {}
        self._connections: set[ServerConnection] = set()
        self._workers: set[Worker] = set()
        self._returned: deque[ServerConnection] = deque()  # to be watched, or flushed
        self._timed: set[ServerConnection] = set()
        self._mutex = threading.Lock()
        self._in_flight = 0
        self._quick_calls = 0
        self._watch = Watch()
        self._door_armed = False
        self.on_drained: Callable[[], None] | None = None
        self._closed = False
        self.expose("ipckit", _BuiltIn(self))

    @property
    def native(self) -> Any:
        return self.listener.native

    # -- services ------------------------------------------------------------------------------------------------------

    def expose(self, target: str, service: Any) -> None:
        contract = contract_of(service)
        table = {}
        for name, method in (*contract.messages.items(), *contract.methods.items()):
            function = service if callable(service) and not isinstance(service, type) else getattr(service, method.name)
            table[f"{target}.{name}".encode()] = Exposed(target, contract, method, function)
        self._table = {**{key: each for key, each in self._table.items() if each.target != target}, **table}
        self.services = {**self.services, target: contract}

    def hide(self, target: str) -> None:
        if target not in self.services or target == "ipckit":
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}", url=self.url, operation="hide")
        self._table = {key: each for key, each in self._table.items() if each.target != target}
        self.services = {name: each for name, each in self.services.items() if name != target}

    def fingerprints(self) -> dict[str, str]:
        return {name: each.fingerprint for name, each in self.services.items() if name != "ipckit"}

    def types(self) -> list[str]:
        """The message types that something answers to."""
        return sorted({name for contract in self.services.values() for name in contract.messages})

    # -- the watcher ---------------------------------------------------------------------------------------------------

    def watching(self) -> Steps[None]:
        """Until the engine is closed."""
        while not self._closed:
            self._open_door()
            for key in self._watch.ready():
                if isinstance(key, ServerConnection):
                    self._stir(key)
                else:
                    self._door_armed = False
            self._settle()
            until = self._chores()
            wait = self._watch.sleep(until)
            if self._returned or not self._door_armed or self._closed:
                continue
            yield wait

    def wake(self) -> None:
        self._watch.ring()

    def _open_door(self) -> None:
        if self.stopping:
            return
        for _ in range(2):  # once more after it was told that we are about to sleep
            while (link := self.listener.try_accept()) is not None:
                self._admit(link)
            if self._door_armed:
                return
            self._watch.put(_DOOR, self.listener.arm(Want.RECV))
            self._door_armed = True

    def _admit(self, link: Link) -> None:
        core = ServerCore(self._dialect(), targets=self.fingerprints, max_calls=self.options.max_per_connection)
        conn = ServerConnection(link, core)
        self.counts["connections_accepted"] += 1
        if len(self._connections) >= self.options.max_connections:
            limit = self.options.max_connections
            core.say(events.Failure(0, "TARGET_BUSY", f"the server has {limit} connections already"))
            with suppress(*BROKEN):
                conn.try_flush()
            link.close()
            return
        self._connections.add(conn)
        self._returned.append(conn)

    def _stir(self, conn: ServerConnection) -> None:
        """Something comes on a connection that nobody attends."""
        if conn.lost:
            return
        with conn.mutex:
            alone = not conn.core.calls and not conn.blocked
        if self._threads and alone and self.crew.spare > 0:
            self._watch.drop(conn)
            conn.watched = False
            self._attend_from(conn)
        else:
            self._returned.append(conn)

    def _attend_from(self, conn: ServerConnection) -> None:
        worker = Worker(conn)
        conn.attendant = worker
        with self._mutex:
            self._workers.add(worker)
        self.crew.submit(lambda: self._attend(worker))

    def _settle(self) -> None:
        """Connections that nobody attends: flush, hear what is there, and watch them."""
        for _ in range(len(self._returned)):
            conn = self._returned.popleft()
            if conn.lost or conn.attendant is not None:
                continue
            try:
                self._hear(conn)
                with conn.mutex:
                    drained = conn.try_flush()
                    freed, conn.blocked = conn.blocked and drained, not drained
                    if conn.attendant is None:
                        want = Want.RECV if drained else Want.RECV | Want.SEND
                        if len(conn.core.outbox) and sum(map(len, conn.core.outbox)) > _BACKLOG:
                            want = Want.SEND
                        self._watch.put(conn, conn.link.arm(want))
                        conn.watched = True
                if freed:
                    self._roomy(conn)
                if self._hear(conn):
                    self._returned.append(conn)
            except BROKEN as error:
                self.lose(conn, error)

    def _roomy(self, conn: ServerConnection) -> None:
        with conn.mutex:
            calls = list(conn.core.calls.values())
        for call in calls:
            call.changed()

    def _hear(self, conn: ServerConnection) -> bool:
        """Take what is there. True if there was anything."""
        heard = False
        for _ in range(256):
            frame = conn.link.try_recv()
            if frame is None:
                break
            heard = True
            self._received(conn, frame)
        return heard

    def _received(self, conn: ServerConnection, frame: bytes) -> None:
        """By the state machine."""
        self.counts["messages_received"] += 1
        with conn.mutex:
            happened = conn.core.receive(frame, time.monotonic())
            if conn.core.next_deadline is not None:
                self._timed.add(conn)
        for each in happened:
            if isinstance(each, Started):
                self._start(conn, each.call)
            elif isinstance(each, Changed):
                each.call.changed()
            else:
                self._discovered(conn, each)
        self.flush(conn)

    def _discovered(self, conn: ServerConnection, asked: events.Discover) -> None:
        targets = sorted(self.fingerprints()) if asked.targets else None
        with conn.mutex:
            conn.core.say(events.Discovered(asked.id, targets, self.types() if asked.types else None))

    def flush(self, conn: ServerConnection) -> None:
        """Send what can be sent; the rest goes out when there is room."""
        try:
            with conn.mutex:
                if not conn.core.outbox and not conn.blocked:
                    return
                before, conn.blocked = conn.blocked, not conn.try_flush()
                stuck = conn.blocked and conn.attendant is None
                freed = before and not conn.blocked
        except BROKEN as error:
            self.lose(conn, error)
            return
        if stuck:
            self._returned.append(conn)
            self.wake()
        if freed:
            self._roomy(conn)

    def _chores(self) -> float | None:
        """What is due: calls whose deadline has passed, workers that are held up. Returns when to look again."""
        now = time.monotonic()
        until: float | None = None
        for conn in tuple(self._timed):
            with conn.mutex:
                expired = conn.core.expire(now)
                due = conn.core.next_deadline
                if due is None:
                    self._timed.discard(conn)
            for call in expired:
                call.changed()
            if expired:
                self.flush(conn)
            if due is not None:
                until = due if until is None else min(until, due)
        if self._workers:
            self._relieve()
            until = now + _TICK if until is None else min(until, now + _TICK)
        return until

    def _relieve(self) -> None:
        """Take connections over from workers that are still in the call that they were in a tick ago."""
        with self._mutex:
            workers = tuple(self._workers)
        for worker in workers:
            frame = worker.frame
            if frame is None or frame is not worker.seen:
                worker.seen = frame
                continue
            conn = worker.conn
            with conn.mutex:
                if conn.attendant is not worker or worker.frame is not frame:
                    continue
                event = conn.core.dialect.decode(frame)[0]
                assert isinstance(event, events.Call)
                worker.taken = conn.core.begin(event, worker.began or time.monotonic())
                conn.attendant = None
                if conn.core.next_deadline is not None:
                    self._timed.add(conn)
            if worker.exposed is not None:
                worker.exposed.overstayed()
            with self._mutex:
                self._workers.discard(worker)
                self._in_flight += 1
            self._returned.append(conn)

    # -- a worker and its connection -----------------------------------------------------------------------------------

    def _attend(self, worker: Worker) -> None:
        """On a thread of the crew: receive, and run what is short."""
        conn = worker.conn
        here.context = worker.context
        try:
            self._attending(worker, conn)
        except BROKEN as error:
            self.lose(conn, error)
        except struct.error as error:
            self.lose(conn, errors.ProtocolError(f"this is no frame of ours: {error}", url=self.url))
        except Exception as error:  # ours: nothing of the user's gets here
            _log.exception("%s: a connection met an error of the library", self.url)
            self.lose(conn, errors.ProtocolError(str(error), url=self.url))
        finally:
            here.context = None
            with self._mutex:
                self._workers.discard(worker)
            with conn.mutex:
                mine = conn.attendant is worker
                if mine:
                    conn.attendant = None
            if mine and not conn.lost:
                self._returned.append(conn)
            self.wake()

    def _attending(self, worker: Worker, conn: ServerConnection) -> None:
        core, link, mutex = conn.core, conn.link, conn.mutex
        recv = self._receiver(conn)
        native = type(core.dialect) is Native and not self.interceptors
        pack, unpack, start = HEAD.pack, HEAD.unpack_from, HEAD.size
        while not core.calls and not conn.blocked and not self.stopping:
            frame = recv()
            if frame is None:
                return
            exposed = None
            if native:
                magic, kind, length, id, ttl = unpack(frame)
                if kind == CALL and magic == MAGIC and id:
                    exposed = self._table.get(frame[start : start + length])
            if exposed is None or not exposed.quick or id in core.calls or core.leaving:
                self._received(conn, frame)
                continue
            if ttl:
                worker.began = time.monotonic()
            worker.exposed = exposed
            worker.frame = frame
            try:
                answer = pack(MAGIC, RESULT, 0, id, 0) + exposed.wire.encode(
                    exposed.function(*exposed.wire.decode_args(frame[start + length :]))
                )
            except BaseException as error:
                answer = self._failed_quickly(id, exposed, error)
            with mutex:
                worker.frame = None
                mine = conn.attendant is worker
                if mine:
                    self._quick_calls += 1
                    if core.outbox or not link.try_send(answer):
                        core.outbox.append(answer)
                        conn.blocked = True
                    elif not link.try_flush():
                        conn.blocked = True
            if not mine:
                self._late(worker, conn, answer)
                return

    def _failed_quickly(self, id: int, exposed: Exposed, error: BaseException) -> bytes:
        if (
            isinstance(error, TypeError | ValueError | OverflowError | RecursionError)
            and error.__traceback__ is not None
        ):
            inside = error.__traceback__.tb_next
            if inside is None and not isinstance(error, errors.IpcError):  # of the encoder, or of the call itself
                error = errors.CodecError(f"the result cannot be sent: {error}")
        failure = failures.failure_of(id, error, self.tracebacks)
        if failure.code == "REMOTE_ERROR":
            self.failed(CallContext(exposed.target, exposed.method.name), error)
        return Native().encode(failure)[0]

    def _late(self, worker: Worker, conn: ServerConnection, answer: bytes) -> None:
        """The connection was taken over while this call ran: its answer goes the long way."""
        call = worker.taken
        with conn.mutex:
            if call is not None:
                if not call.done:
                    conn.core.outbox.append(answer)
                conn.core.finish(call)
        self.flush(conn)
        self._count_down()

    def _receiver(self, conn: ServerConnection) -> Callable[[], bytes | None]:
        fused = conn.fused
        if fused is None or self.crew.spare < self.crew.size // 4:
            return conn.link.try_recv
        receive = fused.recv

        def blocking() -> bytes | None:
            try:
                return receive(_LINGER)
            except errors.Timeout:
                return None

        return blocking

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _start(self, conn: ServerConnection, call: ServerCall) -> None:
        exposed = self._table.get(f"{call.target}.{call.method}".encode())
        refusal: events.Failure | None = None
        if exposed is None:
            refusal = self._unknown(call)
        else:
            with self._mutex:
                if self._in_flight >= self.options.max_concurrent:
                    refusal = events.Failure(call.id, "TARGET_BUSY", f"{self._in_flight} calls are under way")
                else:
                    self._in_flight += 1
        if exposed is None or refusal is not None:
            with conn.mutex:
                if refusal is not None:
                    conn.core.fail(call, refusal)
                conn.core.finish(call)
            return
        job = Job(self, conn, call, exposed)
        if exposed.method.coroutine:
            assert self.loop is not None
            loop = self.loop()
            if self._threads:
                loop.call_soon_threadsafe(job.begin, loop)
            else:
                job.begin(loop)
        elif exposed.method.options.inline and not self._threads:
            job.run()
        else:
            self.crew.submit(job.run)

    def _unknown(self, call: ServerCall) -> events.Failure:
        if call.target not in self.services:
            return events.Failure(call.id, "UNKNOWN_TARGET", f"nothing is exposed as {call.target!r}")
        return events.Failure(call.id, "UNKNOWN_METHOD", f"{call.target!r} has no method {call.method!r}")

    def finished(self, job: Job) -> None:
        """A call is over."""
        self.flush(job.conn)
        self._count_down()
        if job.conn.attendant is None and not job.conn.core.calls:  # it may be attended again
            self.wake()

    def _count_down(self) -> None:
        with self._mutex:
            self._in_flight -= 1
            self.counts["calls"] += 1
            last = self.stopping and not self._in_flight
        if last and self.on_drained is not None:
            self.on_drained()

    def failed(self, context: CallContext, error: BaseException) -> None:
        """A handler raised: the caller is told the type and the text; here it is logged whole."""
        self.counts["errors"] += 1
        _log.warning("%s: %s.%s raised", self.url, context.target, context.method, exc_info=error)

    def broadcast(self, type: str, value: Any) -> int:
        bodies: dict[str, bytes] = {}
        reached = 0
        for conn in tuple(self._connections):
            form = conn.core.dialect.format
            if form not in bodies:
                bodies[form] = (msgspec.json if form == "json" else msgspec.msgpack).encode(value)
            with conn.mutex:
                full = conn.blocked and sum(map(len, conn.core.outbox)) > _BACKLOG
                sent = not conn.lost and not full and conn.core.push(type, bodies[form])
            if sent:
                reached += 1
                self.flush(conn)
            elif full:
                self.counts["pushes_dropped"] += 1
        self.counts["pushes"] += reached
        return reached

    # -- ends ----------------------------------------------------------------------------------------------------------

    def lose(self, conn: ServerConnection, error: errors.IpcError) -> None:
        """This connection is over: its calls are cancelled."""
        with conn.mutex:
            if conn.lost:
                return
            conn.lost = True
            cancelled = conn.core.lost()
        level = logging.WARNING if isinstance(error, errors.ProtocolError) else logging.DEBUG
        _log.log(level, "%s: lost a client: %s", self.url, error.message)
        if isinstance(error, errors.ProtocolError):
            self.counts["protocol_errors"] += 1
        for call in cancelled:
            call.changed()
        self._retire(conn)

    def _retire(self, conn: ServerConnection) -> None:
        self._connections.discard(conn)
        self._timed.discard(conn)
        with self._mutex:
            if not self._closed:
                self._watch.drop(conn)
        conn.link.close()

    def stats(self) -> Mapping[str, int]:
        return {
            **self.counts,
            "calls": self.counts["calls"] + self._quick_calls,
            "messages_received": self.counts["messages_received"] + self._quick_calls,
            "connections_active": len(self._connections),
            "in_flight": self.in_flight,
        }

    @property
    def in_flight(self) -> int:
        with self._mutex:
            return self._in_flight + sum(worker.frame is not None for worker in self._workers)

    def stop(self) -> int:
        """Take no new connections and no new calls. Returns how many are under way."""
        self.stopping = True
        under_way = self.in_flight
        for conn in tuple(self._connections):
            with conn.mutex:
                conn.core.goodbye()
            self.flush(conn)
        self.wake()
        return under_way

    def drained(self) -> bool:
        return not self.in_flight

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
        """Immediate. The watcher ends by itself."""
        self.stopping = True
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        self.listener.close()
        for conn in tuple(self._connections):
            with conn.mutex:
                conn.lost = True
                cancelled = conn.core.lost("shutdown")
            for call in cancelled:
                call.changed()
            conn.link.close()
        self._connections.clear()
        self._watch.ring()

    def release(self) -> None:
        """After the watcher has ended."""
        self._watch.close()

    def abandon(self) -> None:
        """In a forked child."""
        for part in (self.listener, *(conn.link for conn in self._connections)):
            if isinstance(part, Abandoning):
                part.abandon()


_COUNTS = (
    "connections_accepted",
    "messages_received",
    "calls",
    "errors",
    "protocol_errors",
    "pushes",
    "pushes_dropped",
)
__all__ = ["Engine", "ServerOptions", "ShutdownReport", "Wait"]
