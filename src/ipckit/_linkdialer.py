"""Connecting, again and again, by whoever may not wait for it.

After each end, and each failure, there is a pause that grows and is uneven, so that a listener that was restarted is not met by
everybody at once.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from . import errors
from ._spi import Steps, Wait
from ._url import Url

T = TypeVar("T")

_log = logging.getLogger("ipckit")
_FIRST_PAUSE, _LAST_PAUSE = 0.01, 2.0


class Dialer(Generic[T]):
    """Connects, again and again. `try_dial` is to be called when its wait is ready."""

    def __init__(self, url: Url, dial: Callable[[], Steps[T]]) -> None:
        self._url, self._dial = url, dial
        self._steps: Steps[T] | None = None
        self._pause = _FIRST_PAUSE
        self._not_before = 0.0

    def later(self, lived: float) -> None:
        """The link ended after so many seconds."""
        if lived > 5:
            self._pause = _FIRST_PAUSE
        self._not_before = time.monotonic() + self._pause * random.uniform(0.5, 1.5)
        self._pause = min(self._pause * 2, _LAST_PAUSE)

    def try_dial(self) -> T | Wait:
        left = self._not_before - time.monotonic()
        if left > 0:
            return Wait((), left)
        try:
            if self._steps is None:
                self._steps = self._dial()
            return next(self._steps)
        except StopIteration as stop:
            self._steps = None
            found: T = stop.value
            return found
        except (errors.AddressError, errors.PeerError, errors.ProtocolError, errors.AccessDenied) as error:
            _log.warning("%s: cannot connect again: %s", self._url, error)
            self._steps = None
            self.later(0)
            return Wait((), max(self._not_before - time.monotonic(), 0.0))

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
