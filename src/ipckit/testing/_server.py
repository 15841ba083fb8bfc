"""What all real servers for tests share: where their binary is, the process that runs it, and `Server`, what the user has of it.

`Process` is a server and its guardian (`_guardian.py`), which ends it whatever becomes of us. `servers.py` has the idea.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .._url import Url, parse
from ..errors import IpcError, MissingDependency, Unsupported

START_TIMEOUT = 20.0  # seconds; a loaded machine may take some
NAP = 0.004  # seconds between two questions to a server that is starting
PATIENCE = 1.0  # seconds that one question may take: another program may have the port, and say nothing
LOOPBACK = "127.0.0.1"


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
    _process: Process | None = field(default=None, repr=False)

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

    def _ours(self, operation: str) -> Process:
        if self._process is None:
            raise Unsupported("this server was not started by us", url=parse(self.url), operation=operation)
        return self._process


# -- the process ----------------------------------------------------------------------------------------------------


Command = Callable[[], Sequence[str]]
Ready = Callable[[], tuple[str, str]]


class _Ended(Exception):
    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Process:
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

    def __enter__(self) -> Process:
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
        held.bind((LOOPBACK, 0))
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
            event = self._event(NAP, {})
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


_processes: weakref.WeakSet[Process] = weakref.WeakSet()


def _in_child_of_fork() -> None:
    for process in tuple(_processes):
        process.disown()


os.register_at_fork(after_in_child=_in_child_of_fork)


# -- where its binary is, and how to ask it -------------------------------------------------------------------------


def binary_of(variable: str, package: str, names: Sequence[str]) -> str:
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


def dial(url: Url, default: int, *, tls: bool) -> socket.socket:
    host = url.host
    connection = socket.create_connection((host.name, host.port or default), PATIENCE)
    if not tls:
        return connection
    try:
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host.name)
    except BaseException:
        connection.close()
        raise
