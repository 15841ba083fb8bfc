"""Node.js on the other end of `unix://` and `tcp://`: the standard `net` module, and frames.js from docs/wire/stream.md."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import ipckit
import ipckit.aio
from ipckit import errors

HERE = Path(__file__).parent
ECHOED = "11 echoed"


@pytest.fixture(params=["unix", "tcp"])
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


def address(scheme: str, options: str = "") -> str:
    """Where to listen."""
    return ("unix://calc" if scheme == "unix" else "tcp://127.0.0.1:0") + options


def place(listener, runtime_dir: str) -> str:
    """The same for Node.js: the path as the page says it, or the port."""
    return f"{runtime_dir}/calc.sock" if listener.url.scheme == "unix" else str(listener.url.host.port)


def ended(channel, kind: type[errors.IpcError]) -> errors.IpcError:
    with pytest.raises(errors.IpcError) as caught:
        channel.recv(30)
    assert type(caught.value) is kind, repr(caught.value)
    return caught.value


def echo(channel) -> None:
    for _ in range(11):
        channel.send(channel.recv(30), 30)


# -- Node.js connects ---------------------------------------------------------------------------------------------


@pytest.fixture
def client(node, run, runtime_dir, scheme):
    """Start the client; returns it and our end, with everything echoed."""

    def start(listener, plot: str):
        program = run(node, str(HERE / "client.js"), place(listener, runtime_dir), plot)
        channel = listener.accept(30)
        echo(channel)
        assert program.line() == ECHOED
        return program, channel

    return start


def test_a_client_says_goodbye(client, scheme):
    with ipckit.listen(address(scheme)) as listener:
        _, channel = client(listener, "goodbye")
        with channel:
            ended(channel, errors.PeerClosed)
            assert list(channel) == []


def test_a_client_hears_our_goodbye(client, scheme):
    with ipckit.listen(address(scheme)) as listener:
        program, channel = client(listener, "stay")
        channel.close()
        assert program.line() == "goodbye"


def test_without_goodbyes(client, scheme):
    with ipckit.listen(address(scheme, "?goodbye=off")) as listener:
        _, channel = client(listener, "end")
        with channel:
            ended(channel, errors.PeerClosed)
        program, channel = client(listener, "stay")
        channel.close()
        assert program.line() == "end"


def test_a_client_that_just_ends(client, scheme):
    """Its Unix socket's process can be asked for; on TCP nobody can, and the worse is assumed."""
    with ipckit.listen(address(scheme)) as listener:
        _, channel = client(listener, "end")
        with channel:
            if scheme == "unix":
                ended(channel, errors.PeerClosed)
            else:
                assert "goodbye=off" in str(ended(channel, errors.PeerDied))


def test_a_client_is_killed(client, scheme):
    with ipckit.listen(address(scheme)) as listener:
        program, channel = client(listener, "kill")
        with channel:
            error = ended(channel, errors.PeerDied)
            if scheme == "unix":
                assert error.pid == program.pid == channel.peer.pid
                assert "SIGKILL" in str(error)


@pytest.mark.parametrize("options", ["", "?goodbye=off"])
def test_a_client_ends_inside_a_frame(client, scheme, options):
    with ipckit.listen(address(scheme, options)) as listener:
        _, channel = client(listener, "torn")
        with channel:
            assert "inside a message" in str(ended(channel, errors.PeerDied))


def test_a_client_announces_too_much(client, scheme):
    with ipckit.listen(address(scheme)) as listener:
        program, channel = client(listener, "oversize")
        with channel:
            assert "4294967294" in str(ended(channel, errors.ProtocolError))
        program.line()  # the connection is over for it as well


# -- Node.js listens ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(node, run, runtime_dir, scheme):
    """A Node.js server, and its URL."""
    program = run(node, str(HERE / "server.js"), f"{runtime_dir}/calc.sock" if scheme == "unix" else "0")
    where = program.line()
    return program, "unix://calc" if scheme == "unix" else f"tcp://127.0.0.1:{where}"


@pytest.mark.parametrize("options", ["", "?goodbye=off"])
def test_a_server_echoes_and_hears_the_end(server, options):
    program, url = server
    with ipckit.connect(url + options, timeout=30) as first, ipckit.connect(url + options, timeout=30) as second:
        for size in (0, 1, 5, 65532, 65536, 1 << 20):
            first.send(b"1" * size, 30)
            second.send(b"2" * size, 30)
            assert first.recv(30) == b"1" * size
            assert second.recv(30) == b"2" * size
        batch = [b"%d" % number for number in range(1000)]
        assert first.send_many(batch, 30) == 1000
        assert [first.recv(30) for _ in batch] == batch
    for _ in range(2):
        assert program.line() == ("end" if options else "goodbye")


@pytest.mark.parametrize(
    ("plot", "kind"),
    [("goodbye", errors.PeerClosed), ("kill", errors.PeerDied), ("oversize", errors.ProtocolError)],
)
def test_how_a_server_ends(server, plot, kind):
    _, url = server
    with ipckit.connect(url, timeout=30) as channel:
        channel.send(b"x")
        assert channel.recv(30) == b"x"
        channel.send(plot.encode())
        ended(channel, kind)


def test_a_server_that_just_ends(server, scheme):
    _, url = server
    for options in ("", "?goodbye=off"):
        with ipckit.connect(url + options, timeout=30) as channel:
            channel.send(b"end")
            ended(channel, errors.PeerClosed if options or scheme == "unix" else errors.PeerDied)


def test_in_asyncio(server):
    program, url = server

    async def talk() -> None:
        async with await ipckit.aio.connect(url, timeout=30) as channel:
            for size in (0, 5, 65536, 1 << 20):
                await channel.send(bytes(size), 30)
                assert await channel.recv(30) == bytes(size)
            await channel.send(b"goodbye")
            assert [message async for message in channel] == []

    asyncio.run(talk())
    assert program.line() == "goodbye"
