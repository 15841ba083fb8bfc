"""unix://: who is there, how the other side ended, and what a listener survives."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import ipckit
from ipckit import _url, errors
from ipckit._spi import Peer, Want
from ipckit.transports import _death, _unixsock
from ipckit.transports._runtime import path_for
from ipckit.transports._stream import StreamOptions, ended_unknown


@pytest.fixture(autouse=True)
def _runtime(monkeypatch, tmp_path):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


def child(code: str, *args: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stdin=subprocess.PIPE)


def reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate(timeout=10)


_FOREIGN = """
import os, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(b"\\0\\0\\0\\5hello" + bytes.fromhex(sys.argv[3]))
how = sys.argv[2]
if how == "close": s.close(); print("x", flush=True); time.sleep(60)
if how == "kill": os.kill(os.getpid(), 9)
if how == "exit": os._exit(0)
if how == "fail": os._exit(3)
"""


@pytest.mark.parametrize("reaped", [False, True])
@pytest.mark.parametrize(
    ("how", "rest", "kind", "words"),
    [
        ("close", "", errors.PeerClosed, "closed"),
        ("exit", "", errors.PeerClosed, "closed"),
        ("kill", "", errors.PeerDied, "SIGKILL"),
        ("fail", "", errors.PeerDied, "status 3"),
        ("close", "0000", errors.PeerDied, "inside a message"),
        ("kill", "00000009ab", errors.PeerDied, "inside a message"),
        ("kill", "ffffffff", errors.PeerClosed, "closed"),
    ],
)
def test_a_foreign_client_ends(how, rest, kind, words, reaped):
    with ipckit.listen("unix://x") as listener:
        process = child(_FOREIGN, str(path_for(listener.url, ".sock")), how, rest)
        try:
            with listener.accept(10) as channel:
                assert channel.peer.pid == process.pid
                assert channel.recv(10) == b"hello"
                if reaped and how != "close":
                    process.wait(10)
                if reaped and how in ("kill", "fail") and not rest and not _kernel_remembers():
                    words = "ended"
                for _ in range(3):  # the answer stays, also after the process that closed in order is gone
                    with pytest.raises(kind, match=words) as caught:
                        channel.recv(10)
                    assert type(caught.value) is kind
                    if kind is errors.PeerDied:
                        assert caught.value.pid == process.pid
                    reap(process)
        finally:
            reap(process)


def _kernel_remembers() -> bool:
    """Linux 6.16: the exit status of a reaped peer."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor.split("-")[0])) >= (6, 16)


_OURS = """
import ipckit, os, sys
ch = ipckit.connect(sys.argv[1]); ch.send(b"hello")
how = sys.argv[2]
if how == "close": ch.close()
if how == "kill": os.kill(os.getpid(), 9)
if how == "close-kill": ch.close(); os.kill(os.getpid(), 9)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("how", "kind"), [("close", errors.PeerClosed), ("kill", errors.PeerDied), ("close-kill", errors.PeerClosed)]
)
def test_one_of_ours_ends(how, kind):
    with ipckit.listen("unix://x") as listener:
        process = child(_OURS, "unix://x", how)
        try:
            with listener.accept(10) as channel:
                assert channel.recv(10) == b"hello"
                with pytest.raises(kind) as caught:
                    channel.recv(10)
                assert type(caught.value) is kind
        finally:
            reap(process)


def test_without_goodbye_a_live_foreign_client_is_written_none():
    with ipckit.listen("unix://x?goodbye=off") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path_for(listener.url, ".sock")))
        with listener.accept(5) as channel:
            channel.send(b"hi")
        client.settimeout(5)
        seen = b""
        while data := client.recv(100):
            seen += data
        assert seen == b"\0\0\0\2hi"


def test_a_killed_end_of_a_pair_is_not_taken_for_ours():
    """The kernel names us as the peer of a pair, wherever its ends went."""
    left, right = ipckit.pair("unix://")
    right._link.close(goodbye=False)
    with left, pytest.raises(errors.PeerDied, match="goodbye"):
        left.recv(5)
    right.close()


def test_foreign_users_are_refused(monkeypatch):
    real = _unixsock.peer_of
    uids = [12345]
    monkeypatch.setattr(
        _unixsock, "peer_of", lambda sock: Peer(pid=real(sock).pid, uid=uids.pop() if uids else os.geteuid(), gid=0)
    )
    with ipckit.listen("unix://x") as listener:
        path = str(path_for(listener.url, ".sock"))
        with socket.socket(socket.AF_UNIX) as refused, socket.socket(socket.AF_UNIX) as welcome:
            refused.connect(path)
            welcome.connect(path)
            listener.accept(5).close()
            refused.settimeout(5)
            assert refused.recv(1) == b""
        uids.append(12345)
        with pytest.raises(errors.AccessDenied, match="12345"):
            ipckit.connect("unix://x", timeout=5)
        uids.append(12345)
        ipckit.connect("unix://x?allow=any", timeout=5).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="acting as another user needs root")
def test_another_user_cannot_even_connect(tmp_path):
    tmp_path.chmod(0o711)
    code = "import os,socket,sys; os.setuid(12345); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    with ipckit.listen(f"unix://{tmp_path}/x.sock"):
        process = subprocess.run(
            [sys.executable, "-I", "-c", code, f"{tmp_path}/x.sock"], capture_output=True, timeout=20, check=False
        )
    assert b"PermissionError" in process.stderr


def test_accept_lives_through_emfile(caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ipckit.listen("unix://x") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path_for(listener.url, ".sock")))
        listener._gate.bell  # noqa: B018 - the wait below needs it
        used = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        fill = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    fill.append(os.dup(0))
            assert listener._listener.try_accept() is None
            wait = listener._listener.arm(Want.RECV)
            assert wait.fds == ()
            assert 0 <= wait.at_most <= 0.1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fill + spare:
                os.close(fd)
        assert "cannot accept" in caplog.text
        listener.accept(5).close()


def test_a_forked_child_does_not_keep_the_connection_open():
    """Its parent is killed, the child lives on: the peer must hear of the death."""
    code = """
import ipckit, ipckit.errors, os, sys
ch = ipckit.connect("unix://x"); ch.send(b"hello")
if not os.fork():
    try: ch.send(b"from the child")
    except ipckit.errors.ForkedError: print("refused", flush=True)
    ch.close()
    sys.stdin.read(); os._exit(0)
sys.stdin.read(1)
os.kill(os.getpid(), 9)
"""
    with ipckit.listen("unix://x") as listener:
        process = child(code)
        try:
            with listener.accept(10) as channel:
                assert channel.recv(10) == b"hello"
                assert process.stdout.readline() == b"refused\n"
                with pytest.raises(errors.Timeout):
                    channel.recv(0.05)
                process.stdin.write(b"x")
                process.stdin.flush()
                with pytest.raises(errors.PeerDied, match="SIGKILL"):
                    channel.recv(10)
        finally:
            reap(process)


def test_huge_prefix_costs_one_connection():
    with ipckit.listen("unix://x?limit=1MiB") as listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path_for(listener.url, ".sock")))
        client.sendall(struct.pack(">I", 0xFFFFFFFE))
        with listener.accept(5) as channel:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(errors.ProtocolError, match="above the limit"):
                channel.recv(5)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024
        with ipckit.connect(listener.url, timeout=5) as good, listener.accept(5) as other:
            good.send(b"x")
            assert other.recv(5) == b"x"
            with pytest.raises(errors.MessageTooLarge, match="1048576"):
                other.send(bytes(1048577))


def test_native_is_for_looking():
    left, right = ipckit.pair("unix://")
    with left, right:
        with left.native.socket() as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
        right.send(b"still here")
        assert left.recv(5) == b"still here"


def test_waits_for_the_listener_and_gives_up():
    with pytest.raises(errors.NothingListening):
        ipckit.connect("unix://x", timeout=0.02)
    found = []
    waiter = threading.Thread(target=lambda: found.append(ipckit.connect("unix://x", timeout=10)))
    waiter.start()
    time.sleep(0.05)
    with ipckit.listen("unix://x") as listener, listener.accept(10):
        waiter.join()
        found[0].close()


def test_nothing_stays_open():
    before = sorted(os.listdir("/proc/self/fd"))
    with ipckit.listen("unix://x") as listener:
        for _ in range(5):
            with ipckit.connect("unix://x", timeout=5) as client, listener.accept(5) as server:
                client.send(b"x")
                server.recv(5)
    with pytest.raises(errors.NothingListening):
        ipckit.connect("unix://x", timeout=0.02)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_fate_of_the_living_and_the_dead(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        pid = os.fork()
        if not pid:
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(tmp_path / "s"))
            signal.pause()
        connection, _ = server.accept()
        with connection:
            assert _death.fate_of(connection.fileno(), pid).state == "alive"
            os.kill(pid, signal.SIGTERM)
            connection.recv(1)
            assert _death.fate_of(connection.fileno(), pid).how == "it was killed by SIGTERM"
            os.waitpid(pid, 0)
            if _kernel_remembers():
                assert _death.fate_of(connection.fileno(), pid).how == "it was killed by SIGTERM"
        assert _death.fate_of(-1, pid).state == "unknown"


def test_broken_is_always_death():
    url = _url.parse("tcp://a:1")
    for goodbye in (True, False):
        ended = ended_unknown(url, StreamOptions(goodbye=goodbye))
        assert isinstance(ended("recv", os.strerror(errno.ECONNRESET)), errors.PeerDied)
    assert isinstance(ended_unknown(url, StreamOptions(goodbye=False))("recv", None), errors.PeerClosed)
    assert isinstance(ended_unknown(url, StreamOptions())("recv", None), errors.PeerDied)
