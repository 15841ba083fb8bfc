"""From a scheme to its transport, importing nothing before it is asked for.

The table maps a scheme to `module:attribute`. Third parties add theirs by the entry-point group `ipckit.transports`
(`myscheme = "package.module:TRANSPORT"`), or, in a running program, by `register`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import _capabilities
from ._capabilities import Capabilities
from ._spi import Transport
from ._url import Url, parse
from .errors import ConfigError, MissingDependency, UnknownScheme, likeliest

ENTRY_POINT_GROUP = "ipckit.transports"

_HERE = "ipckit.transports."
_table: dict[str, str | Transport[Any]] = {
    "inproc": _HERE + "inproc:TRANSPORT",
    "pipe": _HERE + "pipe:TRANSPORT",
    "fifo": _HERE + "fifo:TRANSPORT",
    "mq": _HERE + "mq:TRANSPORT",
    "shm": _HERE + "shm:TRANSPORT",
    "unix": _HERE + "unix:TRANSPORT",
    "tcp": _HERE + "tcp:TRANSPORT",
    "tls": _HERE + "tls:TRANSPORT",
    "udp": _HERE + "udp:TRANSPORT",
    "zmq+tcp": _HERE + "zmq:TRANSPORT",
    "zmq+ipc": _HERE + "zmq:TRANSPORT",
    "zmq+inproc": _HERE + "zmq:TRANSPORT",
    "nats": _HERE + "nats:TRANSPORT",
    "nats+tls": _HERE + "nats:TRANSPORT",
    "redis": _HERE + "redis:TRANSPORT",
    "rediss": _HERE + "redis:TRANSPORT",
    "redis+unix": _HERE + "redis:TRANSPORT",
    "grpc": _HERE + "grpc:TRANSPORT",
    "grpcs": _HERE + "grpc:TRANSPORT",
    "grpc+unix": _HERE + "grpc:TRANSPORT",
}
_entry_points_read = False


def register(scheme: str, transport: Transport[Any]) -> None:
    """Add a scheme to this process; a package does it for every process by its entry point."""
    _table[scheme] = transport


def schemes() -> tuple[str, ...]:
    _read_entry_points()
    return tuple(_table)


def find(url: Url) -> Transport[Any]:
    """The transport of this URL. Raises UnknownScheme with a suggestion."""
    found = _table.get(url.scheme)
    if found is None:
        _read_entry_points()
        found = _table.get(url.scheme)
    if found is None:
        raise UnknownScheme(
            f"no transport has the scheme {url.scheme!r}",
            url=url,
            hint=likeliest(url.scheme, _table, "known: " + ", ".join(sorted(_table))),
        )
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        try:
            found = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"the transport {module}:{attribute} cannot be loaded: {error}", url=url) from error
        if not isinstance(found, Transport):
            raise ConfigError(f"{module}:{attribute} is no ipckit Transport", url=url)
        _table[url.scheme] = found
    return found


def missing(transport: Transport[Any]) -> str | None:
    """The first module that the transport needs and cannot import, or None."""
    return next((name for name in transport.requires if not _importable(name)), None)


def _importable(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # not even its package
        return False


def open_transport(url: Url, require: frozenset[str] = frozenset()) -> Transport[Any]:
    """`find`, and make sure that it can be used here, for this."""
    transport = find(url)
    _capabilities.check(require, transport.capabilities_of(url), url)
    lacking = missing(transport)
    if lacking is not None:
        raise MissingDependency(
            f"{url.scheme}:// needs the module {lacking!r}, which is not installed",
            url=url,
            hint=f'from the checkout: pip install ".[{transport.extra}]"' if transport.extra else None,
        )
    return transport


def capabilities(url: str | Url) -> Capabilities:
    """What the transport of this URL promises, installed or not."""
    parsed = parse(url)
    return find(parsed).capabilities_of(parsed)


def _read_entry_points() -> None:
    global _entry_points_read
    if not _entry_points_read:
        _entry_points_read = True
        from importlib.metadata import entry_points  # 15 ms of imports, for those who look further than our own table

        for point in entry_points(group=ENTRY_POINT_GROUP):
            _table.setdefault(point.name, point.value)
