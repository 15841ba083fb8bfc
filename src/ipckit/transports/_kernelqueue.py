"""Queues that the kernel keeps: the sending and the receiving side, the same over a message queue and over a FIFO.

    sender     record -> kernel's queue                        what does not fit: into a file, and its name into the queue
    receiver   kernel's queue -> a slot of its own hand        (see `_hands`), where a kill leaves it
               acknowledged: the slot is free;  closed, dead: the hand is taken over by whoever hears of it first

Promises: what `send` returned from is the kernel's; it is handed out until somebody acknowledges it, in order as long as nobody
dies or refuses. A message may come twice only if its receiver died, closed or refused it. One that was handed out `max_deliver`
times goes to NAME-dead instead, as a file: that queue may be full.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from .. import errors
from .._options import integer, option
from .._spi import Steps, Wait, Want
from .._url import Url
from ..message import Parcel, Verdict
from . import _kernelwire as wire
from ._hands import Hand, Place, Sheaf, Watch, adopt
from ._oserror import map_oserror

_log = logging.getLogger("ipckit")
_GLANCE = 64  # messages after which we look for orphans though there is more


def max_deliver_option() -> Any:
    """A field of options: both transports have it."""
    return option(0, integer(0, 1 << 30), "receiver: hand-outs after which a message goes to NAME-dead; 0: never")


class Kernel(Protocol):
    """The queue in the kernel. `put` and `get` never wait."""

    fd: int
    frame: int  # bytes of a record
    levels: int  # of priority
    native: Any

    def put(self, record: bytes, priority: int) -> bool: ...
    def get(self, buffer: memoryview) -> int:
        """Bytes of the record that is in `buffer` now, or -1."""

    def retire(self, place: Place) -> bool:
        """Nobody else is here. Keep what must be kept, remove what need not; True if nothing is left in the kernel."""

    def close(self) -> None: ...


def _leave(place: Place, kernel: Kernel) -> None:
    try:
        if place.last_one() and kernel.retire(place) and not place.holds_messages:
            place.clear()
    finally:
        kernel.close()
        place.leave()


def _mapped(error: OSError, url: Url, operation: str) -> BaseException:
    """The one place where an OSError becomes ours: a disk that is full, a limit. Nothing was taken out of the kernel then."""
    return error if isinstance(error, errors.IpcError) else map_oserror(error, url, operation)


class KernelOutlet:
    """`Outlet`."""

    def __init__(self, url: Url, place: Place, kernel: Kernel, limit: int) -> None:
        self._lock = threading.Lock()
        self._url, self._place, self._kernel, self._limit = url, place, kernel, limit
        self._sent = self._bytes = 0
        self._closed = False
        self._poll = select.poll()
        self._poll.register(kernel.fd, select.POLLOUT)
        self._room = Wait(((kernel.fd, select.POLLOUT),))

    @property
    def native(self) -> Any:
        return self._kernel.native

    def try_put(self, parcel: Parcel) -> bool:
        if parcel.priority:
            self._check_priority(parcel.priority)
        size = len(parcel.body)
        if size > self._limit:
            raise errors.MessageTooLarge(
                f"{size} bytes, and {self._limit} is the limit",
                url=self._url,
                operation="send",
                hint="limit= raises it",
            )
        record = wire.message(parcel)
        with self._lock:
            if self._closed:
                raise errors.Closed("this endpoint is closed", url=self._url)
            try:
                if len(record) <= self._kernel.frame:
                    taken = self._kernel.put(record, parcel.priority)
                else:
                    taken = self._put_elsewhere(record, parcel.priority)
            except OSError as error:
                raise _mapped(error, self._url, "send") from error
            if taken:
                self._sent += 1
                self._bytes += size
            return taken

    def _put_elsewhere(self, record: bytes, priority: int) -> bool:
        if not self._poll.poll(0):  # before anything large is written
            return False
        name = self._place.write(record, 0, None, ".body")
        if not self._kernel.put(wire.elsewhere(name, priority), priority):
            self._place.remove(name)
            return False
        self._place.mark_sent(name)
        return True

    def _check_priority(self, priority: int) -> None:
        levels = self._kernel.levels
        if not levels:
            raise errors.Unsupported(
                "this transport has no priorities", url=self._url, operation="send", hint="see `ipckit transports`"
            )
        if not 0 <= priority < levels:
            raise errors.BadOption(f"priority must be from 0 to {levels - 1}", url=self._url, operation="send")

    def try_flush(self) -> bool:
        return True

    def arm(self, want: Want) -> Wait:
        return self._room

    def counters(self) -> Mapping[str, int]:
        return {"sent": self._sent, "bytes_sent": self._bytes}

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                _leave(self._place, self._kernel)

    def abandon(self) -> None:
        self._kernel.close()
        self._place.leave()


class KernelIntake:
    """`Intake`. A parcel's token is who holds it, and the number of its slot there."""

    def __init__(
        self, url: Url, place: Place, kernel: Kernel, limit: int, max_deliver: int, grave: tuple[Place, Kernel] | None
    ) -> None:
        """`grave`: the queue of the dead letters, which is open as long as this one is."""
        self._lock = threading.Lock()
        self._url, self._place, self._kernel, self._limit = url, place, kernel, limit
        self._max_deliver, self._grave = max_deliver, grave
        self._hand = Hand(place, kernel.frame)
        self._watch = Watch(place)
        self._sheaves: set[Sheaf] = set()
        self._again: deque[tuple[Sheaf, int]] = deque()  # taken over, and not handed out yet
        self._received = self._bytes = self._redelivered = self._dead = self._since_glance = 0
        self._closed = False

    @property
    def native(self) -> Any:
        return self._kernel.native

    def try_get(self) -> Parcel | None:
        with self._lock:
            self._check()
            try:
                parcel = self._next()
            except OSError as error:
                raise _mapped(error, self._url, "recv") from error
            if parcel is not None:
                self._received += 1
                self._bytes += len(parcel.body)
                self._redelivered += bool(parcel.redelivered)
            return parcel

    def _next(self) -> Parcel | None:
        self._since_glance += 1
        if self._since_glance >= _GLANCE:
            self._look()
        while True:
            parcel = self._old() if self._again else self._new()
            if parcel is not None:
                return parcel
            if not self._again:
                self._look()
                if not self._again:
                    return None

    def _new(self) -> Parcel | None:
        """The next one of the kernel's; None if there is none, or it is elsewhere and `_again` has it now."""
        hand = self._hand
        while True:
            number, buffer = hand.take()
            try:
                size = self._kernel.get(buffer)
            except BaseException:
                hand.settle(number)
                raise
            if size < 0:
                hand.settle(number)
                return None
            try:
                found = wire.read(hand.record(number, size))
                if isinstance(found, Parcel):
                    found.token = (hand, number)
                    return found
                there = self._take_over(found)
            except errors.ProtocolError as error:
                _log.warning("%s: somebody wrote what is no message of ours: %s", self._url, error.message)
                there = False
            hand.settle(number)  # the message is in the file now, or was somebody else's
            if there:
                return None

    def _old(self) -> Parcel | None:
        sheaf, number = self._again.popleft()
        try:
            size = sheaf.size(number)
            if size - wire.HEAD.size > self._limit + wire.MOST_EXTRA:
                raise errors.MessageTooLarge(
                    f"a message of {size} bytes is there, and {self._limit} is the limit",
                    url=self._url,
                    operation="recv",
                    hint="a receiver with a higher limit= gets it when this one closes",
                )
            found = wire.read(sheaf.record(number))
            if isinstance(found, Parcel):
                found.redelivered = sheaf.handed_out(number)
                if self._grave is None or found.redelivered < self._max_deliver:
                    found.token = (sheaf, number)
                    return found
                self._bury(found, self._grave[0])
            else:
                self._take_over(found)
        except errors.ProtocolError as error:
            _log.warning("%s: a file holds what is no message of ours: %s", self._url, error.message)
        self._settle(sheaf, number)
        return None

    def _bury(self, parcel: Parcel, grave: Place) -> None:
        """Killed right after this, it is there twice, with one id."""
        grave.write(wire.message(parcel), parcel.redelivered, None, ".hand")
        self._dead += 1
        _log.warning("%s: message %s became a dead letter", self._url, parcel.id)

    def _look(self) -> None:
        self._since_glance = 0
        for sheaf in self._watch.orphans(self._hand.name):
            self._add(sheaf)

    def _take_over(self, name: str) -> bool:
        sheaf = adopt(self._place, name)
        if sheaf is not None:
            self._add(sheaf)
        return sheaf is not None

    def _add(self, sheaf: Sheaf) -> None:
        self._sheaves.add(sheaf)
        self._again.extend((sheaf, number) for number in sheaf.numbers)

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        with self._lock:
            self._check()
            if verdict is Verdict.EXTEND or parcel.token is None:
                return True  # nobody's time runs out here
            holder, number = parcel.token
            if verdict is Verdict.NACK:
                due = time.time_ns() + int(delay * 1e9)
                try:
                    self._place.write(wire.message(parcel), parcel.redelivered + 1, due, ".hand")
                except OSError as error:
                    raise _mapped(error, self._url, "nack") from error
            parcel.token = None
            self._settle(holder, number)
            return True

    def _settle(self, holder: Hand | Sheaf, number: int) -> None:
        holder.settle(number)
        if isinstance(holder, Sheaf) and not holder.held:
            self._sheaves.discard(holder)

    def try_flush(self) -> bool:
        return True

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check()
            orphans = self._watch.wait()
            return Wait(((self._kernel.fd, select.POLLIN), *orphans.fds), orphans.at_most)

    def counters(self) -> Mapping[str, int]:
        return {
            "received": self._received,
            "bytes_received": self._bytes,
            "redelivered": self._redelivered,
            "dead_letters": self._dead,
        }

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self._url)

    def _places(self) -> Iterator[tuple[Place, Kernel]]:
        yield self._place, self._kernel
        if self._grave is not None:
            yield self._grave

    def _holders(self) -> tuple[Hand | Sheaf, ...]:
        return self._hand, *self._sheaves

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._watch.close()
                for holder in self._holders():
                    holder.close()
                for place, kernel in self._places():
                    _leave(place, kernel)

    def abandon(self) -> None:
        self._watch.close()
        for holder in self._holders():
            holder.abandon()
        for place, kernel in self._places():
            kernel.close()
            place.leave()


def open_intake(
    enter: Callable[[Url], Steps[tuple[Place, Kernel]]], url: Url, limit: int, max_deliver: int
) -> Steps[KernelIntake]:
    places = [(yield from enter(url))]
    try:
        if max_deliver:
            places.append((yield from enter(_dead(url))))
        return KernelIntake(url, *places[0], limit, max_deliver, places[1] if max_deliver else None)
    except BaseException:
        for place, kernel in places:
            _leave(place, kernel)
        raise


def _dead(url: Url) -> Url:
    if url.path:
        return replace(url, path=f"{url.path}-dead")
    return replace(url, hosts=(replace(url.host, name=f"{url.host.name}-dead"),))
