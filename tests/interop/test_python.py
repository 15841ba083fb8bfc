"""Python without ipckit: the programs that docs/wire/stream.md shows, run as they stand there; and ends that say no goodbye."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import pytest

import ipckit
from ipckit import errors

PAGE = Path(__file__).parents[2] / "docs" / "wire" / "stream.md"
CLIENT, SERVER = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_client_of_the_page(run):
    assert '("127.0.0.1", 5000)' in CLIENT
    with ipckit.listen("tcp://127.0.0.1:0") as listener:
        program = run(sys.executable, "-c", CLIENT.replace("5000", str(listener.url.host.port)))
        with listener.accept(30) as channel:
            assert channel.recv(30) == b"hello"
            channel.send(b"welcome")
            with pytest.raises(errors.PeerClosed):
                channel.recv(30)
        assert program.line() == "welcome"
        assert program.process.wait(30) == 0


def test_the_server_of_the_page(run):
    program = run(sys.executable, "-c", SERVER)
    for _ in range(3):
        with ipckit.connect("unix://calc", timeout=30) as channel:
            assert channel.peer.pid == program.pid
            for size in (0, 1, 65536, 1 << 20):
                channel.send(b"x" * size, 30)
                assert channel.recv(30) == b"x" * size
    with ipckit.connect("unix://calc?goodbye=off", timeout=30) as channel:
        channel.send(b"x")
        assert channel.recv(30) == b"x"
    with ipckit.connect("unix://calc?limit=100MiB", timeout=30) as channel:
        with contextlib.suppress(errors.PeerError):  # it may have hung up before all of it was sent
            channel.send(bytes((16 << 20) + 1), 30)
        with pytest.raises(errors.PeerError):
            channel.recv(30)


PLAIN = r"""
import os, socket, sys
place, how = sys.argv[1:]
sock = socket.create_connection(("127.0.0.1", int(place))) if place.isdigit() else socket.socket(socket.AF_UNIX)
if not place.isdigit():
    sock.connect(place)
sock.sendall(b"\0\0\0\5hello\0\0\0\0")
if how == "close":
    sock.close()
    print("closed", flush=True)
    sys.stdin.read()
os._exit(0) if how == "exit" else os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(
    ("scheme", "options", "how", "kind"),
    [
        # The kernel knows who was at the other end of a Unix socket, and how it ended: no option is needed.
        ("unix", "", "close", errors.PeerClosed),
        ("unix", "", "exit", errors.PeerClosed),
        ("unix", "", "kill", errors.PeerDied),
        ("unix", "?goodbye=off", "kill", errors.PeerDied),
        # On TCP a killed process and one that closes look alike: what says no goodbye has died, unless it never says any.
        ("tcp", "", "close", errors.PeerDied),
        ("tcp", "", "kill", errors.PeerDied),
        ("tcp", "?goodbye=off", "close", errors.PeerClosed),
        ("tcp", "?goodbye=off", "kill", errors.PeerClosed),
    ],
)
def test_without_a_goodbye(run, runtime_dir, scheme, options, how, kind):
    url = "unix://calc" if scheme == "unix" else "tcp://127.0.0.1:0"
    with ipckit.listen(url + options) as listener:
        place = f"{runtime_dir}/calc.sock" if scheme == "unix" else str(listener.url.host.port)
        run(sys.executable, "-c", PLAIN, place, how)
        with listener.accept(30) as channel:
            assert [channel.recv(30), channel.recv(30)] == [b"hello", b""]
            with pytest.raises(errors.PeerError) as caught:
                channel.recv(30)
            assert type(caught.value) is kind
            if kind is errors.PeerDied:
                assert ("SIGKILL" if scheme == "unix" else "goodbye=off") in str(caught.value)
