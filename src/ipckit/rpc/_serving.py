"""How calls become handlers' work, and what comes of it the way back. For both shells; the engine moves the frames.

A handler runs in one of four ways: a function or a generator on a thread of the crew, a coroutine or an asynchronous
generator as a task. None of them holds a thread while its caller's window is closed, except a function that reads a stream.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import errors
from . import failures
from ._crew import on_crew
from ._exposed import Exposed
from ._foreign import deliver
from ._intercepting import around, awaited, settled
from ._servercore import ServerCall
from ._tracing import surroundings
from .context import CallContext, overdue
from .contract import unwritable

if TYPE_CHECKING:
    from ._engine import Engine
    from ._session import ServerConnection


#: Items of a stream after which a loop looks after the others.
AT_ONCE = 64


class Job:
    """One call and its handler."""

    def __init__(self, engine: Engine, conn: ServerConnection, call: ServerCall, exposed: Exposed) -> None:
        self.engine, self.conn, self.call, self.exposed = engine, conn, call, exposed
        dialect = conn.core.dialect
        self.wire = exposed.method.wire(dialect.format, named=dialect.named)
        self.context = CallContext(
            call.target, exposed.method.name, call.metadata, call.deadline, conn.link.peer, lambda: call.cancelled
        )
        self.surroundings = surroundings(self.context)

    def invoke(self, stream: Any) -> Any:
        args = self.wire.decode_args(self.call.body)
        method = self.exposed.method
        proceed: Callable[[], Any] = lambda: method.invoke(self.exposed.function, args, stream)  # noqa: E731
        if self.exposed.open:
            return proceed()
        if self.engine.awaited:
            proceed = partial(awaited, proceed) if method.coroutine else partial(on_crew, self.engine.crew, proceed)
        return around(self.engine.interceptors, self.context, proceed)()

    def encoded(self, value: Any) -> bytes:
        try:
            return self.wire.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise unwritable(error) from error

    def succeed(self, value: Any) -> None:
        if self.context.remaining == 0.0:  # a result that is too late is none, whatever the handler made of it
            raise overdue()
        body = self.encoded(value)
        if self.call.reply_to:
            body = deliver(self.engine, self.conn, self.call.reply_to, value, body)
        with self.conn.mutex:
            self.conn.core.result(self.call, body)
        self.done()

    def fail(self, error: BaseException) -> None:
        failure = failures.failure_of(self.call.id, error, self.engine.tracebacks)
        if failure.code == "REMOTE_ERROR":
            self.engine.failed(self.context, error)
        with self.conn.mutex:
            self.conn.core.fail(self.call, failure)
        self.done()

    def done(self) -> None:
        with self.conn.mutex:
            self.conn.core.finish(self.call)
        self.engine.finished(self)

    # -- in threads ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """On a thread of the crew."""
        self.surroundings.run(self._run)

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            shape = self.exposed.method.shape
            value = self.invoke(Inputs(self) if shape.streams_in else None)
            if shape.streams_out:
                Production(self, iter(value)).pump()
            else:
                self.succeed(value)
                self.exposed.took(time.perf_counter() - began)
        except BaseException as error:
            self.fail(error)

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the loop's thread."""
        task = loop.create_task(self._task(), context=self.surroundings)
        self.engine.tasks.add(task)
        task.add_done_callback(self.engine.tasks.discard)

        def changed() -> None:
            if self.call.cancelled is not None:
                _soon(loop, task.cancel)

        self.call.watchers.append(changed)
        changed()  # it may have been cancelled on its way to the loop

    async def _task(self) -> None:
        try:
            method = self.exposed.method
            inputs = AsyncInputs if method.coroutine else Inputs
            value = await settled(self.invoke(inputs(self) if method.shape.streams_in else None))
            if not method.shape.streams_out:
                self.succeed(value)
            elif hasattr(value, "__aiter__"):
                await self._stream(value)
            else:
                production = Production(self, iter(value))
                self.surroundings = contextvars.copy_context()  # those of this task are in use
                self.engine.crew.submit(lambda: self.surroundings.run(production.pump))
        except asyncio.CancelledError:
            self.fail(errors.Cancelled("the handler was cancelled"))
        except BaseException as error:
            self.fail(error)

    async def _stream(self, items: Any) -> None:
        try:
            given = 0
            async for value in items:
                given += 1
                if given % AT_ONCE == 0:
                    await asyncio.sleep(0)  # a stream that never waits must not keep the loop from the others
                body = self.encoded(value)
                while not self.conn.roomy(self.call):
                    await self.change(lambda: self.conn.roomy(self.call))
                with self.conn.mutex:
                    wanted = self.conn.core.item(self.call, body)
                if not wanted:
                    break
                self.engine.flush(self.conn)
        finally:
            if hasattr(items, "aclose"):
                await items.aclose()
        with self.conn.mutex:
            self.conn.core.end(self.call)
        self.done()

    async def change(self, ready: Callable[[], bool]) -> None:
        """Until something has changed about this call."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def done() -> None:
            if not future.done():
                future.set_result(None)

        def changed() -> None:
            _soon(loop, done)

        self.call.watchers.append(changed)
        try:
            if not ready():
                await future
        finally:
            self.call.watchers.remove(changed)


def _soon(loop: asyncio.AbstractEventLoop, action: Callable[[], Any]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and with it whoever waited
        loop.call_soon_threadsafe(action)


class Production:
    """A generator of results, advanced while the caller has room; between that, no thread is its own."""

    def __init__(self, job: Job, items: Iterator[Any]) -> None:
        self._job, self._items = job, items
        self._parked = False
        job.call.watchers.append(self._changed)

    def pump(self) -> None:
        job = self._job
        conn, call, core, mutex = job.conn, job.call, job.conn.core, job.conn.mutex
        encode, flush = job.encoded, job.engine.flush
        try:
            while not call.done:
                with mutex:
                    if not conn.roomy(call):
                        self._parked = True
                        return
                value = next(self._items)
                body = encode(value)
                with mutex:
                    frames = core.item_frames(call, body)
                sent = True
                for frame in frames:
                    sent = conn.send(frame) and sent
                if not sent:
                    flush(conn)
            self._close()
            job.done()
        except StopIteration:
            with mutex:
                core.end(call)
            job.done()
        except BaseException as error:
            self._close()
            job.fail(error)

    def _close(self) -> None:
        close = getattr(self._items, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:
                self._job.engine.failed(self._job.context, error)

    def _changed(self) -> None:
        job = self._job
        with job.conn.mutex:
            if not self._parked or not (job.call.done or job.conn.roomy(job.call)):
                return
            self._parked = False
        job.engine.crew.submit(lambda: job.surroundings.run(self.pump))


class Inputs(Iterator[Any]):
    """The stream that a caller sends, for a handler in a thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._changed = threading.Event()
        job.call.watchers.append(self._changed.set)

    def __next__(self) -> Any:
        job = self._job
        while True:
            self._changed.clear()
            with job.conn.mutex:
                body = job.conn.core.take(job.call)
            if body is not None:
                job.engine.flush(job.conn)
                return job.wire.decode_item(body)
            _stop(job)
            self._changed.wait()


class AsyncInputs(AsyncIterator[Any]):
    """The stream that a caller sends, for a handler on the loop."""

    def __init__(self, job: Job) -> None:
        self._job = job

    async def __anext__(self) -> Any:
        job, call = self._job, self._job.call
        while True:
            with job.conn.mutex:
                body = job.conn.core.take(call)
            if body is not None:
                job.engine.flush(job.conn)
                return job.wire.decode_item(body)
            try:
                _stop(job)
            except StopIteration:
                raise StopAsyncIteration from None
            await job.change(lambda: bool(call.inbox) or call.inbox_ended or call.cancelled is not None)


def _stop(job: Job) -> None:
    """Raise what the end of this input is, if it has ended."""
    job_call = job.call
    if job_call.cancelled is not None:
        job.context.check()
    if job_call.inbox_ended and not job_call.inbox:
        raise StopIteration
