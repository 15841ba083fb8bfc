"""Where the native core's reasons become exceptions: the one `map_*` boundary of every native link.

The C code knows that something ended, not what to call it. It calls `fail(reason, operation, detail)` and raises what
comes back. What an end of file *means* only the transport can say (it may ask the kernel who died), so it hands in
`ended`; its answer is kept, because the answer must not change when the peer's process ends later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from .. import _native, errors
from .._url import Url
from ._oserror import map_oserror

#: (operation, inside a frame) -> what an end of file without a goodbye means.
Ended = Callable[[str, bool], errors.PeerError]
Fail = Callable[[int, str, Any], BaseException]


def make_fail(url: Url, ended: Ended) -> Fail:
    """The `fail` of one native link. `ended` is asked at most once."""
    verdict: list[errors.PeerError] = []

    def fail(reason: int, operation: str, detail: Any) -> BaseException:
        match reason:
            case _native.CLOSED:
                return errors.Closed("this endpoint is closed", url=url, operation=operation)
            case _native.TIMED_OUT:
                return errors.Timeout("nothing happened in time", url=url, operation=operation)
            case _native.UNKNOWN:
                return errors.OutcomeUnknown(
                    "a part of the message is sent",
                    url=url,
                    operation=operation,
                    hint="the rest goes out with the next call; do not send it again",
                )
            case _native.GOODBYE:
                return errors.PeerClosed("the peer closed", url=url, operation=operation)
            case _native.ENDED:
                if not verdict:
                    verdict.append(ended(operation, bool(detail)))
                return _again(verdict[0], operation)
            case _native.TOO_LARGE:
                size, limit = detail
                return errors.MessageTooLarge(
                    f"{size} bytes, and {limit} is the limit", url=url, operation=operation, hint="limit= raises it"
                )
            case _native.PROTOCOL:
                return errors.ProtocolError(str(detail), url=url, operation=operation)
            case _native.UNSUPPORTED:
                return errors.Unsupported(str(detail), url=url, operation=operation)
            case _:
                cause = OSError(detail, os.strerror(detail))
                mapped = map_oserror(cause, url, operation)
                mapped.__cause__ = cause
                return mapped

    return fail


def _again(first: errors.PeerError, operation: str) -> errors.PeerError:
    """The same, as a new exception: one that is raised twice would drag its old traceback along."""
    if isinstance(first, errors.PeerDied):
        return errors.PeerDied(first.message, url=first.url, operation=operation, hint=first.hint, pid=first.pid)
    return type(first)(first.message, url=first.url, operation=operation, hint=first.hint)
