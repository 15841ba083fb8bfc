"""What the zmq endpoints of one process share: the context, its end, and how they sleep.

The context is made when it is first needed, again in a forked child, and ended at exit, when what was sent and is still in
libzmq's hands goes out for as long as `linger` says.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import socket
import struct
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import zmq

from .. import errors
from .._spi import Peer

if TYPE_CHECKING:
    from .._url import Url
    from ._zmq_hub import Hub
    from ._zmq_native import Native
    from .zmq import Options

_SO_ATTACH_FILTER = 26
NEVER = 2**31 - 1  # milliseconds. -1 would also end the reconnecting, but drops what was received and not yet read.
_HANDSHAKE = 10_000  # milliseconds in which a stranger has to speak ZMTP

#: Listeners of zmq+inproc:// by name.
inproc: dict[str, Hub] = {}
#: Addresses of zmq+inproc:// at which a native socket listens.
inproc_native: set[str] = set()
#: All that are open, for a forked child and for the end of the program.
hubs: weakref.WeakSet[Hub] = weakref.WeakSet()
natives: weakref.WeakSet[Native] = weakref.WeakSet()
_context: zmq.Context[zmq.Socket[bytes]] | None = None
_context_lock = threading.Lock()


def context() -> zmq.Context[zmq.Socket[bytes]]:
    """The one of this process, with its one I/O thread and one reaper thread, which live until the process ends."""
    global _context
    with _context_lock:
        if _context is None:
            _context = zmq.Context()
            _context.set(zmq.MAX_SOCKETS, 32_768)
        return _context


def _forked() -> None:
    """The threads of the context are not here: it is left as it is, never ended, and a new one made when it is needed."""
    global _context, _context_lock
    _context, _context_lock = None, threading.Lock()
    for hub in tuple(hubs):
        hub.abandon()
    for native in tuple(natives):
        native.abandon()
    hubs.clear()
    natives.clear()
    inproc.clear()
    inproc_native.clear()


def _exit() -> None:
    """What was sent still goes out, for as long as `linger` says."""
    global _context
    quiet = [hub.quit() for hub in tuple(hubs)] + [native.quit() for native in tuple(natives)]
    if all(quiet) and _context is not None:
        ending, _context = _context, None
        ending.term()


os.register_at_fork(after_in_child=_forked)
atexit.register(_exit)


def map_zmq(error: zmq.ZMQError, url: object, operation: str) -> errors.IpcError:
    """What this means in our words. Raise it `from` the error."""
    text = str(error)
    if error.errno == errno.EADDRINUSE:
        return errors.AddressInUse("somebody listens there already", url=url, operation=operation)
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return errors.ResourceLimit(text, url=url, operation=operation, hint="raise `ulimit -n`")
    if error.errno in (errno.EINVAL, errno.ENODEV, errno.ENAMETOOLONG):
        return errors.BadUrl(text, url=url, operation=operation)
    if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
        return errors.Closed("the zmq context has ended", url=url, operation=operation)
    return errors.IpcError(text, url=url, operation=operation)


# -- a socket -------------------------------------------------------------------------------------------------------


def configure(socket: zmq.Socket[bytes], url: Url, options: Options) -> None:
    """A ROUTER of ours."""
    _configure(socket, url, options, options.limit)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a peer that is gone is an error, not a drop
    socket.setsockopt(zmq.SNDHWM, 0)  # our windows bound what is under way: a goodbye and a credit always fit
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, NEVER)


def configure_native(socket: zmq.Socket[bytes], url: Url, options: Options, largest: int) -> None:
    """A socket that is used as ZeroMQ meant it: it connects again by itself, and its own marks bound what is under way."""
    _configure(socket, url, options, largest)
    socket.setsockopt(zmq.SNDHWM, options.sndhwm)
    socket.setsockopt(zmq.RCVHWM, options.rcvhwm)
    socket.setsockopt(zmq.RECONNECT_IVL, 10)  # milliseconds, doubling up to the next
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    if url.scheme != "zmq+inproc":  # left to itself the kernel would take megabytes, however little the marks say
        socket.setsockopt(zmq.SNDBUF, 256 << 10)
        socket.setsockopt(zmq.RCVBUF, 256 << 10)


def _configure(socket: zmq.Socket[bytes], url: Url, options: Options, largest: int) -> None:
    socket.setsockopt(zmq.LINGER, round(options.linger * 1000))
    socket.setsockopt(zmq.MAXMSGSIZE, max(largest, 64))
    socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE)
    # With a domain, who speaks ZMTP 1 or 2 is hung up on (that is who begins with any byte but 0xff). It changes nothing else,
    # as nobody in our context handles authentication. Without one, the first message of such a peer makes libzmq 4.3 abort the
    # whole process if its socket is closing (process_routing_id_msg).
    socket.setsockopt(zmq.ZAP_DOMAIN, b"ipckit")
    if url.scheme == "zmq+tcp" and options.keepalive > 0:  # as tcp://: half of the time idle, then four probes
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, max(1, int(options.keepalive / 2)))
        socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, max(1, int(options.keepalive / 8)))
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
        socket.setsockopt(zmq.TCP_MAXRT, int(options.keepalive * 1000))


def who_sent(part: Any) -> tuple[Peer, int]:
    """Who is at the other end of the connection that brought this, and libzmq's descriptor for it."""
    try:
        address, fd = part.get("Peer-Address"), int(part.get(zmq.SRCFD))
    except zmq.ZMQError:  # inproc
        return Peer(os.getpid(), os.getuid(), os.getgid()), -1
    name, *ids = address.rsplit(":", 3) if address.count(":") >= 3 and address.startswith("localhost:") else (address,)
    if len(ids) == 3:  # a Unix socket: libzmq appends uid, gid and pid, from the kernel
        uid, gid, pid = map(int, ids)
        return Peer(pid or None, uid, gid), fd
    return Peer(address=name), fd


# -- sleeping -------------------------------------------------------------------------------------------------------


class Sleeper:
    """What one receiver, sender or listener sleeps on: a bell, and its own number for the socket's descriptor.

    Its own, because an event loop knows one callback for each descriptor. Used under the hub's lock.
    """

    def __init__(self) -> None:
        self.announced = False
        self._rung = False
        self._bell = self._socket = -1

    def announce(self, hub: Hub) -> tuple[tuple[int, int], ...]:
        if self._bell < 0:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if self._rung:
            self._rung = False
            with suppress(BlockingIOError):
                os.eventfd_read(self._bell)
        self.announced = hub.watched = True
        if hub.threaded:
            return ((self._bell, select.POLLIN),)
        if self._socket < 0:
            self._socket = os.dup(hub.fd)
        return ((self._socket, select.POLLIN), (self._bell, select.POLLIN))

    def ring(self) -> None:
        if self.announced:
            self.announced = False
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """When nobody sleeps here any more."""
        self.announced = False
        for fd in (self._bell, self._socket):
            if fd >= 0:
                os.close(fd)
        self._bell = self._socket = -1


# -- listening -------------------------------------------------------------------------------------------------------


def turn_away(listening: int) -> None:
    """No new connections, while libzmq keeps listening: a filter that drops all that asks for one. Linux only.

    Closing or shutting the socket down would do, if libzmq did not abort the process at the error that accept() then gives.
    """
    import ctypes

    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # one instruction: return 0 bytes
    filter_ = struct.pack("@HP", 1, ctypes.addressof(program))
    with suppress(OSError), socket.socket(fileno=os.dup(listening)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
