"""Taking a name: alive, stale, contested, foreign; and finding who listens."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from ipckit import _url, errors
from ipckit._spi import Peer
from ipckit._wait import Gate, Lane, run
from ipckit.transports import _unixsock

URL = _url.parse("unix://x")

_HOLD = """
import pathlib, sys, time
from ipckit import _url
from ipckit.transports import _unixsock
held = _unixsock.bind(_url.parse("unix://x"), pathlib.Path(sys.argv[1]))
print("ready", flush=True)
time.sleep(60)
"""


def connect(path, timeout=5.0):
    gate = Gate(URL, lambda: None)
    try:
        return run(_unixsock.connect_steps(URL, path), Lane(gate, "connect"), timeout)
    finally:
        gate.close()


def release(held):
    held[0].close()
    held[1].release()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.sock"


def test_bind_connect_release(path):
    old = os.umask(0)
    try:
        held = _unixsock.bind(URL, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((path.parent / "x.sock.lock").stat().st_mode) == 0o600
    with connect(path) as client:
        server, _ = held[0].accept()
        with server:
            assert _unixsock.peer_of(client).pid == _unixsock.peer_of(server).pid == os.getpid()
            assert not client.getblocking()
    release(held)
    held[1].release()
    assert not list(path.parent.iterdir())


def test_live_listener_is_in_use(path):
    held = _unixsock.bind(URL, path)
    with pytest.raises(errors.AddressInUse):
        _unixsock.bind(URL, path)
    connect(path).close()
    release(held)


def test_killed_listener_is_replaced(path):
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(errors.AddressInUse):
            _unixsock.bind(URL, path)
        child.kill()
    assert path.exists()
    held = _unixsock.bind(URL, path)
    connect(path).close()
    release(held)


def test_one_of_many_starters_wins(path):
    path_stale = socket.socket(socket.AF_UNIX)
    path_stale.bind(str(path))
    path_stale.close()
    start, won, lost = threading.Barrier(8), [], []

    def starter():
        start.wait()
        try:
            won.append(_unixsock.bind(URL, path))
        except errors.AddressInUse as error:
            lost.append(error)

    threads = [threading.Thread(target=starter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    connect(path).close()
    release(won[0])


def test_foreign_listener_is_found_and_left_alone(path):
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen(1)
        for _ in range(4):  # the later probes find the backlog full
            with pytest.raises(errors.AddressInUse):
                _unixsock.bind(URL, path)
        assert path.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as foreign:
        path.unlink()
        foreign.bind(str(path))
        with pytest.raises(errors.AddressInUse):
            _unixsock.bind(URL, path)


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_no_socket_is_never_removed(path, kind):
    if kind == "file":
        path.write_text("precious")
    elif kind == "link":
        path.symlink_to(path.parent / "elsewhere")
    else:
        path.mkdir()
    with pytest.raises(errors.AddressInUse, match="no socket"):
        _unixsock.bind(URL, path)
    assert os.path.lexists(path)


def test_lock_that_is_a_link_is_refused(path):
    victim = path.parent / "victim"
    victim.write_text("precious")
    (path.parent / "x.sock.lock").symlink_to(victim)
    with pytest.raises(errors.AccessDenied):
        _unixsock.bind(URL, path)
    assert victim.read_text() == "precious"


def test_release_leaves_the_file_of_another(path):
    held = _unixsock.bind(URL, path)
    path.unlink()
    path.write_text("another")
    release(held)
    assert path.read_text() == "another"


def test_a_forked_child_does_not_keep_the_name(path):
    """It inherits the lock's descriptor and the listening socket; both must go, or the name outlives its owner."""
    held = _unixsock.bind(URL, path)
    context = multiprocessing.get_context("fork")
    ready, stop = context.Event(), context.Event()
    child = context.Process(target=lambda: (ready.set(), stop.wait()))
    child.start()
    ready.wait()
    try:
        held[0].close()
        held[1].forget()  # as if this process had been killed
        held = _unixsock.bind(URL, path)
        release(held)
    finally:
        stop.set()
        child.join()


def test_connect_waits_for_the_listener(path):
    found = []
    waiter = threading.Thread(target=lambda: found.append(connect(path)))
    waiter.start()
    time.sleep(0.1)
    held = _unixsock.bind(URL, path)
    waiter.join()
    found[0].close()
    release(held)


def test_connect_gives_up_with_the_reason(path):
    with pytest.raises(errors.NothingListening) as caught:
        connect(path, 0.05)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(errors.NothingListening):
        connect(path, 0)
    path.touch()
    with pytest.raises(errors.NothingListening):
        connect(path, 0)


def test_long_paths(tmp_path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    held = _unixsock.bind(URL, deep / "x.sock")
    connect(deep / "x.sock").close()
    release(held)
    with pytest.raises(errors.BadUrl, match="too long"):
        _unixsock.bind(URL, deep / ("x" * 104))
    assert not list(deep.iterdir())


def test_missing_directory_is_explained(tmp_path):
    with pytest.raises(errors.BadUrl, match="directory"):
        _unixsock.bind(URL, tmp_path / "no" / "x.sock")


def test_only_ourselves_and_root():
    _unixsock.check_peer(URL, Peer(uid=os.geteuid()), "accept")
    _unixsock.check_peer(URL, Peer(uid=0), "accept")
    with pytest.raises(errors.AccessDenied, match="allow=any"):
        _unixsock.check_peer(URL, Peer(uid=54321), "accept")


def test_no_descriptor_stays_open(path):
    def count():
        return len(os.listdir("/proc/self/fd"))

    before = count()
    held = _unixsock.bind(URL, path)
    for _ in range(3):
        with pytest.raises(errors.AddressInUse):
            _unixsock.bind(URL, path)
    release(held)
    with pytest.raises(errors.NothingListening):
        connect(path, 0.02)
    assert count() == before


def test_sigterm_is_not_swallowed_by_the_lock(path):
    """A killed starter, whichever signal, frees the name."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGTERM)
    release(_unixsock.bind(URL, path))
