"""A C program on the other end of `unix://`: client.c, forty lines and the C library."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import ipckit
from ipckit import errors

SOURCE = Path(__file__).with_name("client.c")


@pytest.fixture(scope="session")
def program(compiler, tmp_path_factory) -> str:
    built = str(tmp_path_factory.mktemp("c") / "client")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", built], check=True, timeout=60)
    return built


@pytest.mark.parametrize(
    ("how", "kind"), [("goodbye", errors.PeerClosed), ("end", errors.PeerClosed), ("kill", errors.PeerDied)]
)
def test_a_client(program, run, runtime_dir, how, kind):
    with ipckit.listen("unix://calc") as listener:
        client = run(program, f"{runtime_dir}/calc.sock", how)
        with listener.accept(30) as channel:
            assert channel.peer.pid == client.pid
            for text in ("hello", "", "x" * 60_000):
                client.say(text + "\n")
                assert channel.recv(30) == text.encode()
                channel.send(text[::-1].encode())
                assert client.line() == text[::-1]
            client.finish()
            with pytest.raises(errors.PeerError) as caught:
                channel.recv(30)
            assert type(caught.value) is kind


def test_it_hears_our_goodbye(program, run, runtime_dir):
    with ipckit.listen("unix://calc") as listener:
        client = run(program, f"{runtime_dir}/calc.sock", "end")
        client.say("hello\n")
        with listener.accept(30) as channel:
            assert channel.recv(30) == b"hello"
        assert client.line() == "goodbye"
