"""One client of nats-py on its home loop: opened, shared by mailboxes, watched for breaks, closed by its last user.

Everything that is particular to nats-py is in this file, and its exceptions become ours in `map_nats`. Two of its
habits are avoided, because they cost more than all else in a message: a task and a queue for each subscription
(`_Tap`), and a task for each publish (`_now`); and one because it is deaf after it: a ping that was given up (`_Pong`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import random
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .. import _options, errors
from .._options import option
from .._spi import Steps
from .._url import Url
from ._bridge import Home, find_home, forget
from ._natsreader import shorten

if TYPE_CHECKING:
    from nats.aio.client import Client

log = logging.getLogger("ipckit.nats")

TICK = 0.1  # seconds; the shortest time between two questions to the server whether a peer is still there
_PATIENCE = 10.0  # seconds that a server may take for a pong
_RECONNECT = (0.05, 2.0)  # seconds before an attempt to come back: doubled each time, and half of it by chance


def _window(text: str) -> int:
    window = _options.size(text)
    if not 4096 <= window <= 1 << 30:
        raise ValueError("a size from 4KiB to 1GiB")
    return window


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsOptions(_options.LinkOptions):
    window: int = option(512 << 10, _window, "bytes under way to a peer that does not receive, before send waits")
    token: str | None = option(None, _options.text, "token to log in with")
    creds: str | None = option(None, _options.text, "credentials file to log in with (needs the package nkeys)")
    cafile: str | None = option(None, _options.text, "nats+tls: certificates to trust, instead of the system's")
    certfile: str | None = option(None, _options.text, "nats+tls: our certificate, where the server asks for one")
    keyfile: str | None = option(None, _options.text, "nats+tls: its key")


# -- the connection -------------------------------------------------------------------------------------------------


def map_nats(error: BaseException, url: Url, operation: str) -> errors.IpcError:
    """The only place where the errors of nats-py, of its sockets and of TLS become ours."""
    import nats.errors

    text = str(error) or type(error).__name__
    if isinstance(error, errors.IpcError):
        return error
    if isinstance(error, nats.errors.AuthorizationError) or "authorization violation" in text.lower():
        return errors.AccessDenied("the server refuses the login", url=url, operation=operation)
    if "permissions violation" in text.lower():
        return errors.AccessDenied(text, url=url, operation=operation, hint="see the permissions of this user")
    if isinstance(error, ssl.SSLError):
        return errors.AccessDenied(f"no TLS with this server: {text}", url=url, operation=operation)
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return errors.BadOption(text, url=url, operation=operation)
    if isinstance(error, OSError | asyncio.TimeoutError | nats.errors.NoServersError | nats.errors.TimeoutError):
        return errors.NothingListening(f"no NATS server answers: {text}", url=url, operation=operation)
    return errors.PeerError(f"the connection to the NATS server failed: {text}", url=url, operation=operation)


class Ringing(Protocol):
    """A mailbox, as its connection knows it."""

    def ring(self) -> None: ...


class Probing(Protocol):
    """Somebody who asks the server, now and then, whether a peer is there."""

    key: str

    def tick(self) -> None: ...
    def verdict(self, *, nobody: bool) -> None: ...


class Connection:
    """One client, shared by a listener and the links that it accepted. The last user closes it."""

    def __init__(self, home: Home, url: Url) -> None:
        import nats.aio.client

        self.home = home
        self.url = url
        self.client: Client = nats.aio.client.Client()
        self.cut = 0  # how often the connection was lost: what lived before does not live after
        self.denied: str | None = None  # what the server has forbidden us
        self.error: BaseException | None = None  # the last that the client told us
        self.mailboxes = set[Ringing]()
        self.reconnects = 0
        self.connected: Callable[[], None] | None = None  # called on the loop after each reconnection
        self.last_words: Callable[[], Awaitable[None]] | None = None  # before the connection is closed in order
        self._attempts = 0
        self._probing: dict[str, Probing] = {}
        self._verdicts = ""  # prefix of the subjects where the server says that nobody is there
        self._users = 1
        self._counting = threading.RLock()  # the garbage collector may close a link in the midst of this
        self._life: asyncio.Task[None] | None = None
        self._confirming: asyncio.Task[None] | None = None
        self._stream: asyncio.WriteTransport | None = None

    async def open(self, options: NatsOptions, *, reconnect: bool) -> None:
        """Connect. Raises what nats-py raises."""
        tls = _tls_context(options) if self.url.scheme == "nats+tls" else None
        settings: dict[str, Any] = dict(
            name="ipckit",
            error_cb=self._on_error,
            disconnected_cb=self._on_cut,
            closed_cb=self._on_cut,
            reconnected_cb=self._on_reconnected,
            reconnect_to_server_handler=self._choose_server,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0.01,
            connect_timeout=5,
            ping_interval=20,
            no_echo=True,
            tls=tls,
            pending_size=max(8 << 20, 8 * options.window),  # so that it never makes a publisher wait
            **_login(self.url, options, tls),
        )
        await self.client.connect([f"nats://{_authority(host.name, host.port)}" for host in self.url.hosts], **settings)
        if tls is not None and not tls.used:
            raise ssl.SSLError("the server offers none")
        if reconnect:
            self.client.options.update(allow_reconnect=True, max_reconnect_attempts=-1, reconnect_time_wait=0.25)
        await self._on_connected()
        self._verdicts = self.client.new_inbox() + "."
        await self.tap(self._verdicts + "*", self._on_verdict)
        self._life = self.home.loop.create_task(self._live())

    async def tap(self, subject: str, deliver: Callable[[Any], None], queue: str = "") -> Any:
        """Subscribe. Each message is handed over right where the client has read it; `deliver` must not raise.

        `queue`: each message goes to one of those who subscribe with the same name.
        """
        tap: Any = _Tap(deliver)
        return await self.client.subscribe(subject, queue, future=tap)

    def publish(self, subject: str, payload: bytes, reply: str = "") -> None:
        """On the loop only. The client writes it in the next turn of the loop; if it cannot, the connection is cut."""
        try:
            _now(self.client.publish(subject, payload, reply))
        except Exception as error:
            self.error = error
            self._break()

    def send(self, subject: str, payload: bytes) -> None:
        """On the loop only, as `publish`, but written to the socket at once: a message then costs a task and a turn less.

        The client has no such call, so this takes the stream that it does not show. Where there is none to be found, or the
        client holds something that has to go before, it is a `publish`. The subject must be one that we have made.
        """
        if self._stream is None or self.client.pending_data_size or not self.client.is_connected:
            self.publish(subject, payload)
        else:
            self._stream.write(b"".join((f"PUB {subject} {len(payload)}\r\n".encode(), payload, b"\r\n")))

    def write(self, commands: bytes) -> bool:
        """On the loop only: protocol lines to the socket at once, or False while there is no connection."""
        if self._stream is None or self._stream.is_closing() or not self.client.is_connected:
            return False
        self._stream.write(commands)
        return True

    @property
    def unwritten(self) -> int:
        """Bytes that the socket has not taken."""
        return 0 if self._stream is None else self._stream.get_write_buffer_size()

    def unsubscribe(self, subscription: Any) -> None:
        """On the loop only."""
        if not self.client.is_closed:
            _now(subscription.unsubscribe())

    @property
    def written(self) -> bool:
        """Everything published has gone to the socket."""
        return not (
            self.client.pending_data_size or (self._stream is not None and self._stream.get_write_buffer_size())
        )

    async def round_trip(self) -> None:
        """Return when the server has read all that was published, and we what it says to it."""
        pause = 0.0
        while self.client.pending_data_size:  # the client's ping overtakes what it has not yet written
            await asyncio.sleep(pause)
            pause = 0.001
        if not self.client.is_connected:
            await self.client.flush()  # nobody to ask: it returns, or raises where there never will be
            return
        # As its `flush`, which must not be cancelled: the pong would then end the client's reader.
        pong = _Pong()
        await self.client._send_ping(pong)
        async with asyncio.timeout(_PATIENCE):
            await pong

    def confirm(self) -> None:
        """On the loop: ring when the server has read what was published."""

        async def confirm() -> None:
            try:
                with contextlib.suppress(Exception):  # a broken connection is told elsewhere
                    await self.round_trip()
            finally:
                self._confirming = None
                self.ring()

        if self._confirming is None:
            self._confirming = self.home.loop.create_task(confirm())

    def probe(self, subject: str, payload: bytes, key: str) -> None:
        """Publish something; if nobody gets it, the server tells `key` so."""
        self.publish(subject, payload, self._verdicts + key)

    def check(self, cut: int, operation: str) -> None:
        """Raise unless the connection has been whole since it was cut for the `cut`th time."""
        if self.cut != cut or self.home.broken:
            raise self.broken(operation)
        if self.denied is not None:
            raise errors.AccessDenied(self.denied, url=self.url, hint="see the permissions of this user")

    def broken(self, operation: str | None = None) -> errors.PeerError:
        what = (
            "the client was interrupted in the midst of its work"
            if self.home.broken
            else "the connection to the NATS server was lost, and perhaps messages with it"
        )
        error = errors.PeerError(what, url=self.url, operation=operation)
        error.__cause__ = self.error
        return error

    # what the client tells

    async def _on_error(self, error: Exception) -> None:
        self.error = error
        log.debug("%s: %s: %s", self.url, type(error).__name__, error)
        if "permissions violation" in str(error).lower():
            self.denied = str(error)
            self.ring()

    async def _on_connected(self) -> None:
        self._stream = _stream(self.client)
        shorten(self.client, self.home)

    async def _on_reconnected(self) -> None:
        await self._on_connected()
        self._attempts = 0
        self.reconnects += 1
        log.info("%s: connected again", self.url)
        if self.connected is not None:
            self.connected()
        self.ring()

    def _choose_server(self, servers: list[Any], _info: object) -> tuple[Any, float]:
        """Which server to try next, and after how many seconds: not all clients of a dead server at once."""
        self._attempts += 1
        pause = min(_RECONNECT[0] * 2 ** min(self._attempts, 10), _RECONNECT[1])
        return servers[self._attempts % len(servers)], pause * random.uniform(0.5, 1.0)

    async def _on_cut(self) -> None:
        if self._life is not None and not self.client.is_closed:
            log.warning("%s: the connection to the NATS server was lost; connecting again", self.url)
        self._break()

    def _break(self) -> None:
        self.cut += 1
        self._stream = None
        self.ring()

    def _on_verdict(self, message: Any) -> None:
        probing = self._probing.get(message.subject.rpartition(".")[2])
        if probing is not None:
            probing.verdict(nobody=(message.headers or {}).get("Status") == "503")
            self.ring()

    def ring(self) -> None:
        for mailbox in tuple(self.mailboxes):
            mailbox.ring()

    async def _live(self) -> None:
        try:
            while True:
                await asyncio.sleep(TICK)
                if self.client.is_connected:
                    for probing in tuple(self._probing.values()):
                        probing.tick()
        finally:
            await self.client.close()  # also when the loop ends before its last user

    # who uses it

    def enter(self, probing: Probing | None = None) -> None:
        with self._counting:
            self._users += 1
        if probing is not None:
            self._probing[probing.key] = probing

    def leave(self, probing: Probing | None = None) -> None:
        if probing is not None:
            self._probing.pop(probing.key, None)
        with self._counting:
            self._users -= 1
            last = not self._users
        if last:
            self.home.close(self._farewell, self._let_go)

    async def _farewell(self) -> None:
        if self.last_words is not None and self.client.is_connected:
            await self.last_words()
        if self._life is not None:
            self._life.cancel()  # it closes the client: not before the last word
            await asyncio.gather(self._life, return_exceptions=True)
        await self.client.close()

    def _let_go(self) -> None:
        stream = _stream(self.client)
        if stream is not None and not self.home.loop.is_closed():
            stream.abort()
        else:
            forget(_descriptors(self.client))

    def abandon(self) -> None:
        self.home.abandon()
        forget(_descriptors(self.client))


class _Tap:
    """What `subscribe(future=)` takes, used for more than one message.

    The client sets the result of that future where it reads the socket. Its callbacks instead go through a queue and a task:
    half of the cost of a message.
    """

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        self.set_result = deliver

    def cancelled(self) -> bool:
        return False


class _Pong(asyncio.Future[bool]):
    """What the client resolves when a pong comes, also where nobody waits for it any more."""

    def set_result(self, result: bool) -> None:
        if not self.done():
            super().set_result(result)


def _now(coroutine: Coroutine[Any, Any, object]) -> None:
    """Run a coroutine of the client that only appends to its buffers, without a task."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()  # it waits for the socket, with our bytes in its buffer already


def _stream(client: Client) -> asyncio.WriteTransport | None:
    """The transport of asyncio under the client, which it does not show."""
    writer = getattr(getattr(client, "_transport", None), "_io_writer", None)
    return writer.transport if isinstance(writer, asyncio.StreamWriter) else None


def _descriptors(client: Client) -> list[int]:
    stream = _stream(client)
    sock = None if stream is None else stream.get_extra_info("socket")
    return [] if sock is None or sock.fileno() < 0 else [sock.fileno()]


def _authority(name: str, port: int | None) -> str:
    return f"{f'[{name}]' if ':' in name else name}:{port or 4222}"


class _TlsContext(ssl.SSLContext):
    """Knows whether it has been used: nats-py speaks without TLS to a server that offers none."""

    used = False

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        self.used = True
        return super().wrap_bio(*args, **kwargs)


def _tls_context(options: NatsOptions) -> _TlsContext:
    context = _TlsContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies, and checks the host name
    if options.cafile:
        context.load_verify_locations(options.cafile)
    else:
        context.load_default_certs()
    if options.certfile:
        context.load_cert_chain(options.certfile, options.keyfile)
    return context


def _login(url: Url, options: NatsOptions, tls: _TlsContext | None) -> dict[str, Any]:
    def secret(text: str) -> str | Callable[[], str]:
        def reveal() -> str:
            if tls is None or not tls.used:
                raise ssl.SSLError("the server offers none, and the login is not for everybody to read")
            return text

        return text if tls is None else reveal

    if options.creds:
        if importlib.util.find_spec("nkeys") is None:
            raise errors.MissingDependency(
                "creds= needs the package nkeys", url=url, hint='pip install "nats-py[nkeys]"'
            )
        return {"user_credentials": options.creds}
    if options.token:
        return {"token": secret(options.token)}
    if url.user and url.password is not None:
        return {"user": url.user, "password": secret(url.password)}
    return {}


def connect(url: Url, options: NatsOptions, operation: str, *, reconnect: bool = False) -> Steps[Connection]:
    """A connection with one user: the caller."""
    connection = Connection((yield from find_home()), url)
    try:
        yield from connection.home.steps(lambda: connection.open(options, reconnect=reconnect))
    except BaseException as error:
        connection.leave()
        if isinstance(error, errors.IpcError) or not isinstance(error, Exception | asyncio.CancelledError):
            raise
        # NoServersError says only that there is none left to try; what happened to the last one was told before.
        cause = connection.error if type(error).__name__ == "NoServersError" and connection.error else error
        raise map_nats(cause, url, operation) from cause
    return connection
