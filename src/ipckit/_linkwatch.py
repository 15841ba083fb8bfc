"""Many Waits as one descriptor.

An endpoint over many links sleeps on an epoll that watches whatever they said. It is one descriptor for a driver, however many
links come and go; an event loop keeps descriptors registered between calls, and must not know those of links that may be closed
and their numbers used again. And it tells which link is ready, so that waking costs what is ready and not what exists.

Bells beside it wake the sleepers when another caller has taken from a link what they were waiting for. Each lane of the endpoint
has its own: who silences a bell before sleeping must not silence one that another sleeper has not heard yet.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Hashable
from contextlib import suppress

from ._spi import Wait

#: For who wants to hear only of the end: hang-ups count as ready anyway, this hears a closed half as well.
GONE = select.EPOLLRDHUP


class Watch:
    """Waits by key. Not thread-safe: its owner has a lock."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bells: dict[int, int] = {}  # by lane
        self._rung: set[int] = set()
        self._interest: dict[int, dict[Hashable, int]] = {}
        self._fds: dict[Hashable, tuple[tuple[int, int], ...]] = {}
        self._due: dict[Hashable, float] = {}

    def put(self, key: Hashable, wait: Wait) -> None:
        """From now on `key` is ready when this Wait is. It replaces what it had."""
        old = self._fds.get(key, ())
        if old != wait.fds:
            gone = {fd for fd, _ in old} - {fd for fd, _ in wait.fds}
            for fd in gone:
                self._forget(fd, key)
            for fd, events in wait.fds:
                self._want(fd, key, events)
            self._fds[key] = wait.fds
        if wait.at_most is not None:
            self._due[key] = time.monotonic() + wait.at_most
        elif self._due:
            self._due.pop(key, None)

    def drop(self, key: Hashable) -> None:
        """Before its descriptors are closed."""
        for fd, _ in self._fds.pop(key, ()):
            self._forget(fd, key)
        self._due.pop(key, None)

    def _want(self, fd: int, key: Hashable, events: int) -> None:
        keys = self._interest.get(fd)
        if keys is None:
            self._epoll.register(fd, events)
            self._interest[fd] = {key: events}
        elif keys.get(key) != events:
            keys[key] = events
            self._epoll.modify(fd, _union(keys))

    def _forget(self, fd: int, key: Hashable) -> None:
        keys = self._interest.get(fd, {})
        keys.pop(key, None)
        with suppress(OSError):  # a link that broke may have closed it already
            if keys:
                self._epoll.modify(fd, _union(keys))
            else:
                self._interest.pop(fd, None)
                self._epoll.unregister(fd)

    def ready(self) -> set[Hashable]:
        """Keys whose Wait is ready, or over."""
        found: set[Hashable] = set()
        for fd, _ in self._epoll.poll(0):
            found.update(self._interest.get(fd, ()))
        if self._due:
            now = time.monotonic()
            for key in [key for key, due in self._due.items() if due <= now]:
                del self._due[key]
                found.add(key)
        return found

    def ring(self) -> None:
        """Wake who sleeps on `sleep`, in every lane."""
        for lane, bell in self._bells.items():
            if lane not in self._rung:
                self._rung.add(lane)
                os.eventfd_write(bell, 1)

    def wait(self, until: float | None = None) -> Wait:
        """What to sleep on; no longer than `until` on the monotonic clock."""
        if self._due:
            first = min(self._due.values())
            until = first if until is None else min(first, until)
        at_most = None if until is None else max(until - time.monotonic(), 0.0)
        return Wait(((self._epoll.fileno(), select.POLLIN),), at_most)

    def sleep(self, until: float | None = None, lane: int = 0) -> Wait:
        """As `wait`, and the lane's bell. Who asks tries once more: that answers for what this bell was rung for."""
        bell = self._bells.get(lane)
        if bell is None:
            bell = self._bells[lane] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        elif lane in self._rung:
            self._rung.remove(lane)
            with suppress(BlockingIOError):
                os.eventfd_read(bell)
        wait = self.wait(until)
        return Wait((*wait.fds, (bell, select.POLLIN)), wait.at_most)

    def close(self) -> None:
        if not self._epoll.closed:
            self._epoll.close()
            for bell in self._bells.values():
                os.close(bell)
            self._bells.clear()


def _union(keys: dict[Hashable, int]) -> int:
    events = 0
    for each in keys.values():
        events |= each
    return events
