"""The end of a TCP connection that has more to say than the peer has taken yet.

`close()` returns at once and the kernel goes on sending, until the peer sends something that nobody will read: then it
answers with a reset, and what it still had to send is gone. So a connection with unsent data is kept for a while by one
thread, which throws away what comes in, until the rest has gone (then a sending peer is to hear that we are gone) or the peer
closes too. With nothing unsent, which is the rule, there is no thread.

After `LINGER` seconds, and when our process ends, the kernel has it alone again: a peer that sends to us at that moment may
see a reset in place of our last messages. That is an error there (PeerDied), never a silent loss.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
import threading
import time
from contextlib import suppress

LINGER = 30.0
_WASTE = 64 << 10
_SIOCOUTQNSD = 0x894B  # bytes not sent yet


def finish(sock: socket.socket) -> None:
    """Say that no more will be sent, and close the socket when all that was sent is safe. Takes the socket, never waits."""
    try:
        sock.shutdown(socket.SHUT_WR)
        if _unsafe(sock):
            _lingering.add(sock)
            return
        _discard(sock)
    except OSError:  # it is broken: nothing will arrive any more
        pass
    sock.close()


def _unsafe(sock: socket.socket) -> int:
    """Bytes that a reset would lose: between machines all that is unacknowledged; here, what is sent has arrived."""
    local = sock.getsockname()[0] == sock.getpeername()[0]
    answer = fcntl.ioctl(sock.fileno(), _SIOCOUTQNSD if local else termios.TIOCOUTQ, b"\0\0\0\0")
    return int(struct.unpack("i", answer)[0])


def _discard(sock: socket.socket) -> bool:
    """Throw away what is there, a megabyte at most. True at the end of file."""
    for _ in range(16):
        try:
            if not sock.recv(_WASTE, socket.MSG_DONTWAIT):
                return True
        except BlockingIOError:
            return False
    return False


class _Lingering:
    """The thread and its sockets. It ends when there are none."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._sockets: dict[int, tuple[socket.socket, float]] = {}
        self._epoll: select.epoll | None = None

    def add(self, sock: socket.socket) -> None:
        with self._mutex:
            start = self._epoll is None
            if self._epoll is None:
                self._epoll = select.epoll()
            self._sockets[sock.fileno()] = sock, time.monotonic() + LINGER
            self._epoll.register(sock.fileno(), select.EPOLLIN)
            if start:
                threading.Thread(target=self._run, args=(self._epoll,), name="ipckit-linger", daemon=True).start()

    def _run(self, epoll: select.epoll) -> None:
        while True:
            with self._mutex:
                now = time.monotonic()
                for sock, deadline in tuple(self._sockets.values()):
                    if deadline <= now:
                        self._close(epoll, sock)
                if not self._sockets:
                    epoll.close()
                    self._epoll = None
                    return
                patience = min(deadline for _, deadline in self._sockets.values()) - now
            ready = epoll.poll(patience)
            with self._mutex:
                for fd, _ in ready:
                    sock = self._sockets[fd][0]
                    with suppress(OSError):
                        if not _discard(sock) and _unsafe(sock):
                            continue
                    self._close(epoll, sock)

    def _close(self, epoll: select.epoll, sock: socket.socket) -> None:
        del self._sockets[sock.fileno()]
        epoll.unregister(sock.fileno())
        sock.close()

    def abandon(self) -> None:
        """In a forked child: the thread and the connections are the parent's."""
        for sock, _ in self._sockets.values():
            sock.close()
        if self._epoll is not None:
            self._epoll.close()
        self.__init__()  # type: ignore[misc]


_lingering = _Lingering()
os.register_at_fork(after_in_child=_lingering.abandon)
