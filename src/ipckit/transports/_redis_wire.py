"""One connection to a Redis server, without a thread and without waiting.

redis-py opens it (TCP, TLS or a Unix socket; AUTH, SELECT), in a thread that lives as long as that takes, because its
connect blocks. From then on the socket is non-blocking and ours: commands are packed and replies parsed by hiredis, each
reply goes to the handler that its command came with, and `arm` says what to sleep on. redis-py's own reading and writing
would set the socket's timeout twice in every call, and retry XADD by itself (12 silent duplicates in 20 broker kills).
"""

from __future__ import annotations

import os
import select
import ssl
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from .. import errors
from .._spi import Steps, Wait
from .._url import Url
from ._oserror import SCARCE, map_oserror

T = TypeVar("T")
Word: TypeAlias = bytes | str | int
Handler: TypeAlias = Callable[[Any], None]

_CHUNK = 64 << 10
_UNFINISHED = object()
_NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

#: First words of error replies, and what they are to us. Anything else is an IpcError with the server's own words.
_REFUSALS: tuple[tuple[tuple[str, ...], type[errors.IpcError]], ...] = (
    (("NOAUTH", "WRONGPASS", "NOPERM", "ERR AUTH", "ERR invalid password"), errors.AccessDenied),
    (("OOM",), errors.ResourceLimit),
    (("LOADING", "MASTERDOWN", "READONLY", "CLUSTERDOWN", "MOVED", "NOREPLICAS", "TRYAGAIN"), errors.PeerError),
    (("WRONGTYPE",), errors.ConfigError),  # somebody keeps something else under this name
)


def map_redis(error: BaseException, url: Url, operation: str) -> errors.IpcError:
    """The one place where redis-py's and hiredis' errors, and error replies, become ours. Raise it `from` the error."""
    import redis

    text = str(error) or type(error).__name__
    for words, kind in _REFUSALS:
        if text.startswith(words):
            return kind(text, url=url, operation=operation)
    if isinstance(error, (redis.AuthenticationError, redis.exceptions.AuthorizationError)):
        return errors.AccessDenied(text, url=url, operation=operation)
    cause = error.__cause__ or error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return errors.AccessDenied(text, url=url, operation=operation, hint="ca= names the authority to trust")
    if isinstance(error, OSError) or isinstance(cause, OSError):
        code = error.errno if isinstance(error, OSError) else getattr(cause, "errno", None)
        if code in SCARCE:
            return map_oserror(OSError(code, os.strerror(code or 0)), url, operation)
    if isinstance(error, (redis.ConnectionError, redis.TimeoutError, OSError)):
        return errors.NothingListening(f"no Redis server answers: {text}", url=url, operation=operation)
    return errors.IpcError(f"the Redis server says: {text}", url=url, operation=operation)


class Wire:
    """A connection after its handshake. One thread at a time."""

    def __init__(self, url: Url, connection: Any, number: int) -> None:
        import hiredis

        self.number = number  # CLIENT ID: how the server, and so the peer, knows that we live
        self._url = url
        self._connection = connection
        self._sock = connection._sock
        self._sock.setblocking(False)
        self._fd: int = self._sock.fileno()
        self._tls = isinstance(self._sock, ssl.SSLSocket)
        self._pack: Callable[[Any], bytes] = hiredis.pack_command
        self._reader = hiredis.Reader(notEnoughData=_UNFINISHED)
        self._handlers = deque[Handler | None]()
        self._out = deque[bytes | memoryview]()
        self.held = 0  # bytes in _out
        self.pushed: Handler | None = (
            None  # after HELLO 3: gets what the server says unasked, [b"message", channel, body]
        )
        self._lost: errors.PeerError | None = None

    def tell(self, handler: Handler | None, *words: Word) -> None:
        """Queue a command; `handler` gets the reply (an exception object for an error). `pump` sends."""
        packed = self._pack(words)
        self._out.append(packed)
        self.held += len(packed)
        self._handlers.append(handler)

    @property
    def waiting(self) -> int:
        """Commands without a reply."""
        return len(self._handlers)

    @property
    def fd(self) -> int:
        return self._fd

    def push(self) -> None:
        """`pump` without looking for replies: for a command whose reply cannot be there yet."""
        if self._lost is None and self._out:
            try:
                self._send()
            except OSError as error:
                self._lose(error)

    def pump(self, unasked: bool = False) -> None:
        """Send what is held, and hand out the replies that are there. Raises PeerError when the connection is lost.

        `unasked`: look at the connection also while no reply is due, so that its end is heard by who sleeps on it.
        """
        if self._lost is not None:
            raise errors.PeerError(self._lost.message, url=self._url) from self._lost.__cause__
        try:
            if self._out:
                self._send()
            if self._handlers or unasked:
                self._receive()
        except _NOT_NOW:
            return
        except OSError as error:
            self._lose(error)

    def _send(self) -> None:
        while self._out:
            first = b"".join(self._out) if len(self._out) > 1 and self.held <= _CHUNK else self._out[0]
            if first is not self._out[0]:
                self._out.clear()
                self._out.append(first)
            try:
                sent = self._sock.send(first)
            except _NOT_NOW:
                return
            self.held -= sent
            if sent == len(first):
                self._out.popleft()
            else:
                self._out[0] = memoryview(first)[sent:]

    def _receive(self) -> None:
        import hiredis

        while True:
            data = self._sock.recv(_CHUNK)
            if not data:
                raise ConnectionResetError("the Redis server closed the connection")
            self._reader.feed(data)
            try:
                while (reply := self._reader.gets()) is not _UNFINISHED:
                    unasked = self.pushed is not None and isinstance(reply, hiredis.PushNotification)
                    # That a subscription begins is pushed too, in the place of the reply that SUBSCRIBE does not have.
                    unasked = unasked and reply[0] == b"message"
                    handler = self.pushed if unasked else self._handlers.popleft()
                    if handler is not None:
                        handler(reply)
            except (hiredis.ProtocolError, IndexError) as error:
                self._lose(error)
            if len(data) < _CHUNK and not self._tls:
                return

    def _lose(self, error: Exception) -> None:
        self._lost = errors.PeerError(f"the connection to the Redis server is lost: {error}", url=self._url)
        raise self._lost from error

    def arm(self) -> Wait:
        """Ready when `pump` gets further."""
        events = (select.POLLIN if self._handlers else 0) | (select.POLLOUT if self._out else 0)
        return Wait(((self._fd, events),)) if events and self._lost is None else Wait(())

    def ask(self, *words: Word) -> Steps[Any]:
        """One command and its reply. Raises what the server's refusal means."""
        answer: list[Any] = []
        self.tell(answer.append, *words)
        while True:
            self.pump()
            if answer:
                break
            yield self.arm()
        if isinstance(answer[0], Exception):
            raise map_redis(answer[0], self._url, str(words[0])) from answer[0]
        return answer[0]

    def close(self) -> None:
        """Send what goes at once, then let go.

        Unread replies would make the kernel reset the connection, and the reset could overtake our last command.
        """
        with suppress(errors.PeerError):
            self.pump()
        self._connection.disconnect()

    def abandon(self) -> None:
        self._sock.close()
        self._connection._sock = None


# -- opening ----------------------------------------------------------------------------------------------------------


def open_wire(url: Url, connect: Callable[[], Any]) -> Steps[Wire]:
    """`connect` makes a redis-py Connection; a thread opens it."""

    def work() -> Wire:
        connection = None
        try:
            connection = connect()
            connection.connect()
            connection.send_command("CLIENT", "ID")
            return Wire(url, connection, int(connection.read_response()))
        except BaseException as error:
            if connection is not None:
                connection.disconnect()
            if isinstance(error, Exception) and not isinstance(error, errors.IpcError):
                raise map_redis(error, url, "open") from error
            raise

    return (yield from _elsewhere(work, Wire.close))


def _elsewhere(work: Callable[[], T], discard: Callable[[T], None]) -> Steps[T]:
    """Do blocking work in a thread of its own. Whoever gives up waiting for it leaves it the result to discard."""
    bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    mutex = threading.Lock()
    outcome: list[tuple[T | None, BaseException | None]] = []
    given_up = False

    def body() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with mutex:
            if not given_up:
                outcome.append((result, failure))
                os.eventfd_write(bell, 1)
                return
        os.close(bell)
        if result is not None:
            discard(result)

    thread = threading.Thread(target=body, name="ipckit-open", daemon=True)
    thread.start()
    try:
        while not outcome:
            yield Wait(((bell, select.POLLIN),))
    except BaseException:
        with mutex:
            given_up = not outcome
        if not given_up:
            os.close(bell)
            if outcome[0][0] is not None:
                discard(outcome[0][0])
        raise
    thread.join()
    os.close(bell)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    assert result is not None
    return result
