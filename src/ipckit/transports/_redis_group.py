"""What Redis knows of the servers that share a name, and what it is asked: who has taken a call, who is dead.

The servers are the consumers of a group that reads the stream of calls, so Redis knows who has taken which; scripts ask and
change that in one step, and nobody comes in between. `Whereabouts` follows the calls of one client.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._exchange import Came

GROUP = "servers"
_ASK_AGAIN = 0.1  # seconds until the next question who has taken a call, when nobody had

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
_TAKE_BACK = f"""
if redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)[1] then return 0 end
local taken = redis.call('XDEL', KEYS[1], ARGV[2])
{_CLEAR}
return taken
"""
#: Forget a server that is dead, and the calls that it had.
_BURY = f"""
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
{_CLEAR}
"""

Handler = Callable[[Any], None]


class Group:
    """The keys of one name, and the commands on them. `tell(handler, *words)` queues one, as `Wire.tell` does."""

    def __init__(self, prefix: str, tell: Callable[..., None]) -> None:
        self.calls, self.servers, self.clients = (prefix + name for name in ("calls", "servers", "clients"))
        self._tell = tell

    def add(self, handler: Handler, who: str, id: int, frame: bytes) -> None:
        """A call. `handler` gets its number; None when there is no stream, and so no server."""
        self._tell(handler, "XADD", self.calls, "NOMKSTREAM", "*", "w", who, "i", id, "d", frame)

    def done(self, number: bytes) -> None:
        """This call was answered."""
        self._tell(None, "XACK", self.calls, GROUP, number)
        self._tell(None, "XDEL", self.calls, number)

    def who_has(self, handler: Handler, number: bytes) -> None:
        self._tell(handler, "EVAL", _WHO_HAS, 1, self.calls, GROUP, number)

    def take_back(self, handler: Handler | None, number: bytes) -> None:
        self._tell(handler, "EVAL", _TAKE_BACK, 2, self.calls, self.servers, GROUP, number)

    def bury(self, who: str) -> None:
        """Everything of one who is dead, or has left."""
        self._tell(None, "EVAL", _BURY, 2, self.calls, self.servers, GROUP, who)
        self._tell(None, "SREM", self.clients, who)

    def prolong(self, box: str, seconds: float) -> None:
        """The keys live so much longer."""
        for key in (box, self.calls, self.servers, self.clients):
            self._tell(None, "PEXPIRE", key, int(seconds * 1000))


class Whereabouts:
    """Where the calls of one client are. `found` is told, with `mine` and `nobody`; `failed` gets an error of Redis.

    Attributes:
        asked: questions whose answers somebody has to be woken for.
    """

    def __init__(
        self,
        group: Group,
        servers: Mapping[str, None],
        found: Callable[[Came], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._group, self._servers = group, servers
        self._found, self._failed = found, failed
        self._live: set[int] = set()
        self._numbers: dict[int, bytes] = {}  # under which Redis keeps them
        self._wanted: set[int] = set()  # to be asked about as soon as there is a number
        self._waiting: set[int] = set()  # no server had taken them yet
        self._vanished: set[int] = set()  # they were not in the stream any more
        self._ask_again_at = 0.0
        self.asked = 0

    def began(self, id: int) -> None:
        self._live.add(id)

    def added(self, id: int, number: bytes | None) -> None:
        """Redis has it, under this number; None: it does not."""
        wanted = id in self._wanted
        if wanted:
            self._wanted.discard(id)
            self.asked -= 1
        if id not in self._live:
            return
        if number is None:
            self._found(Came("nobody", "", id, b"not taken"))
            return
        self._numbers[id] = number
        if wanted:
            self.inquire(id)

    def finish(self, id: int) -> None:
        for ours in (self._live, self._vanished, self._waiting):
            ours.discard(id)
        self._numbers.pop(id, None)

    def inquire(self, id: int) -> None:
        number = self._numbers.get(id)
        if id not in self._live:
            return
        if number is not None:
            self.asked += 1
            self._group.who_has(lambda reply: self._told(id, number, reply), number)
        elif id not in self._wanted:
            self.asked += 1
            self._wanted.add(id)

    def _told(self, id: int, number: bytes, reply: Any) -> None:
        self.asked -= 1
        if isinstance(reply, Exception):
            self._failed(reply)
        elif reply:
            self._taken_by(reply.decode(), id)
        elif reply is None:
            self._not_taken(id, number)
        elif id in self._vanished:  # its answer would have come by now
            self._vanished.discard(id)
            self._found(Came("nobody", "", id))
        else:
            self._vanished.add(id)

    def _taken_by(self, who: str, id: int) -> None:
        if who in self._servers:
            self._found(Came("mine", who, id))
        else:  # one that was found dead already
            self._group.bury(who)
            self._found(Came("nobody", "", id))

    def _not_taken(self, id: int, number: bytes) -> None:
        def took_back(reply: Any) -> None:
            self.asked -= 1
            if reply == 1:
                self._found(Came("nobody", "", id, b"not taken"))

        if self._servers:
            self._waiting.add(id)
            self._ask_again_at = time.monotonic() + _ASK_AGAIN
        else:
            self.asked += 1
            self._group.take_back(took_back, number)

    @property
    def due(self) -> float | None:
        """When there is something to tend to."""
        return self._ask_again_at if self._waiting else None

    def tend(self, now: float) -> None:
        if self._waiting and now >= self._ask_again_at:
            waiting, self._waiting = self._waiting, set()
            for id in waiting & self._numbers.keys():
                self.inquire(id)

    def give_up(self) -> None:
        """Nobody is to begin what nobody waits for."""
        for number in self._numbers.values():
            self._group.take_back(None, number)


def dead(who: Iterable[str], listed: bytes) -> list[str]:
    """Of these, those whose connection is not in what CLIENT LIST said."""
    there = {line.split(b" ", 1)[0] for line in listed.splitlines()}
    return [each for each in who if b"id=%d" % number_of(each) not in there]


def number_of(box: str) -> int:
    """The connection that the owner of a box reads with; -1 for what is no box."""
    number = box.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdigit() else -1
