"""One client, at the server: its link, its state machine, and who attends it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from .. import errors
from .._spi import Fused, Link, Reframing, Spinning
from .._url import Url
from .._wait import Gate
from ._connection import BROKEN
from ._servercore import ServerCall, ServerCore

if TYPE_CHECKING:
    from ._attend import Worker

#: Bytes of answers that may wait for a client that does not read; beyond them it is not heard either.
BACKLOG = 4 << 20
#: How long a thread that produces a stream may wait for room in its link, in seconds, before it is put to better use.
PATIENCE = 0.005

#: Who has been refused so often above its rate is not heard for so many seconds: refusing costs time that is others'.
REFUSALS, PAUSE = 4, 0.002


class ServerConnection:
    """`mutex` guards the core, its outbox, and who attends it."""

    def __init__(self, link: Link, core: ServerCore, url: Url) -> None:
        self.link = link
        self.core = core
        self.mutex = threading.Lock()
        self.fused: Fused | None = link if isinstance(link, Fused) else None
        self.spin = link.spin_recv if isinstance(link, Spinning) else None
        self.attendant: Worker | None = None
        self.foreign: Reframing | None = None  # the link, where programs that are not ipckit's may come
        self.gate = Gate(url, lambda: None)  # where a worker waits for a link that is not fused
        self.blocked = False  # something waits to be sent
        self.lost = False
        self.since = self.active = time.monotonic()  # accepted; last heard or spoken to
        self.spoken = True  # it is known what it speaks
        self.envelope = False  # that is not ours
        self.excess = False  # it is one too many, and is to be told so

    def roomy(self, call: ServerCall) -> bool:
        """A producer may go on."""
        return (call.credit > 0 and not self.blocked) or call.done

    def overfull(self) -> bool:
        """It does not read what it asked for. With the mutex held."""
        return self.blocked and sum(map(len, self.core.outbox)) > BACKLOG

    @property
    def flooding(self) -> bool:
        """It asks for more than it may, again and again."""
        return self.core.refused >= REFUSALS

    def try_flush(self) -> bool:
        """Send what the core has to say, with the mutex held.

        A client that is gone is sent no more. But what it had said before is still to be read, so the end is for who receives.
        """
        outbox = self.core.outbox
        while outbox:
            try:
                if not self.link.try_send(outbox[0]):
                    return False
                outbox.popleft()
            except errors.MessageTooLarge as error:
                self.core.unsendable(error.message)
            except errors.PeerError:
                outbox.clear()
                return True
        try:
            return self.link.try_flush()
        except errors.PeerError:
            return True

    def close(self) -> None:
        """Immediate. Nobody is in the link, unless it is fused."""
        self.gate.close()
        self.link.close()

    def send(self, frame: bytes) -> bool:
        """One frame, from its own thread and without the mutex; it waits a little. False: it has become the outbox's.

        Frames that others send meanwhile may overtake it, so it is for those whose order only their own thread knows.
        """
        if self.fused is not None and not self.core.outbox and not self.blocked:
            try:
                self.fused.send(frame, PATIENCE)
                return True
            except errors.OutcomeUnknown:  # the link has it
                return False
            except (errors.Timeout, errors.MessageTooLarge, *BROKEN):
                pass  # whoever flushes the outbox meets it again
        with self.mutex:
            self.core.outbox.append(frame)
        return False

    def answer(self, frame: bytes) -> None:
        """Send one frame, after those that wait. With the mutex held."""
        self.core.outbox.append(frame)
        if not self.try_flush():
            self.blocked = True
