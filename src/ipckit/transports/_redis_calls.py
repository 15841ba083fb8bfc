"""Calls through Redis: an Exchange on streams. The bytes are in docs/wire/rpc-brokers.md.

    ipckit:{NAME}:rpc:calls       stream: calls; the servers are the consumers of its group
    ipckit:{NAME}:rpc:servers     set: the boxes of the servers
    ipckit:{NAME}:rpc:clients     set: the boxes of the clients, who are told of a new server
    ipckit:{NAME}:rpc:box:ID-N    stream: what one of them is sent; N is the connection that it reads with

The group says who has taken a call, so nobody has to be asked but Redis. A call leaves the stream when it is answered. Whoever
reads with a connection that is gone is dead: that is asked ten times a second of those on whom something depends. What a dead
server has left is cleared away by its clients, and by the other servers; the keys expire if everybody was killed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal

from .. import errors
from .._exchange import Came
from .._spi import Steps, Wait, Want
from . import _calls
from ._bell import Bell
from ._mail import merge
from ._redis_address import Address, Native
from ._redis_group import GROUP, Group, Whereabouts, dead, number_of
from ._redis_wire import Wire, open_wire
from ._redis_wired import RETRY, Wired, close

FRAME, HERE, BYE, LEFT = b"F", b"H", b"B", b"L"
_MAX_HELD = 4 << 20  # bytes of commands that the kernel has not taken, before a sender waits
_TRIM = (256, 1 << 20)  # frames and bytes read, after which they are trimmed
_ASK_EVERY = 0.1  # seconds between two looks at those on whom a call depends now
_LOOK_EVERY = 10.0  # and at all others
_REPAIR_EVERY = 0.02
_TAKE = 16  # calls that one server takes at a time


class RedisExchange(Wired):
    """Wires are for one thread at a time: `mutex`. Nothing here waits."""

    def __init__(self, address: Address, wires: list[Wire], limit: int, ttl: float, *, serving: bool) -> None:
        super().__init__(address, f"ipckit:{{{address.name}}}:rpc:", wires)
        self._serving = serving
        self._group = Group(self._prefix, self._queue)
        self._repair: Steps[None] | None = None
        self.native = Native(self.address, address)
        self._limit, self._ttl = limit, ttl
        self._mutex = threading.RLock()
        self._came: deque[Came] = deque()
        self._news = Bell()
        self._withdrawn = not serving
        self._peers: dict[str, Callable[[], bool]] = {}
        self._known: dict[str, None] = {}
        self._whereabouts = Whereabouts(self._group, self._known, self._put, self._fail)  # of a client's calls
        self._taken: dict[tuple[str, int], bytes] = {}  # a server's
        self._looking = 0  # answers that somebody is to be woken for
        self._look_at = self._look_at_all = self._prolong_at = 0.0
        self._closed = False

    def _put(self, came: Came) -> None:
        self._came.append(came)
        self._news.ring()

    # -- opening -------------------------------------------------------------------------------------------------------

    def begin(self) -> Steps[None]:
        ask, lifetime = self._writer.ask, int(self._ttl * 1000)
        yield from ask("XADD", self.address, "0-1", "d", "")
        yield from ask("PEXPIRE", self.address, lifetime)
        if self._serving:
            yield from ask("SADD", self._group.servers, self.address)
            try:
                yield from ask("XGROUP", "CREATE", self._group.calls, GROUP, "0", "MKSTREAM")
            except errors.IpcError as error:
                if "BUSYGROUP" not in error.message:
                    raise
            for client in (yield from ask("SMEMBERS", self._group.clients)):
                self._tell(client.decode(), HERE)
            yield from self._bury_the_dead()
        else:
            yield from ask("SADD", self._group.clients, self.address)
        self._prolong()
        self._ask()

    def _bury_the_dead(self) -> Steps[None]:
        """Servers that were killed and whom nobody has missed."""
        for server in (yield from self._writer.ask("SMEMBERS", self._group.servers)):
            if not (yield from self._writer.ask("CLIENT", "LIST", "ID", number_of(server.decode()))):
                self._bury(server.decode())

    def find(self) -> Steps[bool]:
        """Of a client: True when a server is there."""
        for name in (yield from self._writer.ask("SMEMBERS", self._group.servers)):
            server = name.decode()
            if (yield from self._writer.ask("CLIENT", "LIST", "ID", number_of(server))):
                self._known[server] = None
        return bool(self._known)

    # -- sending -------------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closed:
            raise errors.Closed("this exchange is closed", url=self.url)
        if self._error is not None:
            raise type(self._error)(self._error.message, url=self.url) from self._error

    def _room(self, frame: bytes) -> bool:
        if len(frame) > self._limit:
            raise errors.MessageTooLarge(
                f"{len(frame)} bytes, and the limit is {self._limit}", url=self.url, operation="call"
            )
        self._check()
        if self._writer.held >= _MAX_HELD:
            self._pump(self._writer)
        return self._writer.held < _MAX_HELD

    def try_call(self, id: int, frame: bytes) -> str | None:
        with self._mutex:
            if not self._room(frame):
                return None
            if id:
                self._whereabouts.began(id)
            self._add_call(self.address, id, frame)
            self._push(self._writer)
            return ""

    def _add_call(self, who: str, id: int, frame: bytes) -> None:
        def added(reply: Any) -> None:
            if isinstance(reply, Exception):
                self._fail(reply)
            elif who == self.address:
                self._whereabouts.added(id, reply)

        self._group.add(added, who, id, frame)

    def try_post(self, to: str, frame: bytes) -> bool:
        with self._mutex:
            if not self._room(frame):
                return False
            self._tell(to, FRAME + frame)
            self._push(self._writer)
            return True

    def _tell(self, to: str, letter: bytes) -> None:
        def added(reply: Any) -> None:
            if isinstance(reply, Exception):
                self._fail(reply)
            elif reply is None and to in self._peers:  # its box was removed
                self._lose(to, "left")

        self._writer.tell(added, "XADD", to, "NOMKSTREAM", "*", "w", self.address, "d", letter)

    def try_flush(self) -> bool:
        with self._mutex:
            if self._writer.held:
                self._pump(self._writer)
            self._check()
            return not self._writer.held

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """A read is outstanding whenever we have nothing. Its reply is not looked for: who arms waits for that."""
        if not self._reading:
            self._reading = True
            self._reader.tell(self._read, "XREAD", "COUNT", 1024, "BLOCK", 0, "STREAMS", self.address, self._last)
            self._push(self._reader)
        if self._taker is not None and not self._taking and not self._withdrawn:
            self._taking = True
            words = ("GROUP", GROUP, self.address, "COUNT", _TAKE, "BLOCK", 0, "STREAMS", self._group.calls, ">")
            self._taker.tell(self._take, "XREADGROUP", *words)
            self._push(self._taker)

    def _read(self, reply: Any) -> None:
        self._reading = False
        if isinstance(reply, Exception):
            self._fail(reply)
            return
        for number, fields in reply[0][1] if reply else ():
            self._last = number
            found = _fields(fields)
            who, letter = found.get(b"w", b"").decode("ascii", "replace"), found.get(b"d", b"")
            self._untrimmed[0] += 1
            self._untrimmed[1] += len(letter)
            if who.startswith(self._prefix):
                self._letter(who, letter[:1], letter[1:])
        if self._untrimmed[0] >= _TRIM[0] or self._untrimmed[1] >= _TRIM[1]:
            self._untrimmed = [0, 0]
            self._writer.tell(None, "XTRIM", self.address, "MINID", self._last)
            self._pump(self._writer)

    def _letter(self, who: str, kind: bytes, content: bytes) -> None:
        if kind == FRAME and (self._serving or who in self._known):
            self._came.append(Came("frame", who, body=content))
        elif kind == HERE and not self._serving:
            if who not in self._known:
                self._known[who] = None
                self._came.append(Came("here", who))
        elif kind == BYE and who in self._peers:
            self._came.append(Came("reset", who))
        elif kind == LEFT:
            self._lose(who, "left")

    def _take(self, reply: Any) -> None:
        self._taking = False
        if isinstance(reply, Exception):
            if not str(reply).startswith("UNBLOCKED"):
                self._fail(reply)
            return
        for number, fields in reply[0][1] if reply else ():
            found = _fields(fields)
            who, frame = found.get(b"w", b"").decode("ascii", "replace"), found.get(b"d", b"")
            id = int(found[b"i"]) if found.get(b"i", b"x").isdigit() else 0
            if id and who.startswith(self._prefix):
                self._taken[who, id] = number
            else:  # it wants no answer, or nobody can be told one
                self._done(number)
            if who.startswith(self._prefix):
                self._came.append(Came("frame", who, body=frame))

    def _done(self, number: bytes) -> None:
        self._group.done(number)
        self._pump(self._writer)

    def _recover(self) -> None:
        """A server whose connections were lost makes new ones. What was under way is over."""
        if self._repair is None:
            self._came.extend(Came("reset", who) for who in self._peers)
            self._peers.clear()
            self._taken.clear()
            self._looking = 0
            close(self._every)
            self._repair = self._reopen()
        try:
            next(self._repair)
        except StopIteration:
            self._repair = None

    def try_fetch(self) -> Came | None:
        with self._mutex:
            if self._serving and not self._closed and (self._repair or self._lost):
                self._recover()
                if self._repair is not None:
                    return self._came.popleft() if self._came else None
            if not self._came:
                self._ask()
                for wire in self._every:
                    self._pump(wire)
                self._tend()
                if not self._came:
                    if not (self._serving and self._lost):
                        self._check()
                    return None
            return self._came.popleft()

    @property
    def settled(self) -> bool:
        with self._mutex:
            return self._withdrawn and not self._taking and not self._came

    def arm(self, want: Want) -> Wait:
        with self._mutex:
            if self._repair is not None or (self._serving and self._lost):
                return Wait((), _REPAIR_EVERY)  # no descriptors, whose numbers come and go
            if (self._came and want & Want.RECV) or self._error is not None:
                return Wait((), 0)
            waits = []
            if want & Want.RECV:
                self._ask()
                waits += [self._reader.arm(), Wait((self._news.announce(),), self._due())]
                if self._taker is not None:
                    waits.append(self._taker.arm())
            if want & Want.SEND or self._looking or self._whereabouts.asked or self._writer.held:
                waits.append(self._writer.arm())
            return merge(waits)

    # -- who is there --------------------------------------------------------------------------------------------------

    def _due(self) -> float:
        """Seconds until something is to be looked after."""
        due = min(self._look_at_all, self._prolong_at)
        if any(busy() for busy in self._peers.values()):
            due = min(due, self._look_at)
        if self._whereabouts.due is not None:
            due = min(due, self._whereabouts.due)
        return max(due - time.monotonic(), 0.001)

    def _tend(self) -> None:
        now = time.monotonic()
        self._whereabouts.tend(now)
        if now >= self._prolong_at:
            self._prolong()
        if now >= self._look_at:
            everybody = now >= self._look_at_all
            self._look_at = now + _ASK_EVERY
            who = [each for each, busy in self._peers.items() if everybody or busy()]
            if everybody:
                self._look_at_all = now + _LOOK_EVERY
            if who:
                self._look(who)

    def _look(self, who: list[str]) -> None:
        def told(reply: Any) -> None:
            self._looking -= 1
            if isinstance(reply, Exception):
                self._fail(reply)
                return
            for each in dead(who, reply):
                self._lose(each, "lost")

        self._looking += 1
        self._writer.tell(told, "CLIENT", "LIST", "ID", *(number_of(each) for each in who))
        self._pump(self._writer)

    def _lose(self, who: str, how: Literal["lost", "left"]) -> None:
        if self._peers.pop(who, None) is None and who not in self._known:
            return
        self._known.pop(who, None)
        if how == "lost":
            self._bury(who)
        self._put(Came(how, who))

    def _bury(self, who: str) -> None:
        self._group.bury(who)
        self._pump(self._writer)

    def _prolong(self) -> None:
        self._prolong_at = time.monotonic() + self._ttl / 8
        self._group.prolong(self.address, self._ttl)
        self._pump(self._writer)

    def inquire(self, id: int) -> None:
        with self._mutex:
            self._whereabouts.inquire(id)
            self._pump(self._writer)
            self._news.ring()  # who receives has to look at that connection now, too

    def answer(self, to: str, id: int, mine: bool) -> None:
        """Nobody asks: Redis knows."""

    def watch(self, who: str, busy: Callable[[], bool]) -> None:
        with self._mutex:
            self._peers[who] = busy

    def drop(self, who: str) -> None:
        with self._mutex:
            if not self._closed and self._peers.pop(who, None) is not None:
                self._tell(who, BYE)
                self._pump(self._writer)

    def servers(self) -> tuple[str, ...]:
        return tuple(self._known)

    def finish(self, who: str, id: int) -> None:
        with self._mutex:
            self._whereabouts.finish(id)
            number = self._taken.pop((who, id), None)
            if number is not None and not self._closed:
                self._done(number)

    # -- the end -------------------------------------------------------------------------------------------------------

    def withdraw(self) -> None:
        with self._mutex:
            self._withdrawn = True
            if self._taker is not None and not self._closed:
                self._writer.tell(None, "SREM", self._group.servers, self.address)
                self._writer.tell(None, "CLIENT", "UNBLOCK", self._taker.number, "ERROR")
                self._pump(self._writer)

    def pass_on(self, who: str, id: int, frame: bytes) -> None:
        with self._mutex:
            self._add_call(who, id, frame)
            self.finish(who, id)

    def close(self) -> None:
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            for who in self._peers:
                self._tell(who, LEFT)
            if self._serving:
                self._bury(self.address)
            self._whereabouts.give_up()
            self._writer.tell(None, "SREM", self._group.clients, self.address)
            self._writer.tell(None, "DEL", self.address)
            if self._repair is not None:
                self._repair.close()
            close(self._every)
            self._news.close()

    def abandon(self) -> None:
        for wire in self._every:
            wire.abandon()
        self._news.close()


def _fields(fields: Any) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=False)) if fields else {}


def open_exchange(address: Address, limit: int, ttl: float, *, serving: bool) -> Steps[RedisExchange]:
    """Raises NothingListening when the driver throws Timeout before a server was found, or Redis itself."""
    return _calls.opened(
        lambda: _open(address, limit, ttl, serving=serving), address.url, "Redis", RETRY, serving=serving
    )


def _open(address: Address, limit: int, ttl: float, *, serving: bool) -> Steps[RedisExchange]:
    wires: list[Wire] = []
    exchange: RedisExchange | None = None
    try:
        for _ in range(3 if serving else 2):
            wires.append((yield from open_wire(address.url, address.connection)))
        exchange = RedisExchange(address, wires, limit, ttl, serving=serving)
        yield from exchange.begin()
        if not serving:
            yield from _calls.found(exchange.find, address.url, RETRY)
        return exchange
    except BaseException:
        if exchange is not None:
            exchange.close()
        else:
            close(wires)
        raise
