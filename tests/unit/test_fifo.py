"""What is particular to fifo://: files, what is left of them, and what somebody else put in their place."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

import ipckit
from ipckit import errors
from ipckit.transports import _owner, fifo


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    path = tmp_path / "run"
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(path))
    return path


def pair(url, theirs=None):
    with ipckit.listen(url) as listener:
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(theirs or url, timeout=20)))
        thread.start()
        server = listener.accept(timeout=20)
        thread.join()
        return found[0], server


def exchange(url):
    a, b = pair(url)
    with a, b:
        a.send(b"hi")
        assert b.recv(timeout=5) == b"hi"
        b.send(b"ho")
        assert a.recv(timeout=5) == b"ho"


def test_the_name_is_there_while_somebody_listens(run_dir):
    with ipckit.listen("fifo://x") as listener:
        found = os.lstat(run_dir / "x.fifo")
        assert stat.S_ISFIFO(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
        assert listener.native == run_dir / "x.fifo"
    assert os.listdir(run_dir) == ["fifo"]


def test_nothing_is_left_while_a_channel_lives(run_dir):
    a, b = pair("fifo://x")
    with a, b:
        assert os.listdir(run_dir / "fifo") == []
        assert os.listdir(run_dir) == ["fifo"]
        assert b.peer.pid == a.peer.pid == os.getpid()


def test_a_path(tmp_path):
    url = f"fifo://{tmp_path}/here"
    exchange(url)
    assert not os.path.exists(tmp_path / "here")


@pytest.mark.parametrize("who", ["both", "listener", "client"])
def test_a_larger_buffer(who):
    import fcntl

    larger = "fifo://x?size=256KiB"
    a, b = pair("fifo://x" if who == "client" else larger, "fifo://x" if who == "listener" else larger)
    with a, b:
        assert fcntl.fcntl(a.native.write, fcntl.F_GETPIPE_SZ) == 256 << 10
        assert fcntl.fcntl(b.native.write, fcntl.F_GETPIPE_SZ) == 256 << 10


def test_a_buffer_that_is_not_allowed_is_told_to_who_listens(monkeypatch):
    def refuse(fd, command, size):
        raise PermissionError(1, "Operation not permitted")

    with pytest.raises(errors.BadOption, match="at most 1GiB"):
        ipckit.listen("fifo://x?size=2GiB")
    monkeypatch.setattr("ipckit.transports._stream.fcntl.fcntl", refuse)
    with pytest.raises(errors.ResourceLimit, match="pipe-max-size"):
        ipckit.listen("fifo://x?size=256KiB")


@pytest.mark.parametrize("kind", ["fifo", "file", "link", "read"])
def test_what_stands_there_already(tmp_path, kind):
    path = tmp_path / "here"
    reader = -1
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        os.symlink(tmp_path / "elsewhere", path)
    else:
        os.mkfifo(path)
        if kind == "read":
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if kind == "fifo":
        exchange(f"fifo://{path}")
    else:
        with pytest.raises(errors.AddressInUse):
            ipckit.listen(f"fifo://{path}")
        assert os.path.lexists(path)
    if reader >= 0:
        os.close(reader)


def test_a_link_is_not_followed(tmp_path):
    os.mkfifo(tmp_path / "real")
    reader = os.open(tmp_path / "real", os.O_RDONLY | os.O_NONBLOCK)
    os.symlink(tmp_path / "real", tmp_path / "here")
    with pytest.raises(errors.AccessDenied):
        ipckit.connect(f"fifo://{tmp_path}/here", timeout=1)
    os.close(reader)


def test_garbage_costs_nobody_else(tmp_path):
    path = tmp_path / "here"
    with ipckit.listen(f"fifo://{path}") as listener:
        fd = os.open(path, os.O_WRONLY)
        for garbage in (
            b"\n\n",
            b"H{}\n",
            os.urandom(5000),
            b"x" * 20_000,
            b"\n",
            b"H" + b"[" * 3000 + b"\n",
            b"half of",
        ):
            os.write(fd, garbage)
        os.close(fd)
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(f"fifo://{path}", timeout=20)))
        with pytest.raises(errors.Timeout):
            listener.accept(timeout=0.1)
        thread.start()
        with listener.accept(timeout=20) as channel:
            thread.join()
            found[0].send(b"hi")
            assert channel.recv(timeout=5) == b"hi"
            found[0].close()


@pytest.mark.parametrize(
    "card",
    [
        {},
        {"name": "1.1.1"},
        {"name": "../x", "directory": "/tmp"},
        {"name": "1.1.1", "directory": "relative"},
        {"name": "1.1.1", "directory": "/nowhere"},
        {"name": "1.1.1.up", "directory": "/tmp"},
    ],
)
def test_a_card_is_checked(card):
    url = ipckit._url.parse("fifo://x")
    line = fifo._line(fifo.HELLO, card, fifo.FifoOptions())
    with pytest.raises((errors.ProtocolError, errors.NothingListening)):
        next(fifo._admit(url, fifo.FifoOptions(), line.rstrip(b"\n")))


def test_only_a_fifo_of_ours_is_opened_and_removed(tmp_path):
    precious = tmp_path / "1.1.1.up"
    precious.write_text("precious")
    url = ipckit._url.parse("fifo://x")
    line = fifo._line(fifo.HELLO, {"name": "1.1.1", "directory": str(tmp_path)}, fifo.FifoOptions())
    with pytest.raises(errors.AccessDenied):
        next(fifo._admit(url, fifo.FifoOptions(), line.rstrip(b"\n")))
    assert precious.read_text() == "precious"


CHILD = """
import os, sys, threading, ipckit
count = int(sys.argv[3])
for name in ("mkfifo", "open", "write", "unlink"):
    def wrap(real):
        def stepped(*args, **kwargs):
            global count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), 9)
            return real(*args, **kwargs)
        return stepped
    setattr(os, name, wrap(getattr(os, name)))
if sys.argv[1] == "connect":
    channel = ipckit.connect(sys.argv[2], timeout=10)
    channel.recv()
else:
    with ipckit.listen(sys.argv[2]) as listener, listener.accept() as channel:
        channel.recv()
"""


@pytest.mark.parametrize("verb", ["listen", "connect"])
def test_killed_at_any_step_the_next_start_clears_it(run_dir, verb):
    """Each system call that makes, opens or removes a file is once the last."""
    for count in range(1, 60):
        victim = subprocess.Popen([sys.executable, "-c", CHILD, verb, "fifo://x", str(count)])
        try:
            if verb == "connect":
                with ipckit.listen("fifo://x") as listener:
                    outcome = attempt(victim, lambda: listener.accept(timeout=0.05))
            else:
                outcome = attempt(victim, lambda: ipckit.connect("fifo://x", timeout=0.05))
        finally:
            victim.kill()
            victim.wait()
        exchange("fifo://x")
        assert os.listdir(run_dir / "fifo") == []
        assert sorted(os.listdir(run_dir)) == ["fifo"]
        if outcome == "connected":
            assert count > 5
            return
    raise AssertionError("it never came through")


def attempt(victim, act):
    until = time.monotonic() + 20
    while victim.poll() is None and time.monotonic() < until:
        try:
            channel = act()
        except (errors.Timeout, errors.NothingListening):
            continue
        with channel:
            try:
                channel.recv(timeout=0.3)
            except errors.Timeout:
                return "connected"
            except errors.PeerDied:
                return "died"
    assert victim.wait() == -signal.SIGKILL
    return "died"


def test_what_the_living_made_is_not_swept(run_dir):
    os.makedirs(run_dir / "fifo", mode=0o700)
    os.chmod(run_dir, 0o700)
    mine = run_dir / "fifo" / f"{_owner.fresh_name()}.up"
    dead = run_dir / "fifo" / "1.99.1.up"
    other = run_dir / "fifo" / "README"
    for path in (mine, dead, other):
        path.write_text("")
    ipckit.listen("fifo://x").close()
    assert mine.exists()
    assert other.exists()
    assert not dead.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_another_users_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "here")
    os.chown(tmp_path / "here", 12345, 12345)
    reader = os.open(tmp_path / "here", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(errors.AccessDenied):
        ipckit.connect(f"fifo://{tmp_path}/here", timeout=1)
    os.close(reader)
