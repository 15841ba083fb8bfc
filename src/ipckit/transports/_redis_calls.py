"""Calls through Redis: an Exchange on streams. The bytes are in docs/wire/rpc-brokers.md.

    ipckit:{NAME}:rpc:calls       stream: calls; the servers are the consumers of its group
    ipckit:{NAME}:rpc:servers     set: the boxes of the servers
    ipckit:{NAME}:rpc:clients     set: the boxes of the clients, who are told of a new server
    ipckit:{NAME}:rpc:box:ID-N    stream: what one of them is sent; N is the connection that it reads with

The group says who has taken a call, so nobody has to be asked but Redis. A call leaves the stream when it is answered. Whoever
reads with a connection that is gone is dead: that is asked twice a second of those on whom something depends. What a dead server
has left is cleared away by its clients, and by the other servers; the keys expire if everybody was killed.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from .. import errors
from .._spi import Came, Steps, Wait, Want
from .._url import Url
from ._bell import Bell
from ._mail import merge
from ._redis_address import Address, Native
from ._redis_wire import Wire, map_redis, open_wire

_log = logging.getLogger("ipckit")

FRAME, HERE, BYE, LEFT = b"F", b"H", b"B", b"L"
_GROUP = "servers"
_MAX_HELD = 4 << 20  # bytes of commands that the kernel has not taken, before a sender waits
_TRIM = (256, 1 << 20)  # frames and bytes read, after which they are trimmed
_ASK_EVERY = 0.5  # seconds between two looks at those who matter now
_ASK_AGAIN = 0.1  # seconds until the next question who has taken a call, when nobody had
_LOOK_EVERY = 10.0  # and at all others
_RETRY = (0.005, 0.1)
_REPAIR_EVERY = 0.02
_LOST = (errors.PeerError, errors.NothingListening)
_TAKE = 16  # calls that one server takes at a time

#: The stream goes with the last server, when nothing is in it.
_CLEAR = "if redis.call('SCARD', KEYS[2]) == 0 and redis.call('XLEN', KEYS[1]) == 0 then redis.call('DEL', KEYS[1]) end"
#: Who has taken a call: its consumer; "" when it is not in the stream any more; nothing while nobody has.
_WHO_HAS = """
local found = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if found[1] then return found[1][2] end
if not redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1] then return '' end
return false
"""
#: Take a call back that nobody has taken. 1: it is taken back.
_TAKE_BACK = (
    """
if redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1] then return 0 end
local taken = redis.call('XDEL', KEYS[1], ARGV[2])
"""
    + _CLEAR
    + """
return taken
"""
)
#: Forget a server that is dead, and the calls that it had.
_BURY = (
    """
redis.call('SREM', KEYS[2], ARGV[2])
redis.call('DEL', ARGV[2])
while true do
  local found = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 100, ARGV[2])
  if found['err'] or not found[1] then break end
  for _, each in ipairs(found) do
    redis.call('XACK', KEYS[1], ARGV[1], each[1])
    redis.call('XDEL', KEYS[1], each[1])
  end
end
redis.pcall('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
"""
    + _CLEAR
)


class RedisExchange:
    """Wires are for one thread at a time: `mutex`. Nothing here waits."""

    def __init__(self, address: Address, wires: list[Wire], limit: int, ttl: float, *, serving: bool) -> None:
        self.url: Url = address.url
        self._place = address
        self._prefix = f"ipckit:{{{address.name}}}:rpc:"
        self._serving = serving
        self._repair: Steps[None] | None = None
        self._adopt(wires)
        self.native = Native(self.address, address)
        self._limit, self._ttl = limit, ttl
        self._mutex = threading.RLock()
        self._came: deque[Came] = deque()
        self._news = Bell()
        self._withdrawn = not serving
        self._peers: dict[str, Callable[[], bool]] = {}
        self._known: dict[str, None] = {}
        self._live: set[int] = set()  # a client's calls
        self._entries: dict[int, bytes] = {}  # where they are
        self._taken: dict[tuple[str, int], bytes] = {}  # a server's
        self._vanished: set[int] = set()  # calls that were not in the stream any more when we looked
        self._wanted: set[int] = set()
        self._waiting: set[int] = set()  # calls that no server has taken yet, when we looked
        self._looking = 0  # answers that somebody is to be woken for
        self._look_at = self._look_at_all = self._prolong_at = self._ask_again_at = 0.0
        self._closed = False

    def _adopt(self, wires: list[Wire]) -> None:
        """These are our connections from now on, and what is read is a new box."""
        self._reader, self._writer, *rest = wires
        self._taker: Wire | None = rest[0] if rest else None
        self.address = f"{self._prefix}box:{uuid.uuid4().hex}-{self._reader.number}"
        self._last: bytes | str = "0-1"
        self._untrimmed = [0, 0]
        self._reading = self._taking = False
        self._error: errors.IpcError | None = None

    def _key(self, name: str) -> str:
        return self._prefix + name

    # -- opening -------------------------------------------------------------------------------------------------------

    def begin(self) -> Steps[None]:
        ask, lifetime = self._writer.ask, int(self._ttl * 1000)
        yield from ask("XADD", self.address, "0-1", "d", "")
        yield from ask("PEXPIRE", self.address, lifetime)
        if self._serving:
            yield from ask("SADD", self._key("servers"), self.address)
            try:
                yield from ask("XGROUP", "CREATE", self._key("calls"), _GROUP, "0", "MKSTREAM")
            except errors.IpcError as error:
                if "BUSYGROUP" not in error.message:
                    raise
            for client in (yield from ask("SMEMBERS", self._key("clients"))):
                self._tell(client.decode(), HERE)
            yield from self._bury_the_dead()
        else:
            yield from ask("SADD", self._key("clients"), self.address)
        self._prolong()
        self._ask()

    def _bury_the_dead(self) -> Steps[None]:
        """Servers that were killed and whom nobody has missed."""
        for server in (yield from self._writer.ask("SMEMBERS", self._key("servers"))):
            if not (yield from self._writer.ask("CLIENT", "LIST", "ID", _number(server.decode()))):
                self._bury(server.decode())

    def find(self) -> Steps[bool]:
        """Of a client: True when a server is there."""
        for name in (yield from self._writer.ask("SMEMBERS", self._key("servers"))):
            server = name.decode()
            if (yield from self._writer.ask("CLIENT", "LIST", "ID", _number(server))):
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
                self._live.add(id)
            self._add_call(self.address, id, frame)
            self._push(self._writer)
            return ""

    def _add_call(self, who: str, id: int, frame: bytes) -> None:
        def added(reply: Any) -> None:
            if isinstance(reply, Exception):
                self._fail(reply)
            elif reply is None and id:  # the last server has left, and the stream with it
                self._came.append(Came("nobody", "", id, b"not taken"))
                self._news.ring()
            elif id in self._live and who == self.address:
                self._entries[id] = reply
            if id in self._wanted and who == self.address:
                self._wanted.discard(id)
                self._looking -= 1
                self.inquire(id)

        self._writer.tell(added, "XADD", self._key("calls"), "NOMKSTREAM", "*", "w", who, "i", id, "d", frame)

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

    def _fail(self, reply: Exception) -> None:
        """Redis refuses what we need. Whatever it says, we begin anew: the keys may have been flushed, or memory may come."""
        if self._error is None:
            error = map_redis(reply, self.url, "call")
            _log.warning("%s: %s; connecting again", self.url, error.message)
            self._error = error if isinstance(error, _LOST) else errors.PeerDied(error.message, url=self.url)

    def try_flush(self) -> bool:
        with self._mutex:
            if self._writer.held:
                self._pump(self._writer)
            self._check()
            return not self._writer.held

    def _pump(self, wire: Wire) -> None:
        try:
            wire.pump()
        except errors.PeerError as error:
            self._error = self._error or error

    def _push(self, wire: Wire) -> None:
        try:
            wire.push()
        except errors.PeerError as error:
            self._error = self._error or error

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """A read is outstanding whenever we have nothing. Its reply is not looked for: who arms waits for that."""
        if not self._reading:
            self._reading = True
            self._reader.tell(self._read, "XREAD", "COUNT", 1024, "BLOCK", 0, "STREAMS", self.address, self._last)
            self._push(self._reader)
        if self._taker is not None and not self._taking and not self._withdrawn:
            self._taking = True
            words = ("GROUP", _GROUP, self.address, "COUNT", _TAKE, "BLOCK", 0, "STREAMS", self._key("calls"), ">")
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
        self._writer.tell(None, "XACK", self._key("calls"), _GROUP, number)
        self._writer.tell(None, "XDEL", self._key("calls"), number)
        self._pump(self._writer)

    def _recover(self) -> None:
        """A server whose connections were lost makes new ones. What was under way is over."""
        if self._repair is None:
            self._came.extend(Came("reset", who) for who in self._peers)
            self._peers.clear()
            self._taken.clear()
            self._looking = 0
            self._close_wires()
            self._repair = self._reopen()
        try:
            next(self._repair)
        except StopIteration:
            self._repair = None

    def _reopen(self) -> Steps[None]:
        pause = _RETRY[0]
        while True:
            wires: list[Wire] = []
            try:
                for _ in range(3):
                    wires.append((yield from open_wire(self.url, self._place.connection)))
                self._adopt(wires)
                yield from self.begin()
                return
            except errors.Closed:
                raise
            except errors.IpcError as error:
                for wire in wires:
                    wire.close()
                # To who has an answer to send meanwhile it is a lost connection, not an address that leads nowhere.
                lost = isinstance(error, errors.PeerError)
                self._error = error if lost else errors.PeerDied(error.message, url=self.url)
            yield Wait((), pause)
            pause = min(pause * 2, _RETRY[1])

    def _close_wires(self) -> None:
        for wire in (self._writer, self._reader, self._taker):
            if wire is not None:
                with suppress(errors.PeerError):
                    wire.close()

    def try_fetch(self) -> Came | None:
        with self._mutex:
            if self._serving and not self._closed and (self._repair or isinstance(self._error, _LOST)):
                self._recover()
                if self._repair is not None:
                    return self._came.popleft() if self._came else None
            if not self._came:
                self._ask()
                for wire in (self._reader, self._taker, self._writer):
                    if wire is not None:
                        self._pump(wire)
                self._tend()
                if not self._came:
                    if not (self._serving and isinstance(self._error, _LOST)):
                        self._check()
                    return None
            return self._came.popleft()

    @property
    def settled(self) -> bool:
        with self._mutex:
            return self._withdrawn and not self._taking and not self._came

    def arm(self, want: Want) -> Wait:
        with self._mutex:
            if self._repair is not None or (self._serving and isinstance(self._error, _LOST)):
                return Wait((), _REPAIR_EVERY)  # no descriptors, whose numbers come and go
            if (self._came and want & Want.RECV) or self._error is not None:
                return Wait((), 0)
            waits = []
            if want & Want.RECV:
                self._ask()
                waits += [self._reader.arm(), Wait((self._news.announce(),), self._due())]
                if self._taker is not None:
                    waits.append(self._taker.arm())
            if want & Want.SEND or self._looking or self._writer.held:
                waits.append(self._writer.arm())
            return merge(waits)

    # -- who is there --------------------------------------------------------------------------------------------------

    def _due(self) -> float:
        """Seconds until something is to be looked after."""
        due = min(self._look_at_all, self._prolong_at)
        if any(busy() for busy in self._peers.values()):
            due = min(due, self._look_at)
        if self._waiting:
            due = min(due, self._ask_again_at)
        return max(due - time.monotonic(), 0.001)

    def _tend(self) -> None:
        now = time.monotonic()
        if self._waiting and now >= self._ask_again_at:
            waiting, self._waiting = self._waiting, set()
            for id in waiting & self._entries.keys():
                self.inquire(id)
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
            there = {line.split(b" ", 1)[0] for line in reply.splitlines()}
            for each in who:
                if b"id=%d" % _number(each) not in there:
                    self._lose(each, "lost")

        self._looking += 1
        self._writer.tell(told, "CLIENT", "LIST", "ID", *(_number(each) for each in who))
        self._pump(self._writer)

    def _lose(self, who: str, how: Literal["lost", "left"]) -> None:
        if self._peers.pop(who, None) is None and who not in self._known:
            return
        self._known.pop(who, None)
        if how == "lost":
            self._bury(who)
        self._came.append(Came(how, who))
        self._news.ring()

    def _bury(self, who: str) -> None:
        keys = (2, self._key("calls"), self._key("servers"))
        self._writer.tell(None, "EVAL", _BURY, *keys, _GROUP, who)
        self._writer.tell(None, "SREM", self._key("clients"), who)
        self._pump(self._writer)

    def _prolong(self) -> None:
        self._prolong_at = time.monotonic() + self._ttl / 8
        for key in (self.address, *(self._key(name) for name in ("calls", "servers", "clients"))):
            self._writer.tell(None, "PEXPIRE", key, int(self._ttl * 1000))
        self._pump(self._writer)

    def inquire(self, id: int) -> None:
        with self._mutex:
            entry = self._entries.get(id)
            self._looking += 1
            if id not in self._live:
                self._looking -= 1
            elif entry is None:
                self._wanted.add(id)  # once Redis has said under which number it keeps the call
            else:
                self._writer.tell(
                    lambda reply: self._told(id, entry, reply), "EVAL", _WHO_HAS, 1, self._key("calls"), _GROUP, entry
                )
            self._pump(self._writer)
            self._news.ring()  # who receives has to look at that connection now, too

    def _told(self, id: int, entry: bytes, reply: Any) -> None:
        self._looking -= 1
        if isinstance(reply, Exception):
            self._fail(reply)
        elif reply:
            who = reply.decode()
            if who in self._known:
                self._came.append(Came("mine", who, id))
            else:  # one that we have found dead already
                self._bury(who)
                self._came.append(Came("nobody", "", id))
        elif reply is None:
            if self._known:
                self._waiting.add(id)
                self._ask_again_at = time.monotonic() + _ASK_AGAIN
            else:
                self._looking += 1
                self._take_back(entry, lambda back: self._took_back(id, back))
                self._pump(self._writer)
        elif id in self._vanished:  # its answer would have come by now
            self._vanished.discard(id)
            self._came.append(Came("nobody", "", id))
        else:
            self._vanished.add(id)
        self._news.ring()

    def _take_back(self, entry: bytes, handler: Callable[[Any], None] | None) -> None:
        self._writer.tell(handler, "EVAL", _TAKE_BACK, 2, self._key("calls"), self._key("servers"), _GROUP, entry)

    def _took_back(self, id: int, reply: Any) -> None:
        self._looking -= 1
        if reply == 1:
            self._came.append(Came("nobody", "", id, b"not taken"))
            self._news.ring()

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
            for ours in (self._live, self._vanished, self._waiting):
                ours.discard(id)
            self._entries.pop(id, None)
            number = self._taken.pop((who, id), None)
            if number is not None and not self._closed:
                self._done(number)

    # -- the end -------------------------------------------------------------------------------------------------------

    def withdraw(self) -> None:
        with self._mutex:
            self._withdrawn = True
            if self._taker is not None and not self._closed:
                self._writer.tell(None, "SREM", self._key("servers"), self.address)
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
            for entry in self._entries.values():  # nobody is to begin what nobody waits for
                self._take_back(entry, None)
            self._writer.tell(None, "SREM", self._key("clients"), self.address)
            self._writer.tell(None, "DEL", self.address)
            if self._repair is not None:
                self._repair.close()
            self._close_wires()
            self._news.close()

    def abandon(self) -> None:
        for wire in (self._reader, self._writer, self._taker):
            if wire is not None:
                wire.abandon()
        self._news.close()


def _fields(fields: Any) -> dict[bytes, bytes]:
    return dict(zip(fields[::2], fields[1::2], strict=False)) if fields else {}


def _number(box: str) -> int:
    """The connection that the owner of a box reads with; -1 for what is no box."""
    number = box.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else -1


def open_exchange(address: Address, limit: int, ttl: float, *, serving: bool) -> Steps[RedisExchange]:
    """Raises NothingListening when the driver throws Timeout before a server was found, or Redis itself."""
    reason: errors.IpcError | None = None
    pause = _RETRY[0]
    operation = "serve" if serving else "client"
    try:
        while True:
            try:
                return (yield from _open(address, limit, ttl, serving=serving))
            except (errors.NothingListening, errors.PeerError) as error:
                reason = error
            yield Wait((), pause)
            pause = min(pause * 2, _RETRY[1])
    except errors.Timeout as timeout:
        if isinstance(timeout.__cause__, errors.Timeout):  # Redis was there
            raise errors.NothingListening(timeout.message, url=address.url, operation=operation) from timeout
        message = "no Redis server answers" if reason is None else reason.message
        raise errors.NothingListening(message, url=address.url, operation=operation) from reason or timeout


def _open(address: Address, limit: int, ttl: float, *, serving: bool) -> Steps[RedisExchange]:
    wires: list[Wire] = []
    exchange: RedisExchange | None = None
    try:
        for _ in range(3 if serving else 2):
            wires.append((yield from open_wire(address.url, address.connection)))
        exchange = RedisExchange(address, wires, limit, ttl, serving=serving)
        yield from exchange.begin()
        pause = _RETRY[0]
        try:
            while not serving and not (yield from exchange.find()):
                yield Wait((), pause)
                pause = min(pause * 2, _RETRY[1])
        except errors.Timeout as timeout:
            raise errors.Timeout("nobody serves at this name", url=address.url) from timeout
        return exchange
    except BaseException:
        if exchange is not None:
            exchange.close()
        else:
            for wire in wires:
                wire.close()
        raise
