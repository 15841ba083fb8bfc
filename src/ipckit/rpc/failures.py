"""Errors to what travels, and back: one table for every dialect."""

from __future__ import annotations

import traceback
from typing import Any

from .. import errors
from .events import Failure


class NotTaken(errors.PeerDied):
    """No server has taken the call: whatever the method does, it may be made again."""


#: The code of what a router says of a call that no server has taken.
NOT_TAKEN = "NOT_TAKEN"

#: Codes that travel. Where a dialect has names of its own, it maps these.
CODES: dict[str, type[errors.IpcError]] = {
    "REMOTE_ERROR": errors.RemoteError,
    "UNKNOWN_METHOD": errors.UnknownMethod,
    "UNKNOWN_TARGET": errors.UnknownTarget,
    "SCHEMA": errors.SchemaError,
    "CODEC": errors.CodecError,
    "TOO_LARGE": errors.MessageTooLarge,
    "RATE_LIMITED": errors.RateLimited,
    "TARGET_BUSY": errors.TargetBusy,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.Cancelled,
    "SHUTTING_DOWN": errors.ShuttingDown,
    "PEER_DIED": errors.PeerDied,
    "PEER_CLOSED": errors.PeerClosed,
    NOT_TAKEN: NotTaken,
}
#: What a handler raises to say it of its own call; other errors of ipckit are its private affairs.
_SPOKEN: dict[type[BaseException], str] = {
    cls: code for code, cls in CODES.items() if issubclass(cls, errors.RpcError) and cls is not errors.RemoteError
} | {errors.SchemaError: "SCHEMA", errors.CodecError: "CODEC"}


def failure_of(id: int, error: BaseException, tracebacks: bool) -> Failure:
    """What becomes of an exception that a handler let out."""
    code = _SPOKEN.get(type(error))
    if code is not None and isinstance(error, errors.IpcError):
        return Failure(id, code, error.message, retry_after=getattr(error, "retry_after", None))
    cls = type(error)
    name = cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    text = "".join(traceback.format_exception(error)) if tracebacks else None
    return Failure(id, "REMOTE_ERROR", _text(error), name, text)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # its own __str__ is broken; the type says enough
        return ""


def error_of(failure: Failure, url: object, operation: str | None) -> errors.IpcError:
    """The exception that the caller gets."""
    cls = CODES.get(failure.code)
    where: dict[str, Any] = {"url": url, "operation": operation}
    if cls is errors.RateLimited:
        return errors.RateLimited(failure.message, retry_after=failure.retry_after, **where)
    if cls is None or cls is errors.RemoteError:
        kind = failure.type or failure.code
        return errors.RemoteError(failure.message, type=kind, traceback=failure.traceback, **where)
    return cls(failure.message, **where)
