"""The connections of an exchange through Redis: one reads its box, one writes, and a server's third one takes calls.

They are lost together, and a server makes them again together, with a new box: what was on its way is over. There are several
because a connection of Redis that waits for something answers nothing else.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from ._redis_address import Address
from ._redis_wire import Wire, map_redis, open_wire

_log = logging.getLogger("ipckit")
RETRY = (0.005, 0.1)
_LOST = (errors.PeerError, errors.NothingListening)


class Wired:
    """Mixed into the exchange. `address` is the box; `begin` announces it.

    Attributes:
        _error: why the connections are no good any more.
        _reading, _taking: a command is outstanding that blocks.
    """

    def __init__(self, place: Address, prefix: str, wires: list[Wire]) -> None:
        self.url: Url = place.url
        self._place, self._prefix = place, prefix
        self._adopt(wires)

    def _adopt(self, wires: list[Wire]) -> None:
        """These are our connections from now on, and what is read is a new box."""
        self._reader, self._writer, *rest = wires
        self._taker: Wire | None = rest[0] if rest else None
        self.address = f"{self._prefix}box:{uuid.uuid4().hex}-{self._reader.number}"
        self._last: bytes | str = "0-1"
        self._untrimmed = [0, 0]
        self._reading = self._taking = False
        self._error: errors.IpcError | None = None

    def begin(self) -> Steps[None]:
        raise NotImplementedError

    @property
    def _every(self) -> list[Wire]:
        return [wire for wire in (self._reader, self._taker, self._writer) if wire is not None]

    @property
    def _lost(self) -> bool:
        return isinstance(self._error, _LOST)

    def _queue(self, handler: Callable[[Any], None] | None, *words: bytes | str | int) -> None:
        self._writer.tell(handler, *words)

    def _pump(self, wire: Wire) -> None:
        try:
            wire.pump()
        except errors.PeerError as error:
            self._error = self._error or error

    def _push(self, wire: Wire) -> None:
        try:
            wire.push()
        except errors.PeerError as error:
            self._error = self._error or error

    def _fail(self, reply: Exception) -> None:
        """Redis refuses what we need. Whatever it says, we begin anew: the keys may have been flushed, or memory may come."""
        if self._error is None:
            error = map_redis(reply, self.url, "call")
            _log.warning("%s: %s; connecting again", self.url, error.message)
            self._error = error if isinstance(error, _LOST) else errors.PeerDied(error.message, url=self.url)

    def _reopen(self) -> Steps[None]:
        pause = RETRY[0]
        while True:
            try:
                yield from self._open_again()
                return
            except errors.Closed:
                raise
            except errors.IpcError as error:
                # To who has an answer to send meanwhile it is a lost connection, not an address that leads nowhere.
                lost = isinstance(error, errors.PeerError)
                self._error = error if lost else errors.PeerDied(error.message, url=self.url)
            yield Wait((), pause)
            pause = min(pause * 2, RETRY[1])

    def _open_again(self) -> Steps[None]:
        wires: list[Wire] = []
        try:
            for _ in range(3):
                wires.append((yield from open_wire(self.url, self._place.connection)))
            self._adopt(wires)
            yield from self.begin()
        except BaseException:
            close(wires)
            raise


def close(wires: list[Wire]) -> None:
    for wire in wires:
        with suppress(errors.PeerError):
            wire.close()
