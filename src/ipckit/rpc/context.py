"""`ipckit.rpc.current()`: the call that this code is running for.

In a task or in a thread of a slow call it stands in a context variable. A call that runs on the thread that received it
costs nothing to announce: that thread knows what it is at.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .. import errors
from .._spi import Peer


@dataclass(slots=True)
class CallContext:
    """A call, for its handler and for interceptors.

    Attributes:
        metadata: what the caller sent along; names in lower case, `traceparent` among them.
        deadline: on the clock of `time.monotonic`, or None.
        peer: who calls, as far as the kernel tells.
    """

    target: str
    method: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    deadline: float | None = None
    peer: Peer = field(default_factory=Peer)
    _why: Callable[[], str | None] = lambda: None

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, 0 when it has passed; None without one."""
        return None if self.deadline is None else max(self.deadline - time.monotonic(), 0.0)

    @property
    def cancelled(self) -> bool:
        """Nobody waits for the result: the caller cancelled or is gone, or its deadline has passed."""
        return self._why() is not None or self.remaining == 0.0

    def check(self) -> None:
        """For long work, now and then. Raises Cancelled, or DeadlineExceeded."""
        why = self._why()
        if why == "deadline" or (why is None and self.remaining == 0.0):
            raise overdue()
        if why is not None:
            raise errors.Cancelled(f"nobody waits for this call any more: {why}")


def overdue() -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded("the deadline of the call has passed")


_current: contextvars.ContextVar[CallContext | None] = contextvars.ContextVar("ipckit.rpc.current", default=None)


class Here(threading.local):
    """What the thread that received a call runs by itself."""

    context: Callable[[], CallContext | None] | None = None


here = Here()


def current() -> CallContext:
    """The call that this code runs for. Raises RuntimeError outside of a handler."""
    found = _current.get()
    if found is None and here.context is not None:
        found = here.context()
    if found is None:
        raise RuntimeError("no call is being handled here")
    return found
