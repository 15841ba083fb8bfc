"""One root, and below it what happened: to which URL, in which operation, and what to do next.

The tree separates what a caller can act on. *We* closed it (`Closed`) is not *they* closed it (`PeerClosed`),
and neither is *they were killed* (`PeerDied`). Where Python already has a word (`ValueError`, `ConnectionError`,
`TimeoutError`, `ImportError`), the class is one of those as well, so that code which never heard of ipckit
catches it by the name it knows.

Foreign exceptions (`OSError`, a broker client's) cross into this tree at one place per transport, always
`raise ... from cause`.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import BrokenBarrierError
from typing import Any


class IpcError(Exception):
    """Anything that ipckit raises on purpose.

    Attributes:
        message: what happened, without the URL.
        url: where, with its secrets removed; None when there is no URL yet.
        operation: the verb that was called ("connect", "recv", ...), or None.
        hint: what to do about it, or None.
    """

    def __init__(
        self, message: str = "", *, url: object = None, operation: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.url = None if url is None else str(url)
        self.operation = operation
        self.hint = hint

    def __str__(self) -> str:
        where = " ".join(part for part in (self.operation, self.url) if part)
        text = f"{where}: {self._told}" if where else self._told
        return f"{text} ({self.hint})" if self.hint else text

    @property
    def _told(self) -> str:
        return self.message


# -- the address ------------------------------------------------------------------------------------------------


class AddressError(IpcError):
    """The URL does not lead anywhere."""


class BadUrl(AddressError, ValueError):
    """The URL cannot be read."""


class UnknownScheme(AddressError, ValueError):
    """No transport has this scheme."""


class AddressInUse(AddressError):
    """A live listener has this name already."""


class NothingListening(AddressError, ConnectionError):
    """Nobody listened at this address before the timeout."""


class NotFound(AddressError, FileNotFoundError):
    """Nothing has this name."""


# -- the configuration ------------------------------------------------------------------------------------------


class ConfigError(IpcError):
    """What was asked for cannot be had in this form, here."""


class MissingDependency(ConfigError, ImportError):
    """The transport's client library is not installed; the hint names the extra that brings it."""


class Unsupported(ConfigError):
    """The transport does not do this; its capabilities say so."""


class BadOption(ConfigError, ValueError):
    """An option that the transport does not have, or a value that it cannot take."""


class ResourceLimit(ConfigError):
    """The system's limit (queues, descriptors, memory) stands in the way; the hint says how to raise it."""


class AccessDenied(ConfigError, PermissionError):
    """The name belongs to somebody else, or its mode lets others in."""


# -- the peers --------------------------------------------------------------------------------------------------


class Closed(IpcError):
    """We closed this endpoint."""


class PeerError(IpcError, ConnectionError):
    """The other side is gone. What it had committed before has been delivered."""


class PeerClosed(PeerError):
    """The other side closed in order."""


class PeerDied(PeerError):
    """The other side ended without closing.

    Attributes:
        pid: its process id where the transport knows it, else None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
        pid: int | None = None,
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.pid = pid


# -- the message ------------------------------------------------------------------------------------------------


class Timeout(IpcError, TimeoutError):
    """The time was up. Nothing of the operation has happened, unless it is an `OutcomeUnknown`."""


class OutcomeUnknown(Timeout):
    """The message left us, and nobody said that it arrived.

    Attributes:
        message_id: sending again with this id makes no duplicate; None where the transport has no ids, and then the
            hint says what will happen to the message.
        message_ids: of a batch, the ids of all that left us, in their order; what comes after them was not sent.
    """

    def __init__(
        self,
        message: str = "",
        *,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
        message_id: str | None = None,
        message_ids: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.message_id = message_id
        self.message_ids = message_ids or (() if message_id is None else (message_id,))


class QueueFull(IpcError):
    """The queue is full and `on_full=error`."""


class MessageTooLarge(IpcError, ValueError):
    """The message is above the limit of the endpoint (`limit=`) or of the transport."""


class ProtocolError(IpcError):
    """The peer sent what its protocol does not allow. The connection is closed."""


class CodecError(ProtocolError):
    """The bytes are not what the codec can read, or the value not what it can write.

    Attributes:
        undecoded: of a queue's or topic's `recv`: the message as it came. Its value is bytes; settle it like any other.
    """

    undecoded: Any = None


class SchemaError(ProtocolError):
    """The value is not of the declared type; the message has the path (`$.qty: expected int`).

    Attributes:
        undecoded: as of `CodecError`.
    """

    undecoded: Any = None


# -- remote calls -----------------------------------------------------------------------------------------------


class RpcError(IpcError):
    """A remote call failed."""


class RemoteError(RpcError):
    """The remote method raised.

    Attributes:
        type: the class of what it raised ("ValueError", "shop.OutOfStock"); `message` is its text.
        traceback: as text, where the server was asked to tell (`tracebacks=True`), else None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        type: str = "Exception",
        traceback: str | None = None,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.type = type
        self.traceback = traceback

    @property
    def _told(self) -> str:
        return f"{self.type}: {self.message}"


class UnknownMethod(RpcError, LookupError):
    """The target has no such method, and nothing takes messages of this type."""


class UnknownTarget(RpcError, LookupError):
    """Nothing is exposed under this name."""


class RateLimited(RpcError):
    """The server takes no more requests from here for now.

    Attributes:
        retry_after: seconds until it takes one again, where it said so, else None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        retry_after: float | None = None,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.retry_after = retry_after


class TargetBusy(RpcError):
    """As many calls are under way as the server allows. This one was not begun: it may be tried again."""


class DeadlineExceeded(RpcError, TimeoutError):
    """The call was not done before its deadline. Whether it took effect is unknown."""


class Cancelled(RpcError):
    """The call was cancelled, by the caller or because the caller is gone."""


class ShuttingDown(RpcError):
    """The server takes no new calls. This one was not begun: it may be tried elsewhere."""


# -- synchronisation --------------------------------------------------------------------------------------------


class SyncError(IpcError):
    """A cross-process synchronisation primitive cannot go on."""


class OwnerDied(SyncError):
    """The lock is abandoned: its owner died, and what it guards may be half done. The lock is *not* held.

    Attributes:
        pid: the process that died, where it is known, else None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
        pid: int | None = None,
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.pid = pid


class NotOwner(SyncError, RuntimeError):
    """Released by one who does not hold it: another thread or process, or nobody does."""


class Deadlock(SyncError):
    """Waiting would never end: the caller waits for itself, perhaps around a corner.

    Attributes:
        cycle: with `debug=True`, (pid, thread, lock) of each who waits for the next, the caller first.
    """

    def __init__(
        self,
        message: str = "",
        *,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
        cycle: tuple[tuple[int, int, str], ...] = (),
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.cycle = cycle


class LeaseLost(SyncError):
    """The lease ran out, or the broker forgot it, while the lock was held: somebody else may have it since.

    Attributes:
        token: the fencing token of the hold that was lost. What checks tokens has let nothing of it in after its successor.
    """

    def __init__(
        self,
        message: str = "",
        *,
        url: object = None,
        operation: str | None = None,
        hint: str | None = None,
        token: int | None = None,
    ) -> None:
        super().__init__(message, url=url, operation=operation, hint=hint)
        self.token = token


class BrokenBarrier(SyncError, BrokenBarrierError):
    """A party died, gave up or aborted: nobody can pass until somebody calls `reset()`."""


# -- fork -------------------------------------------------------------------------------------------------------


class ForkedError(IpcError):
    """An endpoint that was opened before a fork was used in the child. Open one there."""


def likeliest(name: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
    """A hint for a name that does not exist. What finds it is imported now: only mistakes pay for it."""
    from difflib import get_close_matches

    close = get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else otherwise
