"""Failures to gRPC's status codes with details, and back.

What is ours stands in a `google.rpc.Status` beside the code, as other libraries do it: `ErrorInfo` (the reason is one of
`failures.CODES`, the domain `ipckit`, the metadata have the exception's `type`), `RetryInfo`, `DebugInfo` with the traceback.
Without them (a stock server) the code alone says what it can.
"""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from ... import errors
from .. import failures
from ..events import Failure

DOMAIN = "ipckit"
DETAILS = "grpc-status-details-bin"
#: Bytes. A status travels as headers, and stock clients take 8 KiB of them.
_TEXT, _TRACEBACK = 1024, 3072

_Code = grpc.StatusCode
_CODES = {
    "REMOTE_ERROR": _Code.UNKNOWN,
    "UNKNOWN_METHOD": _Code.UNIMPLEMENTED,
    "UNKNOWN_TARGET": _Code.UNIMPLEMENTED,
    "SCHEMA": _Code.INVALID_ARGUMENT,
    "CODEC": _Code.INVALID_ARGUMENT,
    "TOO_LARGE": _Code.RESOURCE_EXHAUSTED,
    "RATE_LIMITED": _Code.RESOURCE_EXHAUSTED,
    "TARGET_BUSY": _Code.RESOURCE_EXHAUSTED,
    "DEADLINE_EXCEEDED": _Code.DEADLINE_EXCEEDED,
    "CANCELLED": _Code.CANCELLED,
    "SHUTTING_DOWN": _Code.UNAVAILABLE,
}
_PLAIN: dict[grpc.StatusCode, type[errors.IpcError]] = {
    _Code.UNIMPLEMENTED: errors.UnknownMethod,
    _Code.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    _Code.CANCELLED: errors.Cancelled,
    _Code.UNAUTHENTICATED: errors.AccessDenied,
    _Code.PERMISSION_DENIED: errors.AccessDenied,
}


class Status(grpc.Status):  # type: ignore[misc, unused-ignore]
    """As `ServicerContext.abort_with_status` wants it."""

    def __init__(self, failure: Failure) -> None:
        self.code = _CODES.get(failure.code, _Code.UNKNOWN)
        self.details = _cut(failure.message, _TEXT)
        self.trailing_metadata = ((DETAILS, _details(failure, self.code, self.details)),)


def _details(failure: Failure, code: grpc.StatusCode, text: str) -> bytes:
    status = status_pb2.Status(code=code.value[0], message=text)
    info = {"type": failure.type} if failure.type else {}
    _add(status, error_details_pb2.ErrorInfo(reason=failure.code, domain=DOMAIN, metadata=info))
    if failure.retry_after is not None:
        seconds, rest = divmod(failure.retry_after, 1)
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(rest * 1e9))
        _add(status, error_details_pb2.RetryInfo(retry_delay=delay))
    if failure.traceback is not None:
        last = failure.traceback.encode(errors="replace")[-_TRACEBACK:].decode(errors="ignore")
        _add(status, error_details_pb2.DebugInfo(detail=last))
    return bytes(status.SerializeToString())


def _add(status: Any, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def _cut(text: str, size: int) -> str:
    data = text.encode(errors="replace")
    return data[:size].decode(errors="ignore")


def failure_of(trailing: Any) -> Failure | None:
    """What a server of ours said about it, or None."""
    found: Failure | None = None
    for key, value in trailing or ():
        if key != DETAILS:
            continue
        status = status_pb2.Status()
        try:
            status.ParseFromString(value)
        except Exception:  # protobuf's DecodeError: it is not for us
            return None
        info, retry, debug = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.DebugInfo()
        for detail in status.details:
            if detail.Unpack(info) and info.domain == DOMAIN:
                found = found or Failure(0, info.reason, status.message, info.metadata.get("type", ""))
            elif detail.Unpack(retry) and found is not None:
                found.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
            elif detail.Unpack(debug) and found is not None:
                found.traceback = debug.detail
    return found


def never_sent(code: grpc.StatusCode, text: str) -> bool:
    """The connection could not be made: nothing has happened at the server."""
    return code is _Code.UNAVAILABLE and (
        "failed to connect" in text.lower() or "dns resolution failed" in text.lower()
    )


#: What the core says of a certificate: of another authority, for another name.
_UNVERIFIED = ("certificate_verify_failed", "peer name", "verification check failed")


def error_of(error: Any, url: object, operation: str | None) -> errors.IpcError:
    """What an `RpcError`, of grpcio or of grpc.aio, means in our words. Raise it `from` the error."""
    code, text = error.code(), error.details() or ""
    failure = failure_of(error.trailing_metadata())
    where: dict[str, Any] = {"url": url, "operation": operation}
    if failure is not None:
        return failures.error_of(failure, url, operation)
    if code is _Code.UNAVAILABLE:
        if any(words in text.lower() for words in _UNVERIFIED):
            return errors.AccessDenied("the peer's certificate does not verify", hint="see ca=, server_name=", **where)
        if never_sent(code, text):
            return errors.NothingListening(f"nobody answers there: {text}", **where)
        if "cancelling all calls" in text.lower():  # what grpcio's servers say when they stop
            return errors.ShuttingDown("the server shut down before the call was done", **where)
        return errors.PeerDied(f"the connection is lost: {text}", **where)
    if code is _Code.RESOURCE_EXHAUSTED:
        if "message larger than max" in text.lower():
            return errors.MessageTooLarge(text, hint="raise limit= at both ends", **where)
        return errors.TargetBusy(text, **where)
    plain = _PLAIN.get(code)
    if plain is not None:
        return plain(text or code.name, **where)
    return errors.RemoteError(text, type=code.name, **where)
