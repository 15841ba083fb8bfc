"""grpc://, grpcs://, grpc+unix:// — gRPC, by grpcio and its asyncio side.

    grpc://127.0.0.1:50051       0 listens on a port that the system chooses: see `listener.url`
    grpcs://calc.example:50051   TLS. Listening needs cert= and key=, and asks for a client's certificate with client_ca=;
                                 connecting trusts ca= (else the system's), and checks the host's name (or server_name=)
    grpc+unix://name             a Unix socket of mode 0600 in the runtime directory; grpc+unix:///path is that path

A channel is one call of `/ipckit.v1.Channel/Open`, a stream of `google.protobuf.BytesValue` in both directions, on a
connection of its own. The messages could have been bare bytes; but a stock client in any language generates its code
from a .proto, and this one it can have in three lines, for two bytes a message:

    service Channel { rpc Open(stream google.protobuf.BytesValue) returns (stream google.protobuf.BytesValue); }

Promises: whole frames in order; the client's half-close and the server's OK are the goodbyes, anything else is a death,
reported at once; `close()` is immediate, and what was sent before goes out for `linger` more. Limits: gRPC's core drops
what it has received and nobody has read when a connection breaks; `buffer` bytes are read ahead for that reason. After a
fork a child cannot use gRPC if its parent did, and is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .. import errors
from .._capabilities import Capabilities
from .._options import duration, option, size
from .._spi import Link, Listener, Peer, Steps, Transport, Wait, Want
from .._url import Url
from ._grpc_place import (
    PlaceOptions,
    address_of,
    bind_unix,
    check,
    client_credentials,
    give_up,
    is_had,
    path_of,
    peer_of,
    server_credentials,
    settings_of,
    still_closing,
    target_of,
)

if TYPE_CHECKING:
    from ._grpc_home import IoThread
    from ._grpc_link import GrpcLink
    from ._unixsock import Name

METHOD = "/ipckit.v1.Channel/Open"
#: In the metadata of both sides: the largest frame that is taken.
LIMIT = "ipckit-limit"
#: How long a connection that is made waits for an answer: a listener that nobody accepts at is a listener all the same.
_GRACE = 0.05
_FOR_EVER = 365 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PlaceOptions):
    buffer: int = option(1 << 20, size, "bytes read ahead, and bytes accepted to be sent, on top of gRPC's own windows")
    linger: float = option(5.0, duration, "how long after close() and at exit what was sent may still go out")


class Grpc(Transport[Options]):
    capabilities: ClassVar[Capabilities] = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        handed_over=False,
        headers=True,
        redelivery=True,
        cross_machine=True,
        model="streams of messages over HTTP/2, opened like a procedure call",
        data="messages of bytes, in protobuf",
        use_case="services in many languages, through proxies and load balancers",
    )
    options: ClassVar[type[Any]] = Options
    requires = ("grpc",)
    extra = "grpc"
    calls = "ipckit.rpc.grpc"

    def capabilities_of(self, url: Url) -> Capabilities:
        if url.scheme == "grpcs":
            return replace(self.capabilities, encrypted=True)
        if url.scheme == "grpc+unix":
            return replace(self.capabilities, cross_machine=False, use_case="programs of one machine that speak gRPC")
        return self.capabilities

    def listen(self, url: Url, options: Options) -> Steps[Listener]:
        check(url)
        from ._grpc_home import grpc_home

        credentials = server_credentials(url, options)
        home = grpc_home(url, "listen")
        listener = GrpcListener(url, options, home)
        return (yield from home.steps(lambda: listener.start(credentials)))

    def connect(self, url: Url, options: Options) -> Steps[Link]:
        check(url)
        from ._grpc_home import grpc_home

        credentials = client_credentials(url, options)
        home = grpc_home(url, "connect")
        dialling = _Dialling(url, options, home, credentials)
        try:
            return (yield from home.steps(dialling.dial))
        except errors.Timeout as error:
            raise errors.NothingListening(dialling.why, url=url, operation="connect") from error


# -- connecting -------------------------------------------------------------------------------------------------------


class _Dialling:
    """Reaching a listener, over and over until there is one."""

    def __init__(self, url: Url, options: Options, home: IoThread, credentials: Any) -> None:
        self.why = "nobody listens there"
        self._url, self._options, self._home, self._credentials = url, options, home, credentials

    async def dial(self) -> GrpcLink:
        pause = 0.001
        while True:
            with target_of(self._url) as target:
                link = None if target is None else await self._attempt(target)
            if link is not None:
                return link
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)

    async def _attempt(self, target: str) -> GrpcLink | None:
        import grpc.aio

        from ._grpc_home import background
        from ._grpc_link import GrpcLink, map_grpc

        tuning = [*settings_of(self._options), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(target, tuning)
        else:
            if self._options.server_name is not None:
                tuning.append(("grpc.ssl_target_name_override", self._options.server_name))
            channel = grpc.aio.secure_channel(target, self._credentials, tuning)
        made = False
        try:
            metadata = grpc.aio.Metadata((LIMIT, str(self._options.limit)))
            call: Any = channel.stream_stream(METHOD)(metadata=metadata)
            await call.wait_for_connection()
            answer: Any = ()
            with contextlib.suppress(asyncio.TimeoutError):
                answer = await asyncio.wait_for(call.initial_metadata(), _GRACE)
            if call.done():
                await call.read()  # raises what it ended with
                return None
            peer = Peer(address=address_of(self._url))
            link = GrpcLink(self._home, self._url, path_of(self._url), self._options, peer, channel)
            link.peer_takes(answer)
            background(self._carry(link, channel, call))
            made = True
            return link
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            if "CERTIFICATE_VERIFY_FAILED" in details or "peer name" in details.lower():
                raise errors.AccessDenied(
                    "the peer's certificate does not verify", url=self._url, operation="connect", hint="see ca="
                ) from error
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                self.why = f"somebody else answers there: {map_grpc(error, None, '').message}"
            elif "handshake" in details.lower():
                self.why = "somebody accepts connections there, but the handshake fails"
            return None
        finally:
            if not made:
                await channel.close()

    async def _carry(self, link: GrpcLink, channel: Any, call: Any) -> None:
        try:
            await link.carry(call.read, call.write, call.done_writing)
        finally:
            await channel.close()


# -- listening --------------------------------------------------------------------------------------------------------


class GrpcListener:
    """A gRPC server with one method, and the streams that nobody has accepted yet."""

    def __init__(self, url: Url, options: Options, home: IoThread) -> None:
        from ._bell import Bell

        self.url = url
        self._options, self._home = options, home
        self._arrivals: deque[GrpcLink] = deque()
        self._bell = Bell()
        self._closed = False
        self._name: Name | None = None
        self._server: Any = None
        self._closing: asyncio.Future[None] | None = None

    @property
    def native(self) -> Any:
        """The grpc.aio.Server, for more services on the same port."""
        return self._server

    async def start(self, credentials: Any) -> Self:
        import grpc.aio

        from ._grpc_home import background

        if self.url.hosts and self.url.scheme != "grpc+unix":
            while still_closing(self.url):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        tuning = [*settings_of(self._options), ("grpc.so_reuseport", 0)]
        server = self._server = grpc.aio.server(options=tuning)
        server.add_generic_rpc_handlers((_handler(self._stream),))
        try:
            if self.url.scheme == "grpc+unix":
                self._name = bind_unix(server, self.url)
            else:
                place = str(self.url.host)
                port = server.add_secure_port(place, credentials) if credentials else server.add_insecure_port(place)
                self.url = self.url.with_port(port)
            await server.start()
            if self.url.hosts:
                is_had(self.url)
            background(self._serve())
        except BaseException as error:
            if self._name is not None:
                self._name.release()
            await server.start()  # one that was never started cannot be stopped
            await server.stop(None)
            if isinstance(error, RuntimeError):
                raise errors.AddressInUse("gRPC cannot bind there", url=self.url, operation="listen") from error
            raise
        return self

    async def _stream(self, requests: object, context: Any) -> None:
        """One peer, as gRPC's handler: returning is the goodbye."""
        import grpc

        from ._grpc_link import GrpcLink

        if self._closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "nobody listens here any more")
        link = GrpcLink(self._home, self.url, path_of(self.url), self._options, peer_of(context.peer()), context)
        link.peer_takes(context.invocation_metadata() or ())
        await context.send_initial_metadata(((LIMIT, str(self._options.limit)),))
        self._arrivals.append(link)
        self._bell.ring()
        fault = await link.carry(context.read, context.write, None)
        if fault is not None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, fault)
        if link.dead:
            raise asyncio.CancelledError

    def try_accept(self) -> Link | None:
        if self._closed:
            raise errors.Closed("this listener is closed", url=self.url, operation="accept")
        return self._arrivals.popleft() if self._arrivals else None

    def arm(self, want: Want) -> Wait:
        return Wait((self._bell.announce(),))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._name is not None:
            self._name.release()
        elif self.url.hosts:
            give_up(self.url)
        self._home.do(self._stop)

    def _stop(self) -> None:
        self._bell.close()  # here, where it is rung
        for link in self._arrivals:
            link.close()
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    async def _serve(self) -> None:
        """Until we are closed, or the loop ends under us: then nobody could stop the server any more."""
        self._closing = asyncio.get_running_loop().create_future()
        try:
            await self._closing
            # No new streams from now on; those that there are live on.
            await asyncio.shield(asyncio.ensure_future(self._server.stop(_FOR_EVER)))
        except asyncio.CancelledError:
            await self._server.stop(self._options.linger if self._closed else None)

    def abandon(self) -> None:
        from ._grpc_home import park

        park(self.url, path_of(self.url))


def _handler(stream: Any) -> Any:
    import grpc

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(stream) if details.method == METHOD else None

    return Handler()


TRANSPORT = Grpc()
