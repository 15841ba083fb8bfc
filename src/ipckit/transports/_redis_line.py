"""A connection to a Redis server that comes back, and one descriptor to sleep on meanwhile.

`Line` opens a `Wire`, prepares it (`setup`: scripts, groups, whatever the server must know), and when it is lost opens the
next one: after a pause that doubles from 20 ms to 2 s, with jitter, so that a server that comes back is not met by everybody
at once. Its owner calls `ready()` when it wants to go on, sleeps on what `Ear` says, and is told of each new wire by `opened`;
what has to be said again then, it knows itself. Nothing here sleeps or has a thread (the opening thread is `open_wire`'s).

An `Ear` is an epoll that stands for descriptors which come and go. An event loop keeps what it was once given registered
between sleeps, and would take the descriptor of a new connection, which often has the number of the old, for that one.
"""

from __future__ import annotations

import logging
import os
import random
import re
import select
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from .. import errors
from .._spi import Steps, Wait
from ._bell import Bell
from ._redis_address import Address
from ._redis_scripts import FORGET
from ._redis_wire import Wire, open_wire

log = logging.getLogger("ipckit.redis")

_PAUSE = (0.02, 2.0)  # seconds before a lost connection is made again: at first, at most
_STABLE = 2.0  # seconds that a connection has to last before the next loss counts as the first

#: What passes by itself: a server that is starting, failing over, or short of replicas.
_PASSING = (
    "LOADING",
    "MASTERDOWN",
    "READONLY",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "NOREPLICAS",
    "UNBLOCKED",
    "NOSCRIPT",
    "BUSY ",
)

Fds: TypeAlias = tuple[tuple[int, int], ...]


def passes(refusal: Exception) -> bool:
    """Whether this error reply says "not now" rather than "no"."""
    return str(refusal).startswith(_PASSING)


class Ear:
    """One descriptor for several, and a doorbell. A member is registered once, and stays until `forget`.

    What a line waits for may change in the very try between `wait` and the sleep; then it rings, and the sleeper asks anew.
    """

    def __init__(self) -> None:
        self._bell = Bell()
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._members: dict[int, int] = {}

    def wait(self, fds: Fds, at_most: float | None) -> Wait:
        members = self._members
        for fd, events in (self._bell.announce(), *fds):
            known = members.get(fd)
            if known == events:
                continue
            members[fd] = events
            if known is None:
                self._epoll.register(fd, events)
            else:
                self._epoll.modify(fd, events)
        return Wait(((self._fd, select.POLLIN),), at_most)

    def ring(self) -> None:
        """Whoever sleeps on this wakes and tries again."""
        self._bell.ring()

    def forget(self, fd: int) -> None:
        """Before it is closed: its number may be given to another file at once."""
        if self._members.pop(fd, None) is not None:
            with suppress(OSError):
                self._epoll.unregister(fd)

    def close(self) -> None:
        self._epoll.close()
        self._bell.close()


class Line:
    """See the module. One thread at a time; its owner locks."""

    def __init__(
        self, address: Address, setup: Callable[[Wire], Steps[None]], opened: Callable[[Wire], None], *ears: Ear
    ) -> None:
        self.reconnects = 0
        self.run = ""  # the server's run id: another one says that client numbers count anew
        self._address, self._setup, self._opened, self._ears = address, setup, opened, ears
        self._wire: Wire | None = None
        self._opening: Steps[Wire] | None = None
        self._wait = Wait(())  # of the opening
        self._writing = False  # whether the ears listen for room to write
        self._due = 0.0
        self._pause = _PAUSE[0]
        self._since = 0.0
        self._error: errors.IpcError | None = None

    def open(self) -> Steps[None]:
        """The first time: waits for a server until the driver throws Timeout, then NothingListening. What no waiting will mend
        is raised.
        """
        last: errors.IpcError | None = None
        try:
            while True:
                try:
                    wire = yield from self._connect()
                    break
                except (errors.NothingListening, errors.PeerError) as error:
                    if last is None:
                        log.warning("%s: %s; waiting for it", self._address.url, error.message)
                    last = error
                yield Wait((), self._next_pause())
        except errors.Timeout as timeout:
            message = "no Redis server answers" if last is None else last.message
            raise errors.NothingListening(message, url=self._address.url, operation="open") from last or timeout
        self._pause = _PAUSE[0]
        self._adopt(wire)

    def _connect(self) -> Steps[Wire]:
        wire = yield from open_wire(self._address.url, self._address.connection)
        try:
            with suppress(errors.IpcError):  # INFO may be forbidden to this user
                found = re.search(rb"^run_id:(\w+)", (yield from wire.ask("INFO", "server")), re.MULTILINE)
                self.run = found[1].decode() if found else ""
            yield from self._setup(wire)
        except BaseException:
            wire.close()
            raise
        return wire

    def _adopt(self, wire: Wire) -> None:
        self._wire = wire
        self._since = time.monotonic()
        self._changed()
        self._opened(wire)

    def ready(self) -> Wire | None:
        """The wire, or None while there is none. Raises what no new connection will mend."""
        if self._wire is None:
            self._advance()
        return self._wire

    def pump(self, unasked: bool = False) -> bool:
        """`Wire.pump` on the wire there is. False: there is none (any more)."""
        wire = self._wire or self.ready()
        if wire is None:
            return False
        try:
            wire.pump(unasked)
        except errors.PeerError as error:
            self.lose(error)
            return False
        if wire.held and not self._writing:
            self._changed()
        return self._wire is not None

    def push(self) -> None:
        if self._wire is not None:
            try:
                self._wire.push()
                if self._wire.held and not self._writing:
                    self._changed()
            except errors.PeerError as error:
                self.lose(error)

    def _changed(self) -> None:
        for ear in self._ears:
            ear.ring()

    def _advance(self) -> None:
        if self._error is not None:
            raise self._error
        if self._opening is None:
            if time.monotonic() < self._due:
                return
            self._opening = self._connect()
        try:
            self._await(next(self._opening))
        except StopIteration as stop:
            self._await(Wait(()))
            self._opening = None
            self.reconnects += 1
            log.info("%s: connected again", self._address.url)
            self._adopt(stop.value)
        except errors.IpcError as error:
            self._await(Wait(()))
            self._opening = None
            if not isinstance(error, (errors.PeerError, errors.NothingListening, errors.ResourceLimit)):
                self._error = error
                raise
            self._sleep_on_it()
            log.debug("%s: not yet: %s", self._address.url, error.message)

    def _await(self, wait: Wait) -> None:
        if wait.fds != self._wait.fds:
            for fd, _ in self._wait.fds:
                for ear in self._ears:
                    ear.forget(fd)
            self._changed()
        self._wait = wait

    def lose(self, why: object) -> None:
        """The wire is gone, or no good any more: the next `ready` begins to make another."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        log.warning("%s: %s; connecting again", self._address.url, getattr(why, "message", why))
        for ear in self._ears:
            ear.forget(wire.fd)
        wire.close()
        if time.monotonic() - self._since > _STABLE:
            self._pause = _PAUSE[0]
        self._sleep_on_it()

    def _sleep_on_it(self) -> None:
        self._changed()
        self._due = time.monotonic() + self._next_pause()

    def _next_pause(self) -> float:
        pause, self._pause = self._pause, min(self._pause * 2, _PAUSE[1])
        return pause * random.uniform(0.5, 1.0)

    def fds(self) -> Fds:
        """What to listen to. Ready when `ready` or `pump` gets further."""
        if self._wire is not None:
            # Reading always: to take it out and put it back would cost two system calls a message.
            self._writing = self._wire.held > 0
            return ((self._wire.fd, select.POLLIN | (select.POLLOUT if self._writing else 0)),)
        return self._wait.fds

    def at_most(self) -> float | None:
        if self._wire is not None or self._opening is not None:
            return None
        return max(self._due - time.monotonic(), 0.0)

    def close(self) -> None:
        if self._opening is not None:
            self._opening.close()
            self._opening = None
        if self._wire is not None:
            self._wire.close()
            self._wire = None

    def abandon(self) -> None:
        if self._wire is not None:
            self._wire.abandon()


def soonest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)


# -- what several of those who set up a wire want -------------------------------------------------------------------------


def check_fsync(wire: Wire, address: Address) -> Steps[None]:
    """`fsync=always`: refuse a server that acknowledges before it syncs. Asked again after each reconnection."""
    found: dict[str, str] = {}
    try:
        for setting in ("appendonly", "appendfsync"):
            reply: list[bytes] = yield from wire.ask("CONFIG", "GET", setting)
            found |= {reply[i].decode(): reply[i + 1].decode() for i in range(0, len(reply) - 1, 2)}
    except errors.PeerError:
        raise
    except errors.IpcError as error:
        raise errors.Unsupported(
            "fsync=always cannot be checked: this user may not ask the server (CONFIG GET)",
            url=address.url,
            hint="allow CONFIG GET to this user, or leave fsync out",
        ) from error
    if found.get("appendonly") != "yes" or found.get("appendfsync") != "always":
        said = ", ".join(f"{name} {value}" for name, value in sorted(found.items())) or "nothing"
        raise errors.Unsupported(
            f"fsync=always: the server acknowledges before it syncs ({said})",
            url=address.url,
            hint="in its configuration: appendonly yes, appendfsync always; or leave fsync out",
        )


def alive(wire: Wire, run: str, cards: dict[str, str]) -> Steps[tuple[dict[str, str], dict[str, str]]]:
    """Of registered readers: (those whose connection is gone, those registered before the server was restarted).

    A card is "RUN CLIENT": the server's run id and the number of a connection. Who outlived a restart of the server registers
    again when it is back; until then nobody can tell. Where this user may not look, time will tell.
    """
    if not run or not cards:
        return {}, {}
    now, old = dict[str, str](), dict[str, str]()
    for reader, card in cards.items():
        (now if card.startswith(run + " ") else old)[reader] = card
    if not now:
        return {}, old
    try:
        reply = yield from wire.ask("CLIENT", "LIST", "ID", *(card.split(" ")[1] for card in now.values()))
    except errors.PeerError:
        raise
    except errors.IpcError:
        return {}, {}
    there = {number.decode() for number in re.findall(rb"^id=(\d+) ", reply, re.MULTILINE)}
    return {reader: card for reader, card in now.items() if card.split(" ")[1] not in there}, old


def register(wire: Wire, run: str, readers: str, name: str) -> Steps[None]:
    """Say in the hash `readers` that we are there. Who comes strikes off who is gone, so that it never grows for ever."""
    cards = cards_of((yield from wire.ask("HGETALL", readers)))
    gone, old = yield from alive(wire, run, cards)
    leaving = [word for card in (gone | old).items() for word in card]
    if leaving:  # of another run too: who comes back registers anew
        yield from wire.ask("EVAL", FORGET.text, 1, readers, *leaving)
    yield from wire.ask("HSET", readers, name, f"{run} {wire.number}")


def cards_of(reply: list[bytes]) -> dict[str, str]:
    """A hash, as HGETALL gives it."""
    words = [word.decode(errors="replace") for word in reply]
    return dict(zip(words[::2], words[1::2], strict=True))


def me() -> str:
    """A name for one reader: where it is, and unlike all others."""
    import socket

    return f"{socket.gethostname()[:60]}-{os.getpid()}-{os.urandom(4).hex()}"
