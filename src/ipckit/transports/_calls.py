"""How the exchanges of calls are opened: again and again until a broker answers, and for a client until a server is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._url import Url

T = TypeVar("T")


def opened(
    attempt: Callable[[], Steps[T]], url: Url, broker: str, retry: tuple[float, float], *, serving: bool
) -> Steps[T]:
    """What `attempt` makes. Raises NothingListening if Timeout is thrown first. `retry`: the first and the longest pause."""
    reason: errors.IpcError | None = None
    pause, longest = retry
    operation = "serve" if serving else "client"
    try:
        while True:
            try:
                return (yield from attempt())
            except (errors.NothingListening, errors.PeerError) as error:
                reason = error
            yield Wait((), pause)
            pause = min(pause * 2, longest)
    except errors.Timeout as timeout:
        if isinstance(timeout.__cause__, errors.Timeout):  # the broker was there
            raise errors.NothingListening(timeout.message, url=url, operation=operation) from timeout
        message = f"no {broker} server answers" if reason is None else reason.message
        raise errors.NothingListening(message, url=url, operation=operation) from reason or timeout


def found(find: Callable[[], Steps[bool]], url: Url, retry: tuple[float, float]) -> Steps[None]:
    """Until `find` has found a server. Raises Timeout from the driver's when there was none."""
    pause, longest = retry
    try:
        while not (yield from find()):
            yield Wait((), pause)
            pause = min(pause * 2, longest)
    except errors.Timeout as timeout:
        raise errors.Timeout("nobody serves at this name", url=url) from timeout
