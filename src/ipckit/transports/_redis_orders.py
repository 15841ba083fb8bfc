"""Orders to a Redis server that are given until they are obeyed: what a receiver has to say about its messages.

Each order is harmless to give twice (XACK, and scripts that look first whose an entry is). They go out pipelined; those without a
reply when the connection is lost go out again on the next one, in the same order. Two lanes of an endpoint share them: whoever
pumps may hear the reply that the other sleeps for, and then wakes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from .. import errors
from .._spi import Steps
from ._redis_address import Address
from ._redis_line import Ear, Line, passes
from ._redis_wire import Wire, Word, map_redis

Order: TypeAlias = tuple[Word, ...]


class Orders:
    """Its owner locks. `rx` and `tx`: the ears of who receives and of who settles."""

    def __init__(
        self,
        address: Address,
        setup: Callable[[Wire], Steps[None]],
        opened: Callable[[], None],
        answered: Callable[[Order, Any], None],
        rx: Ear,
        tx: Ear,
    ) -> None:
        self.line = Line(address, setup, self._opened, rx, tx)
        self.flight = deque[Order]()  # without a reply, oldest first
        self._address, self._then, self._answered, self._tx = address, opened, answered, tx
        self._again: Exception | None = None  # why those in flight have to be given once more
        self._refused: list[errors.IpcError] = []

    def _opened(self, wire: Wire) -> None:
        self._then()
        for order in self.flight:
            wire.tell(self._done, *order)

    def give(self, order: Order) -> None:
        wire = self.line.ready()
        self.flight.append(order)
        if wire is not None:
            wire.tell(self._done, *order)
            self.line.push()

    def _done(self, reply: Any) -> None:
        if self._again is not None:
            return
        if isinstance(reply, Exception):
            if passes(reply):
                self._again = reply
                return
            if not str(reply).startswith("NOGROUP"):  # then there is nothing to settle
                error = map_redis(reply, self._address.url, "ack")
                error.__cause__ = reply
                self._refused.append(error)
        self._answered(self.flight.popleft(), reply)

    def pump(self, other: Ear) -> None:
        """`other`: of the lane that does not call. What came may have been for it, and nothing else will end its sleep."""
        wire = self.line.ready()
        waiting, orders = wire.waiting if wire is not None else 0, len(self.flight)
        self.line.pump(unasked=True)
        if wire is None or waiting != wire.waiting:
            other.ring()
            if orders > 1:
                self._tx.ring()  # tasks that settle at once
        if self._again is not None:
            why, self._again = self._again, None
            self.line.lose(f"the server says: {why}")

    def check(self) -> None:
        """Raise what was refused since."""
        if self._refused:
            first = self._refused[0]
            self._refused.clear()
            raise first
