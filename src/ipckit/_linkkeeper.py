"""One thread that looks after what must go on while nobody calls: connections to accept, peers that died, output that is left.

It does what is there to do by calling `tend` of everything in its care, and sleeps, by the driver as everybody, on what they say.
Messages that flow do not wake it. It begins with the first and ends with the last; at exit it is given `LINGER` seconds for what
closed endpoints have left to send.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from typing import Protocol

from ._spi import Steps, Wait
from ._url import Url
from ._wait import Gate, Lane, run
from .transports._bell import Bell

_log = logging.getLogger("ipckit")

#: Seconds in which what a closed endpoint has left may still go out.
LINGER = 5.0


class Tended(Protocol):
    def tend(self) -> Wait | None:
        """Do what can be done now. Returns what to sleep on until there is more; None: done for good."""

    def lingers(self) -> bool:
        """It is closed, and has something left to send."""


class Keeper:
    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._tended: list[Tended] = []
        self._thread: threading.Thread | None = None
        self._bell: Bell | None = None

    def tend(self, one: Tended) -> None:
        with self._mutex:
            self._tended.append(one)
            if self._thread is None:
                self._bell = Bell()
                self._thread = threading.Thread(target=self._run, args=(self._bell,), name="ipckit-keeper", daemon=True)
                self._thread.start()
            else:
                assert self._bell is not None
                self._bell.ring()

    def look(self) -> None:
        """Something in its care has changed."""
        if (bell := self._bell) is not None:
            bell.ring()

    def _run(self, bell: Bell) -> None:
        gate = Gate(Url("keeper"), lambda: None)
        try:
            run(self._rounds(bell), Lane(gate, "tend"), None)
        finally:
            gate.close()

    def _rounds(self, bell: Bell) -> Steps[None]:
        while True:
            fds = [bell.announce()]
            at_most: float | None = None
            for one in tuple(self._tended):
                try:
                    wait = one.tend()
                except Exception:
                    _log.exception("a queue or topic met an error behind its user's back")
                    wait = None
                if wait is None:
                    self._discard(one)
                    continue
                fds += wait.fds
                if wait.at_most is not None:
                    at_most = wait.at_most if at_most is None else min(at_most, wait.at_most)
            with self._mutex:
                if not self._tended:
                    self._thread = self._bell = None
                    return
            yield Wait(tuple(fds), at_most)

    def _discard(self, one: Tended) -> None:
        with self._mutex:
            if one in self._tended:
                self._tended.remove(one)

    def finish(self) -> None:
        """At exit: wait for those who linger."""
        deadline = time.monotonic() + LINGER + 1
        thread = self._thread
        if thread is not None and any(one.lingers() for one in tuple(self._tended)):
            for one in tuple(self._tended):
                if not one.lingers():
                    self._discard(one)
            self.look()
            thread.join(deadline - time.monotonic())

    def reset(self) -> None:
        """In a forked child: the thread is the parent's."""
        self.__init__()  # type: ignore[misc]


keeper = Keeper()
atexit.register(keeper.finish)
os.register_at_fork(after_in_child=keeper.reset)
