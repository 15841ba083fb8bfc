"""Where a Redis server is: the URLs of redis://, their options, and the redis-py connection that follows from them.

    redis://[user:password@]host[:port]/DATABASE/NAME
    rediss://...                                             the same over TLS
    redis+unix:///run/redis.sock?db=0&name=NAME
    redis://sentinel1:26379,sentinel2:26379/0/NAME?sentinel=MASTER

With `sentinel=` the hosts are Sentinels, and whom they call the master is asked for at every connect, so that a connection which
is made again after a failover leads to the new one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from .. import _options, errors
from .._options import integer, option, text
from .._url import Url

CONNECT_TIMEOUT = 5.0
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}\Z")
#: A machine that vanished without a word is noticed after about a minute; a paused one answers its kernel's probes.
_KEEPALIVE = (30, 10, 3)  # seconds of silence, seconds between probes, probes
_UNHEARD = 60_000  # ms; no probe is sent while data are on their way, and the kernel would repeat them for a quarter of an hour


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceOptions(_options.LinkOptions):
    db: int = option(0, integer(0, 1 << 20), "redis+unix: the database")
    name: str | None = option(None, text, "redis+unix: the name, which the other schemes have in the path")
    ca: str | None = option(None, text, "rediss: file of the authorities to trust, instead of the system's")
    cert: str | None = option(None, text, "rediss: file with our certificate")
    key: str | None = option(None, text, "rediss: file with its private key")
    sentinel: str | None = option(None, text, "the hosts are Sentinels, and this is the name of the master")


@dataclass(frozen=True, slots=True)
class Address:
    """What the URL and its options say: where the server is, which database, which name."""

    url: Url
    settings: dict[str, Any] = field(repr=False)  # of a redis-py connection; a password is among them
    name: str
    sentinel: str | None = None

    def connection(self) -> Any:
        """A new redis-py connection, not open yet. With Sentinels this asks them, and so it may wait."""
        import redis

        kinds = {"redis": redis.Connection, "rediss": redis.SSLConnection}
        # protocol 2: one shape of replies on every server. No retries: what is idempotent, we know better.
        retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        kind = kinds.get(self.url.scheme, redis.UnixDomainSocketConnection)
        settings = self.settings | self._master()
        return kind(protocol=2, retry=retry, socket_timeout=CONNECT_TIMEOUT, **settings)

    def _master(self) -> dict[str, Any]:
        if self.sentinel is None:
            return {}
        from redis.sentinel import Sentinel

        places = [(host.name, host.port or 26379) for host in self.url.hosts]
        tls = {name: value for name, value in self.settings.items() if name.startswith("ssl_")}
        timeouts = {"socket_timeout": 1.0, "socket_connect_timeout": 1.0}
        watchers: Any = Sentinel(  # type: ignore[no-untyped-call]
            places, **timeouts, **({"ssl": True} | tls if self.url.scheme == "rediss" else {})
        )
        try:
            host, port = watchers.discover_master(self.sentinel)
        finally:
            for watcher in watchers.sentinels:
                watcher.close()
        return {"host": host, "port": port}

    def client(self) -> Any:
        """A redis-py client of its own with this address and login. Close it."""
        import redis

        settings = self.settings | self._master()
        return redis.Redis(connection_pool=redis.ConnectionPool(type(self.connection()), **settings))


@dataclass(frozen=True, slots=True)
class Native:
    """`.native`: the stream's key, and how to get a redis-py client for looking at it."""

    key: str
    address: Address


def read_lock_address(url: Url, options: PlaceOptions) -> Address:
    """Of a lock: the database may be left out, and then it is 0. Raises BadUrl."""
    if url.scheme == "redis+unix":
        return read_address(url, options)
    first = url.path[1:].partition("/")[0]
    if first.isdecimal():
        return read_address(url, options)  # which refuses a number alone: a name was forgotten
    if not first:
        raise errors.BadUrl("the lock has no name", url=url, hint=f"{url.scheme}://127.0.0.1:6379/name")
    return replace(read_address(replace(url, path=f"/0{url.path}"), options), url=url)


def read_address(url: Url, options: PlaceOptions) -> Address:
    settings: dict[str, Any] = {"username": url.user or None, "password": url.password}
    if url.scheme == "redis+unix":
        if url.hosts or not url.path or options.name is None:
            raise errors.BadUrl(
                "it takes a socket's path and a name", url=url, hint="redis+unix:///run/redis.sock?name=N"
            )
        if options.sentinel is not None:
            raise errors.BadOption("sentinel is for redis:// and rediss://", url=url)
        name, database = options.name, options.db
        settings["path"] = url.path
    else:
        number, slash, name = url.path[1:].partition("/")
        if not slash or not number.isdecimal() or len(number) > 7:
            raise errors.BadUrl("the path is /DATABASE/NAME", url=url, hint=f"{url.scheme}://127.0.0.1:6379/0/name")
        if options.name is not None or options.db:
            raise errors.BadOption("db and name stand in the path", url=url)
        if options.sentinel is None and len(url.hosts) > 1:
            raise errors.BadUrl("one host, unless they are Sentinels", url=url, hint="?sentinel=MASTER")
        if options.sentinel is not None and not url.hosts:
            raise errors.BadUrl("there must be the hosts of the Sentinels", url=url)
        database = int(number)
        host = url.hosts[0] if url.hosts else None
        settings |= {"host": host.name if host else "127.0.0.1", "port": (host and host.port) or 6379}
        settings |= {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_keepalive": True}
        settings["socket_keepalive_options"] = _keepalive()
    if not _NAME.match(name):
        raise errors.BadUrl("the name must be of letters, digits and '_.:/-'", url=url)
    settings["db"] = database
    tls = {"ssl_ca_certs": options.ca, "ssl_certfile": options.cert, "ssl_keyfile": options.key}
    if url.scheme == "rediss":
        settings |= tls | {"ssl_check_hostname": True}
    elif any(tls.values()):
        raise errors.BadOption("ca, cert and key are for rediss://", url=url)
    return Address(url, settings, name, options.sentinel)


def _keepalive() -> dict[int, int]:
    import socket

    idle: int = getattr(socket, "TCP_KEEPIDLE", 0x10)  # which macOS calls TCP_KEEPALIVE
    found = dict(zip((idle, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT), _KEEPALIVE, strict=True))
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        found[socket.TCP_USER_TIMEOUT] = _UNHEARD
    return found
