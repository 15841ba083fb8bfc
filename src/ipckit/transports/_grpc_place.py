"""Where gRPC is reached, and how it is secured: what channels over gRPC and calls over gRPC share.

Addresses in gRPC's words, credentials from the URL's options, taking a port or the name of a Unix socket so that a live owner is
an error and a dead one is replaced, and who a peer is.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors
from .._options import LinkOptions, duration, option, text
from .._spi import Peer
from .._url import Url
from . import _unixsock
from ._oserror import map_oserror
from ._runtime import path_for

if TYPE_CHECKING:
    from ._unixsock import Name

#: Bytes of a stream that may come before they are read. Of itself gRPC would let a fast sender grow it to 4 MiB.
WINDOW = 1 << 19
#: What a message needs besides what we count of it, on the wire.
OVERHEAD = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceOptions(LinkOptions):
    keepalive: float = option(120.0, duration, "a peer whose machine is silent for twice as long is dead; 0: for ever")
    ca: str | None = option(None, text, "connect: file of the authorities to trust, instead of the system's")
    cert: str | None = option(None, text, "file with our certificate (and its chain); listening needs one")
    key: str | None = option(None, text, "file with its private key, if it is not in cert")
    client_ca: str | None = option(None, text, "listen: file of authorities; clients must have a certificate of theirs")
    server_name: str | None = option(
        None, text, "connect: the name that the certificate must be for, if not the host's"
    )


# -- addresses and credentials ----------------------------------------------------------------------------------------


def check(url: Url) -> None:
    if url.scheme == "grpc+unix":
        path_for(url, ".grpc")
    elif len(url.hosts) != 1 or url.host.port is None or url.path not in ("", "/"):
        raise errors.BadUrl(
            "it takes one host and its port, and no path", url=url, hint=f"for example {url.scheme}://127.0.0.1:50051"
        )
    if url.scheme != "grpcs":
        for name, _ in url.options:
            if name in ("ca", "cert", "key", "client_ca", "server_name"):
                raise errors.BadOption(f"{name}= is for grpcs://", url=url)


def _file(url: Url, option: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise errors.BadOption(f"{option}= cannot be read: {error.strerror}", url=url) from error


def _pair(url: Url, cert: str, key: str | None) -> tuple[bytes, bytes]:
    """A certificate and its key. gRPC itself would not say what is wrong with them."""
    found = _file(url, "cert", cert), _file(url, "key", key or cert)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            cert, key, password=b""
        )  # else it might ask at the terminal
    except (OSError, ValueError) as error:
        raise errors.BadOption(f"cert= and key= are no certificate with its key: {error}", url=url) from error
    return found


def server_credentials(url: Url, options: PlaceOptions) -> Any:
    if url.scheme != "grpcs":
        return None
    import grpc

    if options.cert is None:
        raise errors.BadOption("listening needs a certificate", url=url, hint="cert=server.pem&key=server.key")
    cert, key = _pair(url, options.cert, options.key)
    clients = _file(url, "client_ca", options.client_ca) if options.client_ca else None
    return grpc.ssl_server_credentials([(key, cert)], clients, require_client_auth=clients is not None)


def client_credentials(url: Url, options: PlaceOptions) -> Any:
    if url.scheme != "grpcs":
        return None
    import grpc

    authorities = options.ca or ssl.get_default_verify_paths().cafile
    trusted = _file(url, "ca", authorities) if authorities else None
    if options.cert is None:
        return grpc.ssl_channel_credentials(trusted)
    cert, key = _pair(url, options.cert, options.key)
    return grpc.ssl_channel_credentials(trusted, key, cert)


def settings_of(options: PlaceOptions) -> list[tuple[str, Any]]:
    """What both sides ask of gRPC's core."""
    settings: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", min(options.limit + OVERHEAD, 2**31 - 1)),
        ("grpc.max_send_message_length", -1),  # ours is asked first, and says more
    ]
    if options.keepalive > 0:  # a stopped process answers no pings: so these are for machines, and slow
        period = max(int(options.keepalive * 1000), 1)
        settings += [("grpc.keepalive_time_ms", period), ("grpc.keepalive_timeout_ms", period)]
        settings += [("grpc.http2.max_pings_without_data", 0)]
        settings += [("grpc.http2.min_recv_ping_interval_without_data_ms", 1000)]
    return settings


def path_of(url: Url) -> Path | None:
    return path_for(url, ".grpc") if url.scheme == "grpc+unix" else None


def address_of(url: Url) -> str | None:
    return str(url.host) if url.hosts and url.host.port is not None else None


@contextlib.contextmanager
def target_of(url: Url) -> Iterator[str | None]:
    """In gRPC's words; None: it cannot be there. Valid inside the block, for a long path is abbreviated there."""
    if url.scheme != "grpc+unix":
        yield f"dns:///{url.host}"
        return
    path = path_for(url, ".grpc")
    if not path.exists():
        yield None
        return
    with _unixsock._address(url, path) as short:
        yield f"unix:{short}"


def bind_unix(server: Any, url: Url) -> Name:
    """Take the name; then bind beside it and move the socket there.

    gRPC unlinks what stands at the path when it binds, alive or not, and once more when it stops, whoever has it by then; and
    makes the file with whatever mode the umask leaves. At a name that nobody knows it may.
    """
    path = path_for(url, ".grpc")
    name = _unixsock.take(url, path)
    try:
        _unixsock._clear(url, path, socket.SOCK_STREAM)
        for left in path.parent.glob(f"{path.name}.*.new"):  # by one who was killed in the midst of this
            left.unlink(missing_ok=True)
        beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
        with _unixsock._address(url, beside) as short:
            server.add_insecure_port(f"unix:{short}")
        os.chmod(beside, 0o600)
        os.rename(beside, path)
        name.bound()
    except BaseException as error:
        name.release()
        if isinstance(error, RuntimeError):
            raise errors.BadUrl("gRPC cannot bind there", url=url, operation="listen") from error
        if isinstance(error, OSError) and not isinstance(error, errors.IpcError):
            raise map_oserror(error, url, "listen") from error
        raise
    return name


#: When we gave up a port that we have not had again since.
_given_up: dict[str, float] = {}


def give_up(url: Url) -> None:
    """This port is being closed, in threads of gRPC's own."""
    _given_up[str(url.host)] = time.monotonic()


def is_had(url: Url) -> None:
    """This port is ours (again)."""
    _given_up.pop(str(url.host), None)


def still_closing(url: Url) -> bool:
    """Bind there ourselves first: gRPC would only say that it could not, and would litter stderr.

    True: it is a port that we gave up just now, and gRPC has not closed it yet; ask again soon. Raises why it cannot be had.
    """
    why = _why_not(url)
    if why is None:
        return False
    given_up = _given_up.get(str(url.host))
    if not isinstance(why, errors.AddressInUse) or given_up is None or time.monotonic() > given_up + 2:
        raise why
    return True


def _why_not(url: Url) -> errors.IpcError | None:
    try:
        family, kind, number, _, address = socket.getaddrinfo(url.host.name, url.host.port, 0, socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, number) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1)
    except socket.gaierror as error:
        return errors.BadUrl(f"the host is not known: {error.strerror}", url=url, operation="listen")
    except OSError as error:
        why = map_oserror(error, url, "listen")
        why.__cause__ = error
        return why
    return None


@functools.lru_cache(maxsize=1024)
def peer_of(said: str) -> Peer:
    """From gRPC's `ipv4:127.0.0.1:5000`, `ipv6:%5B::1%5D:5000`, `unix:`."""
    kind, _, address = said.partition(":")
    return Peer(address=address.replace("%5B", "[").replace("%5D", "]") if kind in ("ipv4", "ipv6") else None)
