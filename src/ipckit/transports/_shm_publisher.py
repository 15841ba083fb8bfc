"""Publishing on `shm://`: each message is written once into memory that all subscribers can read, and their queues refer to it.

What waits for a subscriber waits in its queue, bounded by `backlog`, and `on_full` says what happens at the bound; the count of
what was dropped is exact at both ends, because an entry leaves a queue exactly once (`_native/broadcast.h`). What was published
is the subscribers' from then on: it survives our close, and our death.

The keeper's thread lets subscribers in and hears of their end. Messages do not wake it.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import select
import socket
import threading
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from .. import _linkwire as wire
from .. import _native, errors
from .._linkkeeper import keeper
from .._linkwatch import GONE, Watch
from .._spi import PublishTerms, Steps, Wait, Want
from .._url import Url
from ..message import Parcel, compiled
from . import _shm_topics as topics
from . import _unixsock
from ._accept import Acceptor
from ._oserror import map_oserror
from ._runtime import path_for
from ._shm_topics import TopicOptions

_log = logging.getLogger("ipckit")
_POLICIES = {"block": 0, "drop_old": 1, "drop_new": 2, "error": 3}
_WAIT, _FULL, _BROKEN = 1, 2, 4  # what CastOut.put returns
_DOOR = "door"
_PATIENCE = 5.0  # seconds for a greeting
_HANDSHAKES = 32  # at once
_PATTERNS = 1000
_TOPICS = 4096  # of which it is remembered who gets them


class _Guest:
    """A connection that has not said yet what it wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def close(self) -> None:
        self.sock.close()


class _Reader(_Guest):
    """A subscriber."""

    def __init__(self, sock: socket.socket, slot: int, bells: tuple[int, int], hello: wire.Hello, limit: int) -> None:
        super().__init__(sock)
        self.slot, self.limit, self.group = slot, limit, hello.group
        self.data_bell, self.room_bell = bells
        self.patterns: list[Callable[[str], bool]] = [compiled(pattern) for pattern in hello.topics]

    def wants(self, topic: str) -> bool:
        return any(pattern(topic) for pattern in self.patterns)

    def close(self) -> None:
        super().close()
        os.close(self.data_bell)
        os.close(self.room_bell)


class _Audience(NamedTuple):
    """Who gets a topic. `packed` is how the native side likes the slots."""

    single: tuple[_Reader, ...]
    groups: tuple[deque[_Reader], ...]
    packed: bytes
    limit: int  # the least of all


def _pack(readers: tuple[_Reader, ...] | list[_Reader]) -> bytes:
    return array("I", [reader.slot for reader in readers]).tobytes()


class ShmPublisher:
    """`Publishing`, and `Tended` by the keeper."""

    def __init__(self, url: Url, options: TopicOptions, terms: PublishTerms) -> None:
        self._lock = threading.Lock()
        self._url, self._options, self._terms = url, options, terms
        self._cast = _native.CastOut(options.arena, options.backlog, _POLICIES[terms.on_full])
        try:
            sock, self._name = _unixsock.bind(url, path_for(url, ".shm"), topics.KIND)
        except BaseException:
            self._cast.close()
            raise
        self._acceptor = Acceptor(url, sock)
        self._quiet = Watch()  # the keeper's: arrivals and ends
        self._rooms = Watch()  # the callers': room bells, and the keeper's news
        self._guests: list[_Guest] = []
        self._readers: dict[int, _Reader] = {}  # by slot
        self._groups: dict[str, deque[_Reader]] = {}
        self._audience: dict[str, _Audience] = {}
        self._suffixes: dict[str, bytes] = {}  # the prefix of a message without its id, by topic
        self._retained: dict[str, deque[tuple[int, bytes, bytes]]] = {}
        self._order = itertools.count()
        self._sent = self._bytes = 0
        self._dropped = self._queued = 0  # at the close
        self._sleepers = self._closed = False
        keeper.tend(self)

    @property
    def url(self) -> Url:
        return self._url

    @property
    def native(self) -> socket.socket:
        return self._acceptor.sock

    # -- Publishing --------------------------------------------------------------------------------------------------

    def try_put(self, parcel: Parcel) -> bool:
        prefix = wire.prefix(parcel)
        size = len(prefix) + len(parcel.body)
        if size > self._options.limit or size > self._options.arena:
            raise self._too_large(size)
        with self._lock:
            self._check()
            found = self._audience.get(parcel.topic) or self._find(parcel.topic)
            packed = found.packed
            chosen = [self._of_group(group) for group in found.groups] if found.groups else ()
            if chosen:
                packed += _pack(chosen)
            passed_over: list[_Reader] = []
            if size > found.limit:
                everybody = (*found.single, *chosen)
                passed_over = [reader for reader in everybody if reader.limit < size]
                packed = _pack([reader for reader in everybody if reader.limit >= size])
            try:
                done = self._cast.put(packed, prefix, parcel.body)
            except OSError as error:
                raise map_oserror(error, self._url, "publish") from error
            if done >= _BROKEN:
                done -= _BROKEN
                keeper.look()  # which dismisses them: here they are still among those chosen
            if done == _WAIT:
                return False
            if done == _FULL:
                raise errors.QueueFull("a subscriber does not keep up", url=self._url, operation="publish")
            for reader in passed_over:
                _log.warning("%s: a subscriber does not get a message above its limit", self._url)
                self._cast.skip(reader.slot)
            for group in found.groups:
                group.rotate(-1)
            if self._terms.retain:
                last = self._retained.setdefault(parcel.topic, deque(maxlen=self._terms.retain))
                last.append((next(self._order), prefix, parcel.body))
            self._sent += 1
            self._bytes += len(parcel.body)
            return True

    def try_flush(self) -> bool:
        """What was put is in memory that the subscribers have, too."""
        with self._lock:
            self._check()
        return True

    def subscribers(self) -> int:
        with self._lock:
            self._check()
            return len(self._readers)

    def arm(self, want: Want) -> Wait:
        with self._lock:
            self._check()
            for slot in self._rooms.ready():
                if isinstance(slot, int) and slot in self._readers:
                    with suppress(BlockingIOError):
                        os.eventfd_read(self._readers[slot].room_bell)
            self._dismiss_broken()
            if want & Want.SEND:
                self._cast.want_room()
            self._sleepers = True
            return self._rooms.sleep()

    def counters(self) -> Mapping[str, int]:
        with self._lock:
            if not self._closed:
                self._queued, self._dropped = self._cast.counts()
            return {
                "sent": self._sent,
                "bytes_sent": self._bytes,
                "dropped": self._dropped,
                "subscribers": len(self._readers),
                "queued": self._queued,
            }

    def close(self) -> None:
        """Subscribers receive what was published, and then hear of the close."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queued, self._dropped = self._cast.counts()
            self._cast.close(True)
            self._let_go()
            self._name.release()
        keeper.look()

    def abandon(self) -> None:
        """In a forked child. The name and the listening socket are let go of by `_unixsock`."""
        if not self._closed:
            self._closed = True
            self._cast.close(False)
            self._let_go()

    def _let_go(self) -> None:
        self._acceptor.sock.close()
        for each in (*self._guests, *self._readers.values()):
            each.close()
        self._guests.clear()
        self._readers.clear()
        self._quiet.close()
        self._rooms.close()

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self._url)

    def _too_large(self, size: int) -> errors.MessageTooLarge:
        limit, arena = self._options.limit, self._options.arena
        return errors.MessageTooLarge(
            f"{size} bytes with its header, and {min(limit, arena)} is the limit",
            url=self._url,
            operation="publish",
            hint="limit= raises it" if size > limit else "size= is the memory for all messages",
        )

    # -- who gets what -----------------------------------------------------------------------------------------------

    def _find(self, topic: str) -> _Audience:
        single = tuple(r for r in self._readers.values() if r.group is None and r.wants(topic))
        groups = [deque(r for r in members if r.wants(topic)) for members in self._groups.values()]
        limit = min((r.limit for r in (*single, *itertools.chain(*groups))), default=self._options.limit)
        if len(self._audience) >= _TOPICS:
            self._audience.clear()
        found = self._audience[topic] = _Audience(single, tuple(filter(None, groups)), _pack(single), limit)
        return found

    def _of_group(self, group: deque[_Reader]) -> _Reader:
        """The next one in turn that keeps up, or just the next one."""
        for _ in range(len(group)):
            if self._cast.keeps_up(group[0].slot):
                break
            group.rotate(-1)
        return group[0]

    # -- Tended ------------------------------------------------------------------------------------------------------

    def tend(self) -> Wait | None:
        with self._lock:
            if self._closed:
                return None
            changed = False
            for key in self._quiet.ready():
                if isinstance(key, _Reader):
                    changed |= self._hear(key)
                elif isinstance(key, _Guest):
                    changed |= self._greet(key)
            self._dismiss_broken()
            self._open_door()
            if changed and self._sleepers:
                self._sleepers = False
                self._rooms.ring()
            return self._quiet.wait()

    def lingers(self) -> bool:
        return False

    def _open_door(self) -> None:
        self._quiet.put(_DOOR, self._acceptor.arm())
        while (sock := self._acceptor.try_accept()) is not None:
            try:
                _unixsock.check_peer(self._url, _unixsock.peer_of(sock), "accept", hint=None)
            except (OSError, errors.AccessDenied) as error:
                self._refuse(sock, str(error))
                sock.close()
                continue
            if len(self._guests) >= _HANDSHAKES:
                self._turn_out(self._guests[0], "too many connections sent no greeting")
            guest = _Guest(sock)
            self._guests.append(guest)
            self._quiet.put(guest, Wait(((sock.fileno(), select.POLLIN),), _PATIENCE))
        self._quiet.put(_DOOR, self._acceptor.arm())

    def _turn_out(self, guest: _Guest, why: str) -> None:
        _log.warning("%s: dropped a connection: %s", self._url, why)
        self._quiet.drop(guest)
        self._guests.remove(guest)
        self._refuse(guest.sock, why)
        guest.close()

    def _refuse(self, sock: socket.socket, why: str) -> None:
        with suppress(OSError):  # it does not listen any more? dropping it says enough
            sock.send(topics.greeting(topics.REFUSED, 0, why.encode()[:500]), socket.MSG_NOSIGNAL)

    def _greet(self, guest: _Guest) -> bool:
        """It said something, or left, or took too long. Whether it is a subscriber now."""
        try:
            data = guest.sock.recv(topics.MOST + 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self._turn_out(guest, "it sent no greeting")
            return False
        except OSError as error:
            self._turn_out(guest, str(error))
            return False
        try:
            if not data:
                self._turn_out(guest, "it left before it greeted")
                return False
            found = topics.read_greeting(data)
            if found.kind != topics.SUBSCRIBE:
                raise errors.ProtocolError("it did not subscribe")
            hello = wire.read_hello(found.text, wire.SUBSCRIBER)
            if not 1 <= len(hello.topics) <= _PATTERNS or not all(hello.topics):
                raise errors.ProtocolError(f"{len(hello.topics)} patterns, or empty ones")
            self._welcome(guest, hello, found.number)
        except errors.ProtocolError as error:
            self._turn_out(guest, error.message)
            return False
        except OSError as error:
            self._turn_out(guest, error.strerror or str(error))
            return False
        return True

    def _welcome(self, guest: _Guest, hello: wire.Hello, limit: int) -> None:
        first = hello.group is None or hello.group not in self._groups
        last = self._last(hello) if first else []
        fds: list[int] = []
        slot = -1
        try:
            for _ in range(2):
                fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            slot, queue = self._cast.admit(self._options.backlog + len(last), fds[0])
            try:
                topics.send_queue(guest.sock, self._options.limit, [self._cast.memory(), queue, *fds])
            finally:
                os.close(queue)
        except OSError:
            if slot >= 0:
                self._cast.remove(slot)
            for fd in fds:
                os.close(fd)
            raise
        self._guests.remove(guest)
        self._quiet.drop(guest)
        reader = _Reader(guest.sock, slot, (fds[0], fds[1]), hello, limit)
        self._readers[slot] = reader
        if hello.group is not None:
            self._groups.setdefault(hello.group, deque()).append(reader)
        self._audience.clear()
        self._quiet.put(reader, Wait(((reader.sock.fileno(), select.POLLIN | GONE),)))
        self._rooms.put(slot, Wait(((reader.room_bell, select.POLLIN),)))
        for _, prefix, body in last:
            if len(prefix) + len(body) <= limit:
                self._cast.put(_pack([reader]), prefix, body, True)
            else:
                self._cast.skip(slot)

    def _last(self, hello: wire.Hello) -> list[tuple[int, bytes, bytes]]:
        patterns = [compiled(pattern) for pattern in hello.topics]
        kept = [
            each for topic, last in self._retained.items() if any(wants(topic) for wants in patterns) for each in last
        ]
        return sorted(kept, key=lambda each: each[0])

    def _hear(self, reader: _Reader) -> bool:
        """Nothing is said on this socket after the greeting: it is the end, or a stranger."""
        if reader.slot not in self._readers:
            return False
        try:
            data = reader.sock.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ECONNRESET:
                _log.warning("%s: lost a subscriber: %s", self._url, error.strerror)
            data = b""
        if data:
            _log.warning("%s: dropped a subscriber: it wrote to the control socket", self._url)
        self._dismiss(reader)
        return True

    def _dismiss_broken(self) -> None:
        for slot in self._cast.broken():
            _log.warning("%s: dropped a subscriber: the counts of its queue are impossible", self._url)
            self._dismiss(self._readers[slot])

    def _dismiss(self, reader: _Reader) -> None:
        self._quiet.drop(reader)
        self._rooms.drop(reader.slot)
        del self._readers[reader.slot]
        self._cast.remove(reader.slot)
        reader.close()
        self._audience.clear()
        if reader.group is not None:
            self._groups[reader.group].remove(reader)
            if not self._groups[reader.group]:
                del self._groups[reader.group]


def publisher(url: Url, options: TopicOptions, terms: PublishTerms) -> Steps[Any]:
    try:
        return ShmPublisher(url, options, terms)
    except OSError as error:
        if isinstance(error, errors.IpcError):
            raise
        raise map_oserror(error, url, "publisher") from error
    yield  # nothing to wait for
