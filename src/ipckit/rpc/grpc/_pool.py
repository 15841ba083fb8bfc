"""The threads of grpcio's server, in place of a ThreadPoolExecutor.

grpcio uses of an executor `submit`, and of its future `add_done_callback`. The standard library makes a condition and takes half
a dozen locks in Python for each call, which is more than all that ipckit adds to one (ADR 19). Here a call costs a put and a get
of a queue in C. Threads are made when none is idle, and stay.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

_log = logging.getLogger("ipckit")


class Done:
    """Tells when a job is done, as far as grpcio asks."""

    __slots__ = ("_callback", "_mutex", "_over")

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._callback: Callable[[Any], object] | None = None
        self._over = False

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """One at most."""
        with self._mutex:
            if not self._over:
                self._callback = callback
                return
        callback(self)

    def finish(self) -> None:
        with self._mutex:
            self._over = True
        if self._callback is not None:
            self._callback(self)


class Pool:
    """`size` threads at most; what comes when all are busy waits for one."""

    def __init__(self, size: int, name: str) -> None:
        self._size, self._name = size, name
        self._jobs: SimpleQueue[tuple[Done, Callable[..., object], tuple[Any, ...]] | None] = SimpleQueue()
        self._mutex = threading.Lock()
        self._idle = 0  # threads that wait, and that no job was meant for yet; without meaning once there are `size`
        self._made = 0
        self._closed = False

    def submit(self, function: Callable[..., object], /, *args: Any) -> Done:
        done = Done()
        with self._mutex:
            if self._closed:
                raise RuntimeError("the server is closed")
            if self._idle:
                self._idle -= 1
            elif self._made < self._size:
                self._made += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._made}", daemon=True).start()
        self._jobs.put((done, function, args))
        return done

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done, function, args = job
            try:
                function(*args)
            except BaseException:  # grpcio's own: what handlers raise is caught below it
                _log.exception("a call met an error of the library")
            done.finish()
            del job, done, function, args  # a call is not kept alive by the wait for the next
            with self._mutex:
                self._idle += 1

    def close(self) -> None:
        """Let the threads go, each when it has finished what it is at. What waits is dropped."""
        with self._mutex:
            self._closed = True
            for _ in range(self._made):
                self._jobs.put(None)
