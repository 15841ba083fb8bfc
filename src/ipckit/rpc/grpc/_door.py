"""What the two servers share: the port or name, what gRPC's core is told, and a call's headers and messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from ... import errors
from ..._spi import Peer, Steps, Wait
from ..._url import Url
from ...transports import _grpc_home, _grpc_place
from ...transports._grpc_place import PlaceOptions
from .._limits import ServerOptions
from .._site import BUILT_IN


class Door:
    """Where a server is reached."""

    def __init__(self, url: Url, options: PlaceOptions) -> None:
        _grpc_place.check(url)
        _grpc_home.use(url, "serve")
        self.url, self.options = url, options
        self._credentials = _grpc_place.server_credentials(url, options)
        self._name: Any = None

    def taking(self) -> Steps[None]:
        """Until the port is free that gRPC is still closing. Raises AddressInUse."""
        if self.url.scheme != "grpc+unix":
            while _grpc_place.still_closing(self.url):
                yield Wait((), 0.01)

    def bind(self, server: Any) -> Url:
        """Take it for this server. Returns the URL, with the port that the system chose."""
        if self.url.scheme == "grpc+unix":
            self._name = _grpc_place.bind_unix(server, self.url)
            return self.url
        place = str(self.url.host)
        try:
            if self._credentials is not None:
                port = server.add_secure_port(place, self._credentials)
            else:
                port = server.add_insecure_port(place)
        except RuntimeError as error:
            raise errors.AddressInUse("gRPC cannot bind there", url=self.url, operation="serve") from error
        _grpc_place.is_had(self.url)
        self.url = self.url.with_port(port)
        return self.url

    def close(self) -> None:
        if self._name is not None:
            self._name.release()
        else:
            _grpc_place.give_up(self.url)

    def abandon(self) -> None:
        """In a forked child."""
        _grpc_home.park(self.url, _grpc_place.path_of(self.url))

    def check_limits(self, serving: ServerOptions) -> None:
        """Raises Unsupported for what gRPC does not let us count: it hides which connection a call came over."""
        if serving.requests_per_second is not None or serving.burst_size is not None:
            raise errors.Unsupported(
                "requests_per_second and burst_size are not for gRPC",
                url=self.url,
                operation="serve",
                hint="an interceptor may raise RateLimited by what it knows of its callers",
            )

    def check_name(self, name: str) -> None:
        if not name or "." in name or name == BUILT_IN:
            raise errors.BadOption(f"{name!r} is no name for a target", url=self.url, operation="expose")


def settings_of_server(options: PlaceOptions, serving: ServerOptions) -> list[tuple[str, Any]]:
    return [
        *_grpc_place.settings_of(options),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", _grpc_place.WINDOW),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", serving.max_per_connection),
        ("grpc.max_allowed_incoming_connections", serving.max_connections),
        *_handshake(serving.connection_timeout),
    ]


def _handshake(timeout: float | None) -> list[tuple[str, Any]]:
    """A client that does not begin to speak is let go after so many seconds; gRPC knows no "never", so None is a day."""
    return [("grpc.server_handshake_timeout_ms", int((86_400 if timeout is None else timeout) * 1000))]


class Arrived:
    """A call, as either kind of servicer context has it."""

    __slots__ = ("context",)

    def __init__(self, context: Any) -> None:
        self.context = context

    def metadata(self) -> dict[str, str]:
        """What the caller sent along, without what gRPC itself sends."""
        return {
            key: value
            for key, value in self.context.invocation_metadata() or ()
            if isinstance(value, str) and key != "user-agent" and not key.startswith("grpc-")
        }

    def deadline(self) -> float | None:
        remaining = self.context.time_remaining()
        return None if remaining is None else time.monotonic() + remaining

    def peer(self) -> Peer:
        return _grpc_place.peer_of(self.context.peer())


def parsed(kind: type[Message]) -> Callable[[bytes], Message]:
    """Bytes to a message of this class. Raises CodecError."""
    parse = kind.FromString

    def read(body: bytes) -> Message:
        try:
            return parse(body)
        except DecodeError as error:
            raise errors.CodecError(f"this is no {kind.DESCRIPTOR.full_name}: {error}") from error

    return read
