"""Internet addresses and TCP connections, as steps: names are resolved, and connections made, without blocking anybody.

`getaddrinfo` has no descriptor to wait for, so a name goes to a thread with an eventfd; a numeric address never does.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import _options, errors
from .._options import option
from .._spi import Steps, Wait
from .._url import Host, Url
from ._oserror import GONE, map_oserror

BACKLOG = 512
_ATTEMPT = 5.0  # seconds for one address, before the next one gets its turn
_NOT_YET = GONE | {errno.ECONNABORTED, errno.EADDRNOTAVAIL, errno.EAGAIN}


@dataclass(frozen=True, slots=True)
class Address:
    """One result of getaddrinfo."""

    family: int
    sockaddr: Any
    host: Host  # of the URL


def keepalive_option() -> Any:
    help = "a peer whose machine is silent for this long is dead; 0: for ever"
    return option(30.0, _keepalive, help)


def _keepalive(text: str) -> float:
    seconds = _options.duration(text)
    if seconds and not 1 <= seconds <= 64_800:  # the kernel counts in whole seconds, 32767 of them idle
        raise ValueError("0, or from 1s to 18h")
    return seconds


# -- names --------------------------------------------------------------------------------------------------------


class _Lookup:
    """One getaddrinfo on its own thread. Whoever is last, the thread or the waiter, closes the bell."""

    def __init__(self, host: Host, kind: int, flags: int) -> None:
        self.bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.found: list[Any] | OSError | None = None
        self._mutex = threading.Lock()
        self._users = 2
        self._ask = (host.name, host.port, 0, kind, 0, flags)
        self.thread = threading.Thread(target=self._run, name="ipckit-lookup", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.found = list(socket.getaddrinfo(*self._ask))
        except OSError as error:
            self.found = error
        except UnicodeError as error:  # no name at all: a label is empty or too long
            self.found = socket.gaierror(socket.EAI_NONAME, str(error))
        self.leave()

    def leave(self) -> None:
        with self._mutex:
            self._users -= 1
            if self._users:
                os.eventfd_write(self.bell, 1)
            else:
                os.close(self.bell)


def resolve(url: Url, host: Host, kind: int, *, passive: bool, operation: str) -> Steps[list[Address]]:
    """The addresses of a host of the URL. Raises BadUrl for a name that nobody knows, gaierror EAI_AGAIN for no answer."""
    if host.port is None:
        raise errors.BadUrl("the port is missing", url=url, hint=f"for example {url.scheme}://{host.name}:5000")
    flags = socket.AI_PASSIVE if passive else 0
    try:
        numeric = flags | socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        found: list[Any] | OSError | None = list(socket.getaddrinfo(host.name, host.port, 0, kind, 0, numeric))
    except (socket.gaierror, UnicodeError):
        lookup = _Lookup(host, kind, flags)
        try:
            while lookup.found is None:
                yield Wait(((lookup.bell, select.POLLIN),))
            lookup.thread.join()
        finally:
            lookup.leave()
        found = lookup.found
    if isinstance(found, socket.gaierror) and found.errno == socket.EAI_AGAIN:
        raise found
    if isinstance(found, OSError):
        raise errors.BadUrl(
            f"the host {host.name!r} is not known: {found.strerror}", url=url, operation=operation
        ) from found
    return [Address(family, sockaddr, host) for family, _, _, _, sockaddr in found or ()]


def only_host(url: Url) -> Host:
    """The one place to listen at."""
    if len(url.hosts) != 1 or url.path not in ("", "/"):
        raise errors.BadUrl(
            "one address is listened at, and it has no path", url=url, hint=f"for example {url.scheme}://127.0.0.1:5000"
        )
    return url.host


# -- TCP ----------------------------------------------------------------------------------------------------------


def listen_steps(url: Url) -> Steps[tuple[socket.socket, Url]]:
    """A listening, non-blocking socket, and the URL with the port that it got."""
    try:
        addresses = yield from resolve(url, only_host(url), socket.SOCK_STREAM, passive=True, operation="listen")
        address = addresses[0]
        sock = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections in TIME_WAIT do not own the port
            sock.setblocking(False)
            sock.bind(address.sockaddr)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise error if isinstance(error, errors.IpcError) else map_oserror(error, url, "listen") from error
    return sock, url.with_port(sock.getsockname()[1])


def connect_steps(url: Url, keepalive: float) -> Steps[tuple[socket.socket, Host]]:
    """A connected, non-blocking, tuned socket, and which host of the URL it leads to.

    Tries every address of every host, over and over, until somebody listens; at the timeout, raises NothingListening.
    """
    if url.path not in ("", "/") or not url.hosts or any(host.port in (None, 0) for host in url.hosts):
        raise errors.BadUrl(
            "it takes a host and its port, and no path", url=url, hint=f"for example {url.scheme}://127.0.0.1:5000"
        )
    last: OSError | None = None
    pause = 0.001
    try:
        while True:
            for host in url.hosts:
                try:
                    addresses = yield from resolve(url, host, socket.SOCK_STREAM, passive=False, operation="connect")
                except socket.gaierror as error:
                    last, addresses = error, []
                for address in addresses:
                    sock, error_ = yield from _attempt(address)
                    if sock is not None:
                        try:
                            tune(sock, keepalive)
                        except BaseException:
                            sock.close()
                            raise
                        return sock, host
                    last = error_
                    if last is not None and last.errno not in _NOT_YET:
                        raise map_oserror(last, url, "connect") from last
            yield Wait((), pause)
            pause = min(pause * 2, 0.05)
    except errors.Timeout as timeout:
        why = f": {last.strerror}" if last is not None and last.strerror else ""
        raise errors.NothingListening(f"nobody listens there{why}", url=url, operation="connect") from last or timeout


def _attempt(address: Address) -> Steps[tuple[socket.socket | None, OSError | None]]:
    """One connect(): the socket, or why not."""
    sock = socket.socket(address.family, socket.SOCK_STREAM)
    keep = False
    try:
        sock.setblocking(False)
        code = sock.connect_ex(address.sockaddr)
        if code == errno.EINPROGRESS:
            deadline = time.monotonic() + _ATTEMPT
            while not _writable(sock) and time.monotonic() < deadline:
                yield Wait(((sock.fileno(), select.POLLOUT),), _ATTEMPT)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if _writable(sock) else errno.ETIMEDOUT
        # A port of the ephemeral range that nobody listens at may be picked as our own: TCP then connects us to ourselves.
        if not code and sock.getsockname() == sock.getpeername():
            code = errno.ECONNREFUSED
        if code:
            return None, OSError(code, os.strerror(code))
        keep = True
        return sock, None
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        return None, error
    finally:
        if not keep:
            sock.close()


def _writable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


def tune(sock: socket.socket, keepalive: float) -> None:
    """Small messages go at once; a machine that vanished is noticed after `keepalive` seconds, idle or sending."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if keepalive <= 0:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # Half of the time idle, then four probes; with TCP_USER_TIMEOUT that is what ends it, unacknowledged data included.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(keepalive / 2)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(keepalive / 8)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(keepalive * 1000))


def shown(sockaddr: Sequence[Any]) -> str:
    """`127.0.0.1:5000`, `[::1]:5000`."""
    return str(Host(str(sockaddr[0]), int(sockaddr[1])))
