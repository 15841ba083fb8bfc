"""Accepting connections without ever being brought down by one."""

from __future__ import annotations

import errno
import logging
import select
import socket
import time

from .._spi import Wait
from .._url import Url
from ._oserror import GONE, SCARCE, map_oserror

_log = logging.getLogger("ipckit")
_PAUSE = 0.1  # seconds, when there are no descriptors or no memory
_SAY_AGAIN = 10.0  # seconds until the log is told once more that it is so: whoever connects must not fill a disk
#: The connection was aborted before we took it, or carries an error of its own: not the listener's.
_ITS_OWN = GONE | {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINTR}


class Acceptor:
    """A listening, non-blocking socket. It lives through EMFILE, and then pauses: the descriptor stays ready meanwhile."""

    def __init__(self, url: Url, sock: socket.socket) -> None:
        self.sock = sock
        self._url = url
        self._wait = Wait(((sock.fileno(), select.POLLIN),))
        self._paused_until = self._said = 0.0

    def try_accept(self) -> socket.socket | None:
        """The next connection, non-blocking, or None."""
        if self._paused_until:
            if time.monotonic() < self._paused_until:
                return None
            self._paused_until = 0.0
        while True:
            try:
                sock, _ = self.sock.accept()
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno in _ITS_OWN:
                    continue
                if error.errno not in SCARCE:
                    raise map_oserror(error, self._url, "accept") from error
                now = time.monotonic()
                if not self._said or now >= self._said + _SAY_AGAIN:
                    self._said = now
                    _log.warning("%s: cannot accept: %s; trying again every %g s", self._url, error.strerror, _PAUSE)
                self._paused_until = now + _PAUSE
                return None
            sock.setblocking(False)
            return sock

    def arm(self) -> Wait:
        if self._paused_until:
            return Wait((), max(self._paused_until - time.monotonic(), 0.0))
        return self._wait
