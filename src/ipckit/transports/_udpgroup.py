"""Subscribing to all publishers of a multicast group.

On a second socket, which hears only announcements, the keeper's thread learns who publishes here, and joins them; so it does not
wake for messages. A publisher that ends is forgotten, and the subscriber goes on with the others.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .._linkkeeper import keeper
from .._spi import TopicTerms, Wait, Want
from .._url import Url
from ..message import Parcel
from . import _udpwire as wire
from ._oserror import GONE, map_oserror
from ._udpsock import Allowance
from ._udpsubscriber import AT_A_TIME, LAST_PAUSE, Source, Subscriber

_FORGET = 60.0  # seconds of silence after which a publisher of a group is forgotten
_SOURCES = 1024  # publishers of a group


class GroupSubscriber(Subscriber):
    """Hears `data` in the user's calls; `control` (the same group, announcements only) and `own` on the keeper's thread."""

    def __init__(
        self, url: Url, data: socket.socket, control: socket.socket, own: socket.socket, limit: int, terms: TopicTerms
    ) -> None:
        super().__init__(url, data, limit, terms)
        self._control, self._own = control, own
        self._sources: dict[tuple[Any, bytes], Source] = {}
        self._joins = Allowance(256, 200.0)  # a stranger may make up publishers, at anybody's address
        self._wait = Wait(((data.fileno(), select.POLLIN),))
        keeper.tend(self)

    def arm(self, want: Want) -> Wait:
        return self._wait

    def counters(self) -> Mapping[str, int]:
        return {**super().counters(), "publishers": sum(source.welcome for source in tuple(self._sources.values()))}

    def abandon(self) -> None:
        for sock in (self._data, self._control, self._own):
            sock.close()

    def _leave(self) -> None:
        for source in self._sources.values():
            if source.welcome and not source.over:
                self._say(source, wire.leave(source.session, source.member))

    def _next(self) -> Parcel | None:
        for _ in range(AT_A_TIME):
            try:
                size, address = self._data.recvfrom_into(self._buffer)
            except BlockingIOError:
                self._caught_up()
                return None
            except OSError as error:
                raise map_oserror(error, self._url, "recv") from error
            if (heard := self._heard(size)) is None or heard.kind not in (wire.DATA, wire.KEPT, wire.NUMBER, wire.BYE):
                continue
            if (source := self._source(address, heard, time.monotonic())) is None:
                continue
            if heard.kind in (wire.NUMBER, wire.BYE):
                source.missed += source.ledger.told(heard.number)
                self._tell(source)
            elif (parcel := self._message(source, heard, size)) is not None:
                return parcel
        return None

    def _caught_up(self) -> None:
        """All that came has been read: what was said beside the messages, before that, is true now.

        A full buffer drops announcements as well as messages, and so the end of a burst would stay uncounted.
        """
        for source in self._sources.values():
            if source.said is not None:
                source.missed += source.ledger.told(source.said)
                source.said = None
                self._tell(source)

    def _source(self, address: Any, heard: wire.Heard, now: float) -> Source | None:
        key = address, heard.session
        source = self._sources.get(key)
        if source is None:
            if heard.kind == wire.BYE:
                return None  # somebody whom we have never heard ends
            if len(self._sources) >= _SOURCES and not self._make_room():
                self._refused += 1
                return None
            source = self._sources[key] = Source(address, heard.session, now)
            self._join(source, now)
            keeper.look()
        source.heard = now
        return source

    def _make_room(self) -> bool:
        """Whoever has not shown that its address is its own, makes way; the longest silent one."""
        strangers = [(source.heard, key) for key, source in self._sources.items() if not source.welcome or source.over]
        if not strangers:
            return False
        del self._sources[min(strangers, key=lambda each: each[0])[1]]
        return True

    # -- on the keeper's thread

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed:
                return None
            now = time.monotonic()
            buffer = self._buffer
            for sock in (self._own, self._control):
                for _ in range(AT_A_TIME):
                    try:
                        size, address = sock.recvfrom_into(buffer)
                    except BlockingIOError:
                        break
                    except OSError as error:
                        if error.errno in GONE:  # a publisher that is not there any more
                            continue
                        raise
                    if (heard := self._heard(size)) is not None:
                        self._hear(address, heard, now, ours=sock is self._own)
            due = now + LAST_PAUSE
            for key, source in tuple(self._sources.items()):
                if now - source.heard > _FORGET and source.said is None:
                    del self._sources[key]
                    self._missed = self._missed or (source.welcome and not source.over)
                elif not source.over:
                    if source.join_at <= now:
                        self._join(source, now)
                    due = min(due, source.join_at)
            fds = tuple((sock.fileno(), select.POLLIN) for sock in (self._own, self._control))
            return Wait(fds, max(due - now, 0.001))

    def _hear(self, address: Any, heard: wire.Heard, now: float, *, ours: bool) -> None:
        """Answers come to our own socket, announcements to the group."""
        if not ours and heard.kind in (wire.NUMBER, wire.BYE):
            source = self._source(address, heard, now)
            if source is None:
                return
            source.said = max(heard.number, source.said or 0)
            if heard.kind == wire.BYE and source.welcome:
                self._say(source, wire.leave(source.session, source.member))
            source.over = source.over or heard.kind == wire.BYE
            return
        found = self._sources.get((address, heard.session))
        if not ours or found is None or heard.member != found.member:
            self._refused += ours
        elif heard.kind == wire.CHALLENGE:
            found.cookie = heard.cookie
            self._join(found, now)
        elif heard.kind == wire.WELCOME:
            found.welcomed(heard.number, now)
            self._tell(found)

    def _join(self, source: Source, now: float) -> None:
        source.join_at = now + source.pause
        source.pause = min(source.pause * 2, LAST_PAUSE)
        if source.welcome or self._joins.take(now):
            self._say(source, wire.join(source.session, source.member, source.cookie, self._topics))

    def _say(self, source: Source, datagram: bytes) -> None:
        with suppress(OSError):  # it will be said again
            self._own.sendto(datagram, source.address)
