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
from ._oserror import GONE, map_oserror

#: What an end without a goodbye means: (operation, None) for an end of file between two messages; the second is words
#: ("inside a message", "(Broken pipe)") when something was cut off, and then only PeerDied is an honest answer.
Ended = Callable[[str, str | None], errors.PeerError]
Fail = Callable[[int, str, Any], BaseException]


def make_fail(url: Url, ended: Ended) -> Fail:
    """The `fail` of one native link. `ended` is asked at most once."""
    verdict: list[errors.PeerError] = []

    def gone(operation: str, broken: str | None) -> errors.PeerError:
        if not verdict:
            verdict.append(ended(operation, broken))
        first = verdict[0]  # and a new exception each time: one that is raised twice drags its old traceback along
        if isinstance(first, errors.PeerDied):
            return errors.PeerDied(first.message, url=url, operation=operation, hint=first.hint, pid=first.pid)
        return type(first)(first.message, url=url, operation=operation, hint=first.hint)

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
                return gone(operation, "inside a message" if detail else None)
            case _native.TOO_LARGE:
                size, limit = detail
                hint = "limit= raises it"
                if operation == "loan":  # one record: the ring, or limit= if that is less
                    hint += ", and size= at the listener; send() takes what is larger than the ring"
                return errors.MessageTooLarge(
                    f"{size} bytes, and {limit} is the limit", url=url, operation=operation, hint=hint
                )
            case _native.PROTOCOL:
                return errors.ProtocolError(str(detail), url=url, operation=operation)
            case _native.UNSUPPORTED:
                return errors.Unsupported(str(detail), url=url, operation=operation)
            case _:
                cause = OSError(detail, os.strerror(detail))
                broken = detail in GONE
                mapped = gone(operation, f"({cause.strerror})") if broken else map_oserror(cause, url, operation)
                mapped.__cause__ = cause
                return mapped

    return fail
