"""A lock in a Redis server: the keys, the scripts, and one object's connection to them.

    ipckit:{NAME}:lock     string, expires with the lease: "ID TOKEN INHERITED WHO"; or "?ID", an offer to the eldest who waits
    ipckit:{NAME}:fence    string: "TOKEN" of the last grant, "TOKEN r" when it was given back; expires after a month without use
    ipckit:{NAME}:queue    list of the IDs that wait, the eldest first; expires when nobody looks at it any more
    ipckit:{NAME}:wake:ID  channel: what is offered to this object (the first 16 digits of its IDs)

A free lock is taken, and a held one given back, by one script in one round trip. Who finds it held subscribes to its channel and
stands in the queue; who gives it back *offers* it to the eldest. PUBLISH says whether that one is connected still, so the dead
cost nothing; an offer that a stopped process does not take up in time lapses. So nobody polls, and nobody overtakes. Where a
user may not subscribe, it polls, with jitter; all look now and then anyway, for the holder that never gives back.

A token is one more than the last, or the server's time in microseconds if that is more: so tokens grow also when the server has
forgotten everything, as long as its clock goes forward.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import errors
from .._leasing import Grant, Holder, LeaseTerms
from .._spi import Steps
from ._redis_address import Address, Native
from ._redis_line import Ear, Line, passes
from ._redis_scripts import Script, script
from ._redis_wire import Wire, Word, map_redis

_OFFER = 500  # ms that the eldest has to take up what it is offered
_LOOK = 2.0  # seconds between two looks of one who waits, at most; half of it by chance
_POLL = 0.1  # the same for one who cannot be woken
_LATE = 0.02  # seconds, by chance, that one who waits comes after the end of a lease: not all at once
_PATIENCE = 5.0  # seconds that one who will not wait gives a server that is away

#: KEYS lock, fence, queue; ARGV id, lease (ms), who, 1 to wait. Answers token and whether inherited, or 0 and ms to wait.
_TAKE = script("""
local held = redis.call('GET', KEYS[1])
if held and string.sub(held, 1, 32) == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  local token, inherited = string.match(held, '^%x+ (%d+) (%d)')
  return {token, tonumber(inherited)}
end
if held and held ~= '?' .. ARGV[1] then
  if ARGV[4] == '1' then
    if not redis.call('LPOS', KEYS[3], ARGV[1]) then redis.call('RPUSH', KEYS[3], ARGV[1]) end
    redis.call('EXPIRE', KEYS[3], 60)
  end
  return {'0', redis.call('PTTL', KEYS[1])}
end
if not held then redis.call('LREM', KEYS[3], 0, ARGV[1]) end
local last = redis.call('GET', KEYS[2]) or '0 r'
local inherited = string.find(last, 'r', 1, true) and 0 or 1
local now = redis.call('TIME')
local token = string.format('%.0f', math.max(tonumber(string.match(last, '^%d+')) + 1, now[1] * 1000000 + now[2]))
redis.call('SET', KEYS[2], token, 'EX', 2592000)
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. token .. ' ' .. inherited .. ' ' .. ARGV[3], 'PX', ARGV[2])
return {token, inherited}
""")

#: KEYS lock; ARGV id, lease (ms). Answers 1, or 0: it is not ours.
_RENEW = script("""
local held = redis.call('GET', KEYS[1])
if not held or string.sub(held, 1, 32) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")

#: KEYS lock, fence, queue; ARGV id, prefix of the channels, offer (ms). Answers 1, or 0: it was not ours; and the fence.
_GIVE_BACK = script("""
local held = redis.call('GET', KEYS[1])
local ours = held and string.sub(held, 1, 32) == ARGV[1]
if ours then
  redis.call('SET', KEYS[2], string.match(held, '^%x+ (%d+)') .. ' r', 'EX', 2592000)
elseif held ~= '?' .. ARGV[1] then
  redis.call('LREM', KEYS[3], 0, ARGV[1])
  return {0, redis.call('GET', KEYS[2])}
end
while true do
  local eldest = redis.call('LPOP', KEYS[3])
  if not eldest then
    redis.call('DEL', KEYS[1])
    break
  end
  local heard = redis.pcall('PUBLISH', ARGV[2] .. string.sub(eldest, 1, 16), eldest)
  if type(heard) == 'number' and heard > 0 then
    redis.call('SET', KEYS[1], '?' .. eldest, 'PX', ARGV[3])
    break
  end
end
return {ours and 1 or 0, redis.call('GET', KEYS[2])}
""")


class RedisLease:
    """`_leasing.Leasing`."""

    def __init__(self, address: Address, terms: LeaseTerms) -> None:
        self._address, self._terms = address, terms
        base = f"ipckit:{{{address.name}}}:"
        self._keys = (base + "lock", base + "fence", base + "queue")
        self._wake = base + "wake:"
        self._lease = max(int(terms.lease * 1000), 1)
        self._ear = Ear()
        self._line = Line(address, self._setup, self._opened, self._ear)
        self._channel: str | None = None  # of the ids that we go by, as soon as there is one to wait
        self._subscribed = False  # asked for, on this connection
        self._deaf = False  # we may not subscribe
        self._offered = b""  # the id that was offered last
        self._withdrawn = set[str]()  # to be said on the next connection
        self._token = 0

    @property
    def native(self) -> Native:
        return Native(self._keys[0], self._address)

    def open(self) -> Steps[None]:
        try:
            yield from self._line.open()
        except BaseException:
            self.close()
            raise

    def _setup(self, wire: Wire) -> Steps[None]:
        try:
            yield from wire.ask("HELLO", 3)
        except errors.PeerError:
            raise
        except errors.IpcError:
            self._deaf = True
        for one in (_TAKE, _RENEW, _GIVE_BACK):
            yield from wire.ask("SCRIPT", "LOAD", one.text)

    def _opened(self, wire: Wire) -> None:
        self._subscribed = False
        wire.pushed = self._heard
        for id in self._withdrawn:
            self._tell_back(wire, None, id)
        self._withdrawn.clear()

    def _heard(self, message: Any) -> None:
        self._offered = message[2]

    # what is asked

    def take(self, id: str, wait: bool) -> Steps[Grant | None]:
        until = None if wait else time.monotonic() + _PATIENCE
        try:
            while True:
                listening = wait and self._subscribed
                self._offered = b""
                since = self._terms.clock()
                reply = yield from self._ask(
                    until, _TAKE, self._keys, id, self._lease, self._terms.who, int(listening and not self._deaf)
                )
                if reply is None:
                    continue  # the connection was lost, perhaps after the server heard us: it knows us by the id
                if reply[0] != b"0":
                    self._token = int(reply[0])
                    return Grant(self._token, since, bool(reply[1]))
                if not wait:
                    return None
                if listening or self._deaf:
                    yield from self._sleep(id.encode(), reply[1])
                else:
                    self._subscribe(id)  # and ask once more: it may have been given back in between
        except BaseException as error:
            self.withdraw(id)
            if isinstance(error, errors.Timeout) and self._line.ready() is None:
                raise errors.NothingListening("no Redis server answers", url=self._address.url) from error
            raise

    def _subscribe(self, id: str) -> None:
        wire = self._line.ready()
        if wire is not None:
            self._subscribed = True
            wire.tell(self._answered, "SUBSCRIBE", self._wake + id[:16])

    def _answered(self, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._deaf = True

    def _sleep(self, id: bytes, left: int) -> Steps[None]:
        """Until it is offered to us, or its lease may have run out, or it is time to look."""
        look = (_POLL if self._deaf else _LOOK) * random.uniform(0.5, 1.0)
        if left >= 0:
            look = min(look, left / 1000 + random.uniform(0.001, _LATE))
        until = time.monotonic() + look
        while self._line.pump(unasked=True) and self._offered != id:
            remaining = until - time.monotonic()
            if remaining <= 0:
                return
            yield self._ear.wait(self._line.fds(), remaining)

    def renew(self, id: str) -> Steps[float | None]:
        try:
            while True:
                since = self._terms.clock()
                reply = yield from self._ask(None, _RENEW, self._keys[:1], id, self._lease)
                if reply is not None:
                    return since if reply else None
        except errors.Timeout:
            self._line.lose("no answer in time")  # perhaps another connection gets one
            raise

    def give_back(self, id: str) -> Steps[bool]:
        again = False
        try:
            while True:
                reply = yield from self._ask(None, _GIVE_BACK, self._keys, id, self._wake, _OFFER)
                if reply is not None:
                    break
                again = True
        except BaseException:
            self.withdraw(id)
            raise
        if again and not reply[0]:
            # Either the first one got through, or it was lost before. A server that knows the token has forgotten nothing.
            return int((reply[1] or b"0").split()[0]) >= self._token
        return bool(reply[0])

    def withdraw(self, id: str) -> None:
        with suppress(errors.IpcError):
            wire = self._line.ready()
            if wire is None:
                self._withdrawn.add(id)
            else:
                self._tell_back(wire, None, id)
                self._line.push()

    def _tell_back(self, wire: Wire, handler: Callable[[Any], None] | None, id: str) -> None:
        wire.tell(handler, "EVALSHA", _GIVE_BACK.sha, len(self._keys), *self._keys, id, self._wake, _OFFER)

    def holder(self) -> Steps[Holder | None]:
        while True:
            left = yield from self._said(None, "PTTL", self._keys[0])
            held = yield from self._said(None, "GET", self._keys[0])
            if left is not None:
                break
        words = (held or b"").decode(errors="replace").split(" ", 3)
        if len(words) != 4:
            return None
        return Holder(words[3], int(words[1]), left / 1000 if left >= 0 else None)

    # how it is asked

    def _ask(self, until: float | None, asked: Script, keys: tuple[str, ...], *words: Word) -> Steps[Any]:
        return self._said(until, "EVALSHA", asked.sha, len(keys), *keys, *words)

    def _said(self, until: float | None, *words: Word) -> Steps[Any]:
        """The reply; None: the connection was lost, and nobody knows. `until`: when to give up a server that is away."""
        wire = yield from self._wire(until)
        answer: list[Any] = []
        wire.tell(answer.append, *words)
        self._line.push()
        yield self._ear.wait(self._line.fds(), self._line.at_most())  # the reply cannot be there yet
        while True:
            if not self._line.pump(unasked=True) or self._line.ready() is not wire:
                return None
            if answer:
                break
            yield self._ear.wait(self._line.fds(), self._line.at_most())
        if isinstance(answer[0], Exception):
            if passes(answer[0]):
                self._line.lose(f"the server says: {answer[0]}")
                return None
            raise map_redis(answer[0], self._address.url, "lock") from answer[0]
        return answer[0]

    def _wire(self, until: float | None) -> Steps[Wire]:
        while (wire := self._line.ready()) is None:
            if until is not None and time.monotonic() >= until:
                raise errors.NothingListening("no Redis server answers", url=self._address.url)
            wait = self._ear.wait(self._line.fds(), self._line.at_most())
            if (wire := self._line.ready()) is not None:
                break
            yield wait
        return wire

    def close(self) -> None:
        self._line.close()
        self._ear.close()

    def abandon(self) -> None:
        self._line.abandon()
