"""Workers: threads that receive from a connection, and run its short calls themselves.

A worker *attends* one connection: it blocks in the link's own receive, runs the method, sends the answer; a call costs no
change of threads. Nobody is blocked by a method that turns out to be long: the watcher looks at the workers every few
milliseconds and takes the connection over from one that is still in the same call. That method runs on threads of its own
from then on, until it has been short for a while (ADR 17). A frame that is anything but a plain call goes to the state machine.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import errors
from .._spi import Link, Steps, Want
from .._wait import Lane, run
from . import events, failures
from ._connection import BROKEN
from ._exposed import Exposed
from ._servercore import ServerCall
from ._session import ServerConnection
from .context import CallContext, here, overdue
from .dialects import CALL, HEAD, MAGIC, RESULT, Native

if TYPE_CHECKING:
    from ._engine import Engine

_log = logging.getLogger("ipckit")

#: How often the watcher looks whether a worker is still in the same call, in seconds.
TICK = 0.005
#: How long a worker waits for the next call on its connection before it gives the connection back, in seconds.
_LINGER = 0.064


class Worker:
    """A thread of the crew while it attends a connection. `frame` is the call that it is in, for the watcher to see.

    `holding`: it has received something. Set before it looks whether the server still takes calls: who stops a server says
    first that it takes none, and then counts (SYNC POINT: last call).
    """

    __slots__ = ("began", "conn", "exposed", "frame", "holding", "seen", "taken")

    def __init__(self, conn: ServerConnection) -> None:
        self.conn = conn
        self.frame: bytes | None = None
        self.seen: bytes | None = None
        self.taken: ServerCall | None = None
        self.exposed: Exposed | None = None
        self.began = 0.0
        self.holding = False

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


class Attendance:
    """The workers of a server."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._mutex = threading.Lock()
        self._workers: set[Worker] = set()
        self.calls = 0  # that were made here

    @property
    def busy(self) -> bool:
        return bool(self._workers)

    def in_flight(self) -> int:
        with self._mutex:
            return sum(worker.holding for worker in self._workers)

    def attend(self, conn: ServerConnection) -> None:
        """From now on a worker does."""
        worker = Worker(conn)
        conn.attendant = worker
        with self._mutex:
            self._workers.add(worker)
        self._engine.crew.submit(lambda: self._attend(worker))

    def relieve(self) -> None:
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
                worker.taken = conn.core.adopt(event, worker.began or time.monotonic())
                conn.attendant = None
            if worker.exposed is not None:
                worker.exposed.overstayed()
            self._engine.count_up()
            with self._mutex:
                self._workers.discard(worker)
            self._engine.returned(conn)

    def leave(self, conn: ServerConnection) -> bool:
        """The server has ended; with the connection's mutex held. False: a worker is receiving, and closes the link itself."""
        worker = conn.attendant
        if worker is not None and worker.frame is not None:
            self._engine.count_up()
            conn.attendant = None
        return conn.attendant is None or conn.fused is not None  # a fused link wakes who is in it

    def _attend(self, worker: Worker) -> None:
        """On a thread of the crew: receive, and run what is short."""
        conn, engine = worker.conn, self._engine
        here.context = worker.context
        try:
            self._attending(worker, conn)
        except BROKEN as error:
            engine.lose(conn, error)
        except struct.error as error:
            engine.lose(conn, errors.ProtocolError(f"this is no frame of ours: {error}", url=engine.url))
        except Exception as error:  # ours: nothing of the user's gets here
            _log.exception("%s: a connection met an error of the library", engine.url)
            engine.lose(conn, errors.ProtocolError(str(error), url=engine.url))
        finally:
            here.context = None
            with self._mutex:
                self._workers.discard(worker)
            with conn.mutex:
                mine = conn.attendant is worker
                if mine:
                    conn.attendant = None
                    if engine.closed:
                        conn.close()
            if mine:
                engine.returned(conn)

    def _attending(self, worker: Worker, conn: ServerConnection) -> None:
        engine, core, mutex = self._engine, conn.core, conn.mutex
        recv = self._receiver(conn)
        pack, unpack, start = HEAD.pack, HEAD.unpack_from, HEAD.size
        plain = self._plain(conn)
        while not (core.calls or conn.blocked or conn.lost or engine.stopping):
            frame = recv()
            if frame is None:
                return
            worker.holding = True  # SYNC POINT: last call
            exposed = None
            if plain:
                magic, kind, length, id, ttl = unpack(frame)
                if kind == CALL and magic == MAGIC and id:
                    exposed = engine.services.table.get(frame[start : start + length])
            if exposed is None or not exposed.quick or core.leaving or engine.crowded:
                engine.received(conn, frame)
                worker.holding = False
                plain = self._plain(conn)
                if conn.flooding:
                    return
                continue
            worker.began = time.monotonic() if ttl else 0.0
            worker.exposed = exposed
            worker.frame = frame
            try:
                answer = pack(MAGIC, RESULT, 0, id, 0) + exposed.wire.encode(
                    exposed.function(*exposed.wire.decode_args(frame[start + length :]))
                )
                if ttl and time.monotonic() >= worker.began + ttl / 1000:
                    answer = self._failed(id, exposed, overdue())
            except BaseException as error:
                answer = self._failed(id, exposed, error)
            with mutex:
                worker.frame = None
                worker.holding = False
                mine = conn.attendant is worker
                if mine:
                    self.calls += 1
                    conn.answer(answer)
            if not mine:
                self._late(worker, conn, answer)
                return

    def _plain(self, conn: ServerConnection) -> bool:
        """Its calls can be read here, and nobody wants to see them first."""
        engine = self._engine
        return type(conn.core.dialect) is Native and not engine.interceptors and not engine.options.requests_per_second

    def _failed(self, id: int, exposed: Exposed, error: BaseException) -> bytes:
        trace = error.__traceback__
        ours = isinstance(error, TypeError | ValueError | OverflowError | RecursionError)
        if ours and not isinstance(error, errors.IpcError) and trace is not None and trace.tb_next is None:
            error = errors.CodecError(f"the result cannot be sent: {error}")  # no frame of the handler's: the encoder
        failure = failures.failure_of(id, error, self._engine.tracebacks)
        if failure.code == "REMOTE_ERROR":
            self._engine.failed(CallContext(exposed.target, exposed.method.name), error)
        return Native().encode(failure)[0]

    def _late(self, worker: Worker, conn: ServerConnection, answer: bytes) -> None:
        """The connection was taken over while this call ran: its answer goes the long way."""
        call = worker.taken
        with conn.mutex:
            if call is not None:
                if not call.done:
                    conn.core.outbox.append(answer)
                conn.core.finish(call)
        self._engine.flush(conn)
        self._engine.count_down()

    def _receiver(self, conn: ServerConnection) -> Callable[[], bytes | None]:
        fused, look = conn.fused, conn.link.try_recv
        if self._engine.crew.spare < self._engine.crew.size // 4:
            return look
        lane = Lane(conn.gate, "serve")

        def blocking() -> bytes | None:
            try:
                return fused.recv(_LINGER) if fused is not None else look() or run(_next(conn.link), lane, _LINGER)
            except errors.Timeout:
                return None

        return blocking


def _next(link: Link) -> Steps[bytes]:
    while True:
        wait = link.arm(Want.RECV)
        if (frame := link.try_recv()) is not None:
            return frame
        yield wait
