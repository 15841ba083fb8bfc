"""`redis://host:port/db/name`, `rediss://` (TLS), `redis+unix:///socket?db=0&name=NAME`: channels over Redis Streams.

Works with Redis 6.2 and later, and Valkey. Each side of a channel makes one stream and reads it, the other writes it:

    ipckit:{NAME}:listener    string: the card of the listener
    ipckit:{NAME}:desk:ID     stream: its rendezvous mailbox
    ipckit:{NAME}:box:ID      stream: the inbox of one side of one channel

A side has two connections. On one an XREAD BLOCK 0 is always outstanding, so a message is pushed as it is added; the other
pipelines XADD and asks now and then whether the peer's connection is still there (CLIENT LIST ID). The server knows when a
process was killed, and a paused process is still connected: no heartbeats, no timers, no thread.

Frames have the ids 1-0, 2-0, 3-0 ...: a frame that was evicted or lost is a gap that the reader sees, and never a silent loss.
What was read is trimmed; a sender stops `window` messages ahead of its reader. All keys are deleted at close, and expire
after `ttl` if both sides were killed. A channel is a session: it does not outlive its two processes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .. import _options, errors
from .._capabilities import Capabilities
from .._options import integer, option, text
from .._spi import Link, Listener, Steps, Transport
from .._url import Url
from . import _rendezvous
from ._redis_mail import Address, Post, make_channel
from ._redis_wire import CONNECT_TIMEOUT

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisOptions(_options.LinkOptions):
    window: int = option(1024, integer(2, 1 << 20), "messages that a sender may be ahead of its reader")
    ttl: float = option(86400.0, _options.duration, "after which keys expire that nobody used")
    db: int = option(0, integer(0, 1 << 20), "redis+unix: the database")
    name: str | None = option(None, text, "redis+unix: the name, which the other schemes have in the path")
    ca: str | None = option(None, text, "rediss: file of the authorities to trust, instead of the system's")
    cert: str | None = option(None, text, "rediss: file with our certificate")
    key: str | None = option(None, text, "rediss: file with its private key")


def read_address(url: Url, options: RedisOptions) -> Address:
    settings: dict[str, Any] = {"username": url.user or None, "password": url.password}
    if url.scheme == "redis+unix":
        if url.hosts or not url.path or options.name is None:
            raise errors.BadUrl(
                "it takes a socket's path and a name", url=url, hint="redis+unix:///run/redis.sock?name=N"
            )
        name, database = options.name, options.db
        settings["path"] = url.path
    else:
        number, slash, name = url.path[1:].partition("/")
        if not slash or not number.isdecimal() or len(number) > 7:
            raise errors.BadUrl("the path is /DATABASE/NAME", url=url, hint=f"{url.scheme}://127.0.0.1:6379/0/name")
        if options.name is not None or options.db:
            raise errors.BadOption("db and name stand in the path", url=url)
        if len(url.hosts) > 1:
            raise errors.BadUrl("one host", url=url)
        database = int(number)
        host = url.hosts[0] if url.hosts else None
        settings |= {"host": host.name if host else "127.0.0.1", "port": (host and host.port) or 6379}
        settings["socket_connect_timeout"] = CONNECT_TIMEOUT
    if not _NAME.match(name):
        raise errors.BadUrl("the name must be of letters, digits and '_.:/-'", url=url)
    settings["db"] = database
    tls = {"ssl_ca_certs": options.ca, "ssl_certfile": options.cert, "ssl_keyfile": options.key}
    if url.scheme == "rediss":
        settings |= tls | {"ssl_check_hostname": True}
    elif any(tls.values()):
        raise errors.BadOption("ca, cert and key are for rediss://", url=url)
    return Address(url, settings, name)


# -- the transport ------------------------------------------------------------------------------------------------------


class RedisTransport(Transport[RedisOptions]):
    capabilities = Capabilities(
        patterns=frozenset({"channel"}),
        cross_machine=True,
        broker=True,
        death="lease",
        death_bound=2.0,
        model="append-only logs in a server",
        synchronisation="no",
        data="messages with ids",
        decoupled=True,
        use_case="services that share a Redis already, on one machine or many",
    )
    options = RedisOptions
    requires = ("redis", "hiredis")
    extra = "redis"

    def capabilities_of(self, url: Url) -> Capabilities:
        from dataclasses import replace

        if url.scheme == "rediss":
            return replace(self.capabilities, encrypted=True)
        return replace(self.capabilities, cross_machine=url.scheme == "redis")

    def listen(self, url: Url, options: RedisOptions) -> Steps[Listener]:
        post = Post(read_address(url, options), options.window, options.ttl)
        try:
            return (yield from _rendezvous.listen(post, options.limit, make_channel))
        except BaseException:
            post.close()
            raise

    def connect(self, url: Url, options: RedisOptions) -> Steps[Link]:
        post = Post(read_address(url, options), options.window, options.ttl)
        try:
            return (yield from _rendezvous.connect(post, options.limit, make_channel))
        finally:
            post.close()


TRANSPORT = RedisTransport()
