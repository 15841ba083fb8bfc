"""Subscribing to one publisher by its address: one socket, connected to it.

The user's calls read it; so does the keeper's thread while an answer is due, and parks the few messages that stand before it. The
publisher's end is the end. One that dies is looked for until it is back, and then the gap is -1, as nobody counted.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from .. import errors
from .._linkkeeper import keeper
from .._spi import Steps, TopicTerms, Wait, Want
from .._url import Url
from ..message import Parcel
from . import _udpwire as wire
from ._bell import Bell
from ._oserror import GONE, map_oserror
from ._udpsubscriber import AT_A_TIME, FIRST_PAUSE, LAST_PAUSE, Source, Subscriber

_log = logging.getLogger("ipckit")

_PARKED = 64  # messages that the keeper may come across while it looks for an answer


class PeerSubscriber(Subscriber):
    """One socket, connected to the publisher: read in the user's calls, and by the keeper while an answer is due."""

    def __init__(self, url: Url, sock: socket.socket, limit: int, terms: TopicTerms) -> None:
        super().__init__(url, sock, limit, terms)
        self.trouble: OSError | None = None  # what the publisher's machine said
        self._source = Source(None, wire.NO_SESSION, time.monotonic())
        self._parked = deque[Parcel]()
        self._news = Bell()
        self._reconnects = 0
        self._known = False  # a publisher has welcomed us

    def reach(self, sockaddr: Any) -> None:
        """Speak to this address and to no other."""
        try:
            self._data.connect(sockaddr)
        except OSError as error:  # no way there: asking in vain will say so
            self.trouble = error

    def greeted(self, patience: float) -> Steps[bool]:
        """Ask once, and wait so long for the answer."""
        deadline = time.monotonic() + patience
        with self._lock:
            self._join(time.monotonic())
        while (left := deadline - time.monotonic()) > 0:
            with self._lock:
                self._park()
                if self._source.welcome:
                    keeper.tend(self)
                    return True
            yield Wait(((self._data.fileno(), select.POLLIN),), left)
        return False

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check()
            return Wait(((self._data.fileno(), select.POLLIN), self._news.announce()))

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "reconnects": self._reconnects}

    def abandon(self) -> None:
        self._data.close()
        self._news.close()

    def _leave(self) -> None:
        if self._known:
            self._say(wire.leave(self._source.session, self._source.member))

    def _next(self) -> Parcel | None:
        if self._parked:
            return self._parked.popleft()
        for _ in range(AT_A_TIME):
            if self._source.over:
                raise errors.PeerClosed("the publisher closed", url=self._url)
            if (size := self._read()) is None:
                return None
            if (parcel := self._hear(size, time.monotonic())) is not None:
                return parcel
        return None

    def _read(self) -> int | None:
        """Into the buffer. None: nothing is there."""
        while True:
            try:
                return self._data.recv_into(self._buffer)
            except BlockingIOError:
                return None
            except OSError as error:
                if error.errno not in GONE:
                    raise map_oserror(error, self._url, "recv") from error
                self.trouble = error  # nobody is there now: the next JOIN finds who comes

    def _park(self) -> None:
        """Look for an answer. Messages that stand before it are kept, a few."""
        while len(self._parked) < _PARKED and not self._source.over and (size := self._read()) is not None:
            if (parcel := self._hear(size, time.monotonic())) is not None:
                self._parked.append(parcel)

    def _hear(self, size: int, now: float) -> Parcel | None:
        source = self._source
        if (heard := self._heard(size)) is None:
            return None
        if heard.kind in (wire.CHALLENGE, wire.WELCOME):
            if heard.member != source.member:
                self._refused += 1
            elif source.session not in (heard.session, wire.NO_SESSION):
                self._begin_anew(now)  # another process is there now
            elif heard.kind == wire.CHALLENGE:
                source.session, source.cookie = heard.session, heard.cookie
                self._join(now)
            else:
                self._reconnects += not source.welcome and self._known
                source.session, self._known = heard.session, True
                source.welcomed(heard.number, now)
                self._tell(source)
        elif heard.session != source.session or heard.kind in (wire.JOIN, wire.LEAVE):
            self._refused += 1
        elif heard.kind in (wire.NUMBER, wire.BYE):
            source.missed += source.ledger.told(heard.number)
            self._tell(source)
            if heard.kind == wire.BYE:
                source.over = True
                self._leave()
        else:
            return self._message(source, heard, size)
        return None

    def _begin_anew(self, now: float) -> None:
        self._missed = self._missed or self._known
        self._source = Source(None, wire.NO_SESSION, now)
        self._join(now)

    # -- on the keeper's thread

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed or self._source.over:
                return None
            now = time.monotonic()
            waiting = not self._parked
            if waiting and self._asked:
                self._park()
                if self._parked or self._source.over:
                    self._news.ring()
                    waiting = False
            if self._source.join_at <= now:
                self._join(now)
            left = max(self._source.join_at - now, 0.001)
            return Wait(((self._data.fileno(), select.POLLIN),) if waiting and self._asked else (), left)

    @property
    def _asked(self) -> bool:
        """A JOIN is unanswered."""
        return self._source.pause > FIRST_PAUSE

    def _join(self, now: float) -> None:
        source = self._source
        source.join_at = now + source.pause
        source.pause = min(source.pause * 2, LAST_PAUSE)
        self._say(wire.join(source.session, source.member, source.cookie, self._topics))

    def _say(self, datagram: bytes) -> None:
        try:
            self._data.send(datagram)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in GONE:
                _log.info("%s: cannot be reached: %s", self._url, error)
            self.trouble = self.trouble or error
