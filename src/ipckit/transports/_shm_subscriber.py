"""Subscribing on `shm://`: references from a queue of our own, to messages in memory that we can only read.

A publisher that dies, and comes back, is found again; what was published in between nobody can count, so the first message
after it has the gap -1, "some". What the dead one had published is received first: the memory is ours as well.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import _linkwire as wire
from .. import _native, errors
from .._linkdialer import Dialer
from .._linkwatch import Watch
from .._spi import Steps, TopicTerms, Wait, Want
from .._url import Url
from ..message import UNKNOWN, Parcel, Verdict
from . import _shm_topics as topics
from . import _unixsock
from ._shm_topics import Gift, TopicOptions

_log = logging.getLogger("ipckit")
_GIFT, _DIAL = "gift", "dial"


class ShmSubscriber:
    """`Intake`."""

    def __init__(self, url: Url, options: TopicOptions, terms: TopicTerms, gift: Gift) -> None:
        self._lock = threading.Lock()
        self._url, self._options = url, options
        self._dialer = Dialer(url, lambda: topics.dial(url, options, terms))
        self._watch = Watch()
        self._queue: _native.CastIn | None = None
        self._received = self._bytes = self._dropped = self._reconnects = 0
        self._missed = False  # an unknown number
        self._end: errors.IpcError | None = None
        self._closed = False
        self._sleepers = False
        try:
            self._take_up(gift)
        except BaseException:
            self._watch.close()
            raise

    @property
    def native(self) -> Any:
        return None if self._queue is None else self._gift.sock

    # -- Intake ------------------------------------------------------------------------------------------------------

    def try_get(self) -> Parcel | None:
        return self._get(_native.CastIn.try_take)

    def spin_get(self) -> Parcel | None:
        return self._get(_native.CastIn.spin_take)

    def _get(self, look: Callable[[_native.CastIn], tuple[int, bytes, bytes] | int | None]) -> Parcel | None:
        with self._lock:
            self._check()
            while True:
                if self._queue is None and not self._dial():
                    return None
                assert self._queue is not None
                try:
                    found = look(self._queue)
                except ValueError as error:
                    self._end = errors.ProtocolError(str(error), url=self._url)
                    self._drop_queue()
                    self._check()
                if found is None:
                    return None
                if isinstance(found, tuple):
                    return self._parcel(*found)
                if found == _native.GOODBYE:
                    self._dropped += self._queue.trailing()
                    self._end = errors.PeerClosed("the publisher closed", url=self._url)
                    self._drop_queue()  # which tells a publisher that is still there that we are done
                    self._check()
                _log.warning("%s: lost the publisher", self._url)
                self._drop_queue()
                self._missed = True
                self._dialer.later(time.monotonic() - self._since)

    def _parcel(self, gap: int, prefix: bytes, body: bytes) -> Parcel:
        try:
            parcel = wire.read_prefix(prefix, body)
        except errors.ProtocolError as error:
            self._end = errors.ProtocolError(error.message, url=self._url)
            self._drop_queue()
            self._check()
            raise
        self._received += 1
        self._bytes += len(body)
        if gap:
            self._dropped += gap
            parcel.gap = gap
        if self._missed:
            parcel.gap, self._missed = UNKNOWN, False
        return parcel

    def try_settle(self, parcel: Parcel, verdict: Verdict, delay: float) -> bool:
        return True  # nobody keeps it

    def try_flush(self) -> bool:
        return True

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check()
            if self._queue is not None:
                self._queue.arm()
            self._watch.ready()  # forget dials that are due: the caller tries again
            return self._watch.sleep()

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            return {
                "received": self._received,
                "bytes_received": self._bytes,
                "dropped": self._dropped,
                "reconnects": self._reconnects,
            }

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._drop_queue()
                self._dialer.close()
                self._watch.close()

    def abandon(self) -> None:
        """In a forked child."""
        self.close()

    # -- the publisher -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self._url)
        if self._end is not None:
            raise type(self._end)(self._end.message, url=self._url, hint=self._end.hint)

    def _take_up(self, gift: Gift) -> None:
        try:
            queue = _native.CastIn(
                gift.arena,
                gift.queue,
                gift.sock.fileno(),
                gift.data_bell,
                gift.room_bell,
                self._options.limit,
                -1 if self._options.spin is None else int(self._options.spin * 1e9),
                _unixsock.peer_of(gift.sock),
            )
        except ValueError as error:
            gift.close()
            raise errors.ProtocolError(str(error), url=self._url, operation="subscriber") from None
        except BaseException:
            gift.close()
            raise
        self._gift, self._queue = gift, queue
        self._since = time.monotonic()
        fds = ((gift.data_bell, select.POLLIN), (gift.sock.fileno(), select.POLLIN))
        self._watch.put(_GIFT, Wait(fds))

    def _drop_queue(self) -> None:
        if self._queue is not None:
            self._watch.drop(_GIFT)
            self._queue.close()
            self._queue = None
            self._gift.close()

    def _dial(self) -> bool:
        """Whether there is a publisher again."""
        self._watch.drop(_DIAL)  # its descriptors are passed on, or closed, by the next step
        found = self._dialer.try_dial()
        if not isinstance(found, Gift):
            self._watch.put(_DIAL, found)
            return False
        try:
            self._take_up(found)
        except errors.ProtocolError as error:
            self._end = error
            self._check()
        self._reconnects += 1
        _log.warning("%s: connected again", self._url)
        return True


def subscriber(url: Url, options: TopicOptions, terms: TopicTerms) -> Steps[Any]:
    gift = yield from topics.dial(url, options, terms)
    return ShmSubscriber(url, options, terms, gift)
