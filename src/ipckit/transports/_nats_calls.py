"""Calls through NATS: an Exchange on subjects. The bytes are in docs/wire/rpc-brokers.md.

    ipckit.rpc.NAME.call        the group: the broker gives each call to one of the servers
    ipckit.rpc.NAME.all         every server: who is there?
    ipckit.rpc.NAME.news        every client: here is a server
    ipckit.rpc.NAME.to.<hex>    one of them; its letters go to `<address>.<tag>`, and the tag says what a refusal is about

Every letter has a reply subject: the sender's address, where the NATS server says at once that nobody subscribes there (503).
So a letter asks whether its receiver lives, too; while a call is under way, that is asked twice a second.

Core NATS may lose letters. Those of a pair are numbered, so a loss ends what the two have to do with each other, and is never a
gap. A call to the group has no number; who waits for its answer inquires. What comes from stock clients is on NAME.TARGET.METHOD.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import errors
from .._exchange import Came
from .._spi import Steps, Wait, Want
from .._url import Url
from . import _calls, _natsclient
from ._bridge import Bell
from ._nats_letters import BYE, COUNTED, FIRST, FRAME, HEAD, HERE, LEFT, MINE, NOT_MINE, PROBE, WHO, Letters
from ._natsclient import Connection, NatsOptions

_ID = struct.Struct(">I")
_WRITTEN = 4 << 20  # bytes on their way to the socket before a sender waits
_PART = 512 << 10  # bytes of one letter
_RETRY = (0.02, 0.5)
_ASK_FOR = 1.0
#: Seconds to wait for who has a call that all whom we know have denied: one was lost lately, or there is one whom we do not know.
_DENIED_FOR, _UNKNOWN_FOR = 0.25, 3.0
_LATELY = 5.0


@dataclass(slots=True)
class _Asked:
    """Who has not said yet that a call is not with them, and since when we ask."""

    servers: set[str]
    since: float


class NatsExchange:
    """What is marked *loop* runs on the client's loop, one at a time."""

    def __init__(self, connection: Connection, name: str, options: NatsOptions, *, serving: bool) -> None:
        self.url: Url = connection.url
        self.address = f"ipckit.rpc.{name}.to.{secrets.token_hex(8)}"
        self.key = secrets.token_hex(8)  # of this instance
        self.micro = name
        self.service = name.replace(".", "_")
        self._base = f"ipckit.rpc.{name}."
        self._connection = connection
        self._home = connection.home
        self._serving = serving
        self._limit = options.limit
        self._part = min(_PART, connection.client.max_payload - 64)
        self._letters = Letters(self.address, self._write, self._limit, self._part)
        self._bell = Bell(connection.home)
        self._room = Bell(connection.home)
        self._came: deque[Came] = deque()
        self._tasks: deque[Callable[[], object]] = deque()
        self._known: dict[str, None] = {}  # a client's servers
        self._asking: dict[int, _Asked] = {}
        self._lost = float("-inf")  # when a server was lost
        self._group: list[Any] = []
        self._leaving: asyncio.Task[None] | None = None
        self._settled = False
        self._emptied = False
        self._found = asyncio.Event()
        self._cut = connection.cut
        self._closed = False
        connection.mailboxes.add(self)

    async def start(self) -> None:
        """Loop."""
        connection = self._connection
        await connection.tap(f"{self.address}.*", self._letter)
        if self._serving:
            await connection.tap(f"{self._base}all", self._asked)
            connection.connected = self._again
            connection.last_words = self._last_words
            await self._serve_others()
            await connection.round_trip()
            self._letters.shout(f"{self._base}news", HERE)
            await connection.round_trip()  # every client knows us before we are given its call
            self._group.append(await connection.tap(f"{self._base}call", self._called, "ipckit"))
        else:
            await connection.tap(f"{self._base}news", self._announced)
            connection.last_words = self._last_words
        await connection.round_trip()
        connection.enter(self)
        connection.leave()  # who opened it had entered as well

    async def find(self) -> bool:
        """Loop: ask who is there. True when somebody answered. Raises PeerError when the connection was lost."""
        self._found = asyncio.Event()
        self._letters.shout(f"{self._base}all", WHO, "w", _ID.pack(0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._found.wait(), _ASK_FOR)
        self._check("client")
        return bool(self._known)

    @property
    def native(self) -> Any:
        return self._connection.client

    @property
    def largest(self) -> int:
        """Of one message, headers and all."""
        return int(self._connection.client.max_payload)

    def ring(self) -> None:
        self._bell.ring()
        self._room.ring()

    # -- sending -------------------------------------------------------------------------------------------------------

    def _write(self, subject: str, reply: str, kind: int, number: int, content: bytes | memoryview = b"") -> None:
        """Loop."""
        head = f"PUB {subject} {reply} {HEAD.size + len(content)}\r\n".encode()
        self._connection.write(b"".join((head, HEAD.pack(kind, number), content, b"\r\n")))

    def _do(self, function: Callable[[], object]) -> None:
        """On the loop, in the order in which it was asked for: the loop's own thread would else overtake the others."""
        self._tasks.append(function)
        self._home.poke(self._work)

    def _work(self) -> None:
        """Loop."""
        while self._tasks:
            self._tasks.popleft()()

    def _check(self, operation: str) -> None:
        if self._closed:
            raise errors.Closed("this exchange is closed", url=self.url, operation=operation)
        if self._serving:
            self._connection.check(self._connection.cut, operation)
        else:
            self._connection.check(self._cut, operation)

    def _crowded(self) -> bool:
        if self._connection.unwritten <= _WRITTEN:
            return False
        self._home.turn()
        return self._connection.unwritten > _WRITTEN

    def _fits(self, frame: bytes) -> None:
        if len(frame) > self._limit:
            raise errors.MessageTooLarge(
                f"{len(frame)} bytes, and the limit is {self._limit}", url=self.url, operation="call"
            )

    def try_call(self, id: int, frame: bytes) -> str | None:
        self._fits(frame)
        self._check("call")
        if self._crowded():
            return None
        if len(frame) > self._part:  # its parts must not go to several servers
            servers = self.servers()
            if not servers:
                return None
            server = secrets.choice(servers)
            return server if self.try_post(server, frame) else None
        self._do(lambda: self._letters.shout(f"{self._base}call", FRAME, f"c{id:x}", frame))
        return ""

    def try_post(self, to: str, frame: bytes) -> bool:
        self._fits(frame)
        self._check("send")
        if self._crowded():
            return False
        self._do(lambda: self._letters.post(to, frame))
        return True

    def try_flush(self) -> bool:
        if not self._connection.unwritten:
            return True
        self._home.turn()
        self._check("send")
        return not self._connection.unwritten

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _put(self, came: Came) -> None:
        self._came.append(came)
        self._bell.ring()

    def _called(self, message: Any) -> None:
        """Loop, as all of these, in the midst of the client's work: they must not raise. A call, from the group."""
        payload: bytes = message.data
        if len(payload) > HEAD.size and payload[0] == FRAME and self._ours(message.reply):
            self._put(Came("frame", message.reply.rpartition(".")[0], body=payload[HEAD.size :]))

    async def _serve_others(self) -> None:
        """Loop: what is not ours to read. `rpc._micro` does."""
        name = self.micro
        await self._connection.tap(f"{name}.*.*", self._request, "q")
        for verb in ("PING", "INFO", "STATS"):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{self.service}", f"$SRV.{verb}.{self.service}.{self.key}"):
                await self._connection.tap(subject, self._request)

    def _request(self, message: Any) -> None:
        self._put(Came("request", message.reply, 0, message.data, message.subject, message.headers))

    def respond(self, to: str, body: bytes, headers: bytes = b"") -> None:
        """To one who is no ipckit. `headers` is the whole block."""
        size = f"{len(headers)} {len(headers) + len(body)}" if headers else f"{len(body)}"
        head = f"{'HPUB' if headers else 'PUB'} {to} {size}\r\n"
        self._do(lambda: self._connection.write(b"".join((head.encode(), headers, body, b"\r\n"))))

    def _asked(self, message: Any) -> None:
        """Who is there?"""
        payload: bytes = message.data
        if not self._ours(message.reply) or len(payload) != HEAD.size + _ID.size:
            return
        (id,) = _ID.unpack_from(payload, HEAD.size)
        if id:  # in its place among the calls
            self._put(Came("who", message.reply.rpartition(".")[0], id))
        else:
            self._letters.shout(message.reply, HERE)

    def _announced(self, message: Any) -> None:
        """Here is a server."""
        who = message.reply.rpartition(".")[0]
        if self._ours(who) and message.data[:1] == bytes((HERE,)):
            self._appeared(who)

    def _ours(self, subject: str) -> bool:
        return subject.startswith(f"{self._base}to.")

    def _letter(self, message: Any) -> None:
        payload: bytes = message.data
        if len(payload) < HEAD.size:
            if (message.headers or {}).get("Status") == "503":
                self._refused(message.subject.rpartition(".")[2])
            return
        who = message.reply.rpartition(".")[0]
        if not self._ours(who):
            return
        kind, number = HEAD.unpack_from(payload)
        content = payload[HEAD.size :]
        if kind == HERE:
            self._appeared(who)
        elif not (self._serving or who in self._known or kind in (MINE, NOT_MINE)):
            return  # a server that we have given up, or no server at all
        elif kind == BYE:
            self._reset(who, tell=False)
        elif kind == LEFT:
            self._lose(who, "left")
        elif not self._letters.in_order(who, kind, number):
            self._reset(who, tell=True)
        elif kind <= COUNTED:
            self._counted(who, kind, content)
        elif kind != PROBE and len(content) == _ID.size:
            self._verdict(who, kind, _ID.unpack(content)[0])

    def _counted(self, who: str, kind: int, content: bytes) -> None:
        try:
            frame = self._letters.received(who, kind, content)
        except ValueError:
            self._reset(who, tell=True)
            return
        if frame is not None:
            self._put(Came("frame", who, body=frame))

    def _verdict(self, who: str, kind: int, id: int) -> None:
        if self._serving:
            return
        if kind in (MINE, NOT_MINE):
            self._appeared(who)
        if kind == MINE:
            self._asking.pop(id, None)
            self._put(Came("mine", who, id))
        elif kind == NOT_MINE and id in self._asking:
            self._asking[id].servers.discard(who)

    def _conclude(self) -> None:
        """Loop: nobody has the calls that all servers have denied; one that came lately has had the time to say so."""
        now = time.monotonic()
        patience = _DENIED_FOR if now - self._lost < _LATELY else _UNKNOWN_FOR
        for id, asked in tuple(self._asking.items()):
            if now - asked.since >= patience and not asked.servers & self._known.keys():
                del self._asking[id]
                self._put(Came("nobody", "", id))

    def _refused(self, tag: str) -> None:
        """The server says that nobody subscribes."""
        if tag == "w":  # not one server is there
            self._found.set()
        elif tag[:1] == "c":
            self._put(Came("nobody", "", int(tag[1:], 16), b"not taken"))
        elif tag[:1] == "p" and (who := self._letters.called(tag[1:])) is not None:
            self._lose(who, "lost")

    def _appeared(self, who: str) -> None:
        if not self._serving:
            known = who in self._known
            self._known[who] = None
            self._found.set()
            if not known:
                self._put(Came("here", who))

    def _reset(self, who: str, *, tell: bool) -> None:
        if tell:
            self._letters.shout(f"{who}.s", BYE)
        peer = self._letters.forget(who)
        if peer is not None:
            if who in self._known:  # it lives
                self._letters.meet(who).busy = peer.busy
            self._put(Came("reset", who))

    def _lose(self, who: str, how: Any) -> None:
        if who in self._known:
            self._lost = time.monotonic()
        self._known.pop(who, None)
        self._letters.forget(who)
        self._put(Came(how, who))

    def try_fetch(self) -> Came | None:
        # Who finds something silences nothing: a server's watcher looks here more often than it announces that it sleeps.
        if not self._came:
            # Who has just taken the last is not answered by another turn of the loop: he tries again once he is armed.
            emptied, self._emptied = self._emptied, False
            if not emptied:
                self._home.turn()
            if not self._came:
                self._check("recv")
                return None
        came = self._came.popleft()
        self._emptied = not self._came
        return came

    @property
    def settled(self) -> bool:
        return self._settled and not self._came

    def arm(self, want: Want) -> Wait:
        if want & Want.RECV:
            wait = self._bell.arm()
            return wait._replace(at_most=0.005) if want & Want.SEND else wait
        # Nobody rings when the socket has taken what was written.
        return self._room.arm()._replace(at_most=0.005)

    # -- who is there --------------------------------------------------------------------------------------------------

    def inquire(self, id: int) -> None:
        self._do(lambda: self._inquire(id))

    def _inquire(self, id: int) -> None:
        """Loop."""
        if id not in self._asking:
            self._asking[id] = _Asked(set(self._known), time.monotonic())
            self._letters.shout(f"{self._base}all", WHO, "s", _ID.pack(id))

    def answer(self, to: str, id: int, mine: bool) -> None:
        self._do(lambda: self._letters.tell(to, MINE if mine else NOT_MINE, _ID.pack(id)))

    def watch(self, who: str, busy: Callable[[], bool]) -> None:
        def watch() -> None:
            self._letters.meet(who).busy = busy

        self._do(watch)

    def drop(self, who: str) -> None:
        def drop() -> None:
            self._letters.shout(f"{who}.s", BYE)
            self._letters.forget(who)

        if not self._closed:
            self._do(drop)

    def servers(self) -> tuple[str, ...]:
        return tuple(self._known)

    def tick(self) -> None:
        """Loop, ten times a second."""
        self._conclude()
        for who, peer in tuple(self._letters.peers.items()):
            if peer.due():
                self._letters.tell(who, PROBE)

    def verdict(self, *, nobody: bool) -> None:
        """Ours come to our own address."""

    def _again(self) -> None:
        """Loop: the connection was lost and is back. What was under way meanwhile may be lost."""
        for who in tuple(self._letters.peers):
            self._reset(who, tell=True)
        self._letters.shout(f"{self._base}news", HERE)

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, who: str, id: int) -> None:
        self._asking.pop(id, None)

    def pass_on(self, who: str, id: int, frame: bytes) -> None:
        self._do(lambda: self._write(f"{self._base}call", f"{who}.c{id:x}", FRAME, FIRST, frame))

    def withdraw(self) -> None:
        def withdraw() -> None:
            # The client would forget the subscription at once, and with it what is on its way.
            lines = b"".join(f"UNSUB {each._id}\r\n".encode() for each in self._group)
            if not self._connection.write(lines):
                self._settled = True
                return
            self._leaving = self._home.loop.create_task(settle())

        async def settle() -> None:
            try:
                with contextlib.suppress(Exception):  # a connection that is lost brings nothing
                    await self._connection.round_trip()
            finally:
                self._settled = True
                self._bell.ring()

        self._home.do(withdraw)

    async def _last_words(self) -> None:
        for who in self._letters.peers:
            self._letters.shout(f"{who}.s", LEFT)  # the socket has it before it is closed

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._connection.mailboxes.discard(self)
        self._connection.leave(self)
        self._bell.close()
        self._room.close()

    def abandon(self) -> None:
        self._connection.abandon()
        self._bell.close()
        self._room.close()


def open_exchange(url: Url, name: str, options: NatsOptions, *, serving: bool) -> Steps[NatsExchange]:
    """Raises NothingListening when the driver throws Timeout before a server was found, or NATS itself."""
    return _calls.opened(lambda: _open(url, name, options, serving=serving), url, "NATS", _RETRY, serving=serving)


def _open(url: Url, name: str, options: NatsOptions, *, serving: bool) -> Steps[NatsExchange]:
    connection = yield from _natsclient.connect(url, options, "serve" if serving else "client", reconnect=serving)
    exchange = NatsExchange(connection, name, options, serving=serving)
    home = connection.home
    try:
        yield from home.steps(exchange.start)
        if not serving:
            yield from _calls.found(lambda: home.steps(exchange.find), url, _RETRY)
        return exchange
    except errors.IpcError:
        exchange.close()
        raise
    except BaseException as error:
        exchange.close()
        if not isinstance(error, Exception):
            raise
        raise _natsclient.map_nats(error, url, "open") from error
