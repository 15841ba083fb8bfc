"""The short way from the socket to nats-py's parser: the same commands in the same order as by the client's own."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nats")
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from ipckit.transports._natsreader import shorten

COMMANDS = [
    b"MSG a.b 1 5\r\nhello\r\n",
    b"MSG a.b 2 reply.to 0\r\n\r\n",
    b"HMSG a 1 12 14\r\nNATS/1.0\r\n\r\nhi\r\n",
    b"MSG quoted 3 6\r\n-ERR\r\n\r\n",
    b"PING\r\n",
    b"PONG\r\n",
    b"+OK\r\n",
    b"-ERR 'Slow Consumer'\r\n",
    b'INFO {"server_id": "x"}\r\n',
]


class Transport:
    """Of asyncio's, as far as the shortcut touches it."""

    def __init__(self):
        self.reading = asyncio.Event()
        self.reading.set()

    def pause_reading(self):
        self.reading.clear()

    def resume_reading(self):
        self.reading.set()


class Home:
    def roused(self):
        pass


class Client:
    """nats-py's read loop over a stream, and what its parser calls. Pings and errors are answered with a wait, as there."""

    is_connected = True

    def __init__(self):
        self.heard = []
        self.tasks = []  # who called: None, or the name of a task
        self.failed = None
        self._transport = self
        self._io_reader = asyncio.StreamReader()
        self._io_reader.set_transport(Transport())
        self._ps = Parser(self)

    def _note(self, *what):
        self.heard.append(what)
        try:
            self.tasks.append(asyncio.current_task() is not None)
        except RuntimeError:
            self.tasks.append(False)

    async def _process_msg(self, sid, subject, reply, payload, headers):
        self._note("msg", sid, bytes(subject), bytes(reply), payload, headers)

    async def _process_ping(self):
        await asyncio.sleep(0)
        self._note("ping")

    async def _process_pong(self):
        self._note("pong")

    async def _process_err(self, message):
        await asyncio.sleep(0)
        self._note("err", message)

    async def _process_info(self, info):
        self._note("info", info["server_id"])

    async def read_loop(self):
        try:
            while not self._io_reader.at_eof():
                await self._ps.parse(await self._io_reader.read(1 << 16))
        except ProtocolError as error:
            self.failed = error


async def heard(pieces, *, short, turns):
    client = Client()
    reading = asyncio.create_task(client.read_loop())
    await asyncio.sleep(0)
    if short:
        shorten(client, Home())
    for piece, turn in zip(pieces, turns, strict=True):
        await client._io_reader._transport.reading.wait()
        client._io_reader.feed_data(piece)
        for _ in range(turn):
            await asyncio.sleep(0)
    await client._io_reader._transport.reading.wait()
    client._io_reader.feed_eof()
    await reading
    return client


@given(st.lists(st.sampled_from(COMMANDS), max_size=12), st.data())
def test_any_split_is_heard_as_by_the_client_itself(commands, data):
    stream = b"".join(commands)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(stream) - 1, 1)), max_size=8)))
    pieces = [piece for piece in map(stream.__getitem__, map(slice, [0, *cuts], [*cuts, None])) if piece]
    turns = data.draw(st.lists(st.integers(0, 3), min_size=len(pieces), max_size=len(pieces)))
    by_itself = asyncio.run(heard(pieces, short=False, turns=turns)).heard
    assert asyncio.run(heard(pieces, short=True, turns=turns)).heard == by_itself
    assert len(by_itself) == len(commands) - commands.count(b"+OK\r\n")


def test_messages_are_heard_before_feed_returns():
    async def main():
        client = Client()
        reading = asyncio.create_task(client.read_loop())
        await asyncio.sleep(0)
        shorten(client, Home())
        client._io_reader.feed_data(COMMANDS[0] * 3)
        assert [what[0] for what in client.heard] == ["msg"] * 3
        client._io_reader.feed_eof()
        await reading

    asyncio.run(main())


def test_an_error_is_answered_by_the_clients_own_task():
    client = asyncio.run(heard([COMMANDS[0] + COMMANDS[7][:3], COMMANDS[7][3:]], short=True, turns=[1, 1]))
    assert [what[0] for what in client.heard] == ["msg", "err"]
    assert client.tasks[1]


def test_what_is_no_command_ends_the_clients_own_loop():
    client = asyncio.run(heard([COMMANDS[0], b"HELLO\r\n", COMMANDS[0]], short=True, turns=[0, 3, 0]))
    assert isinstance(client.failed, ProtocolError)
    assert len(client.heard) == 1
