"""shm:// as itself: the handshake, and who may not take part in it. What every channel does is in the conformance suite."""

import array
import contextlib
import errno
import logging
import os
import shutil
import socket
import struct
import tempfile
import threading

import pytest

import ipckit
from ipckit import _native, errors
from ipckit.transports import shm

GREETING = struct.Struct("=8sIIQ")
HELLO = GREETING.pack(b"ipckring", 1, 1, 0)


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(path))
    return path


@pytest.fixture
def no_descriptor_left():
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@contextlib.contextmanager
def accepting(listener, count=1):
    """Accept beside the block; the channels are in the list afterwards."""
    accepted = []

    def accept():
        with contextlib.suppress(errors.IpcError):
            for _ in range(count):
                accepted.append(listener.accept(timeout=10))

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield accepted
    finally:
        thread.join(20)


@contextlib.contextmanager
def connected(url="shm://rings", listener_options=""):
    with ipckit.listen(url + listener_options) as listener:
        with accepting(listener) as accepted:
            client = ipckit.connect(url, timeout=10)
        with client, accepted[0] as server:
            yield client, server


def raw_socket(path):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def test_who_is_there_and_what_remains(runtime_dir, no_descriptor_left):
    with connected() as (client, server):
        assert client.peer.pid == server.peer.pid == os.getpid()
        assert client.peer.uid == os.geteuid()
        assert client.native == shm.Rings(1 << 20, 1)
        assert server.native == shm.Rings(1 << 20, 0)
        assert sorted(os.listdir(runtime_dir)) == ["rings.shm", "rings.shm.lock"]
        assert (runtime_dir / "rings.shm").stat().st_mode & 0o777 == 0o600
        client.send(b"there", timeout=1)
        assert server.recv(timeout=1) == b"there"
        server.send(b"and back", timeout=1)
        assert client.recv(timeout=1) == b"and back"
    assert os.listdir(runtime_dir) == []


def test_the_listener_decides_the_size():
    with connected(listener_options="?size=100kB") as (client, server):
        assert client.native.capacity == server.native.capacity == 1 << 17
    with ipckit.listen("shm://rings?size=64KiB") as listener:
        with accepting(listener) as accepted, pytest.raises(errors.BadOption, match="65536"):
            ipckit.connect("shm://rings?size=1MiB", timeout=10)
        for channel in accepted:
            channel.close()
        with accepting(listener) as accepted, ipckit.connect("shm://rings?size=4KiB", timeout=10) as client:
            client.send(b"enough")
        with accepted[0] as server:
            assert server.recv(timeout=1) == b"enough"
    for wrong in ("1kB", "2GiB", "x"):
        with pytest.raises(errors.BadOption):
            ipckit.listen(f"shm://rings?size={wrong}")


def test_a_loan_is_no_larger_than_the_ring():
    with connected(listener_options="?size=64KiB") as (client, _):
        with pytest.raises(errors.MessageTooLarge, match="size= at the listener"):
            client.loan(1 << 17)
        with client.loan(1000):
            pass


def test_a_pair(no_descriptor_left):
    left, right = ipckit.pair("shm://here?size=64KiB&spin=0")
    with left, right:
        left.send(b"x" * 30_000, timeout=1)
        assert len(right.recv(timeout=1)) == 30_000
        left.close()
        with pytest.raises(errors.PeerClosed):
            right.recv(timeout=1)


def test_connecting_to_one_who_accepts_nobody(no_descriptor_left):
    with ipckit.listen("shm://rings"), pytest.raises(errors.NothingListening, match="accepts nobody"):
        ipckit.connect("shm://rings", timeout=0.1)


def test_a_listener_that_goes_away_is_waited_for_again(no_descriptor_left):
    outcome = []

    def connect():
        outcome.append(ipckit.connect("shm://rings", timeout=10))

    first = ipckit.listen("shm://rings")
    thread = threading.Thread(target=connect)
    thread.start()
    thread.join(0.1)  # it waits for its rings now
    first.close()
    thread.join(0.05)
    with ipckit.listen("shm://rings") as second, second.accept(timeout=10) as server:
        thread.join(10)
        with outcome[0] as client:
            client.send(b"hello", timeout=1)
            assert server.recv(timeout=1) == b"hello"


# -- peers that do not keep to the protocol -------------------------------------------------------------------------


def test_silent_peers_cost_their_own_slot_only(runtime_dir, no_descriptor_left, caplog):
    with ipckit.listen("shm://rings") as listener:
        silent = [raw_socket(runtime_dir / "rings.shm") for _ in range(40)]
        with accepting(listener) as accepted, ipckit.connect("shm://rings", timeout=10) as client:
            client.send(b"not held up", timeout=1)
        with accepted[0] as server:
            assert server.recv(timeout=1) == b"not held up"
        assert silent[0].recv(100) == b"", "the oldest of too many was not dropped"
        assert len(listener._resource._silent) <= 32
        for sock in silent:
            sock.close()
    assert "sent no greeting" in caplog.text


def test_silence_is_not_waited_for_for_ever(runtime_dir, monkeypatch, caplog):
    monkeypatch.setattr(shm, "_PATIENCE", 0.05)
    with ipckit.listen("shm://rings") as listener, raw_socket(runtime_dir / "rings.shm") as silent:
        with pytest.raises(errors.Timeout):
            listener.accept(timeout=0.3)
        assert silent.recv(100) == b""
    assert "sent no greeting" in caplog.text


@pytest.mark.parametrize(
    "greeting",
    [
        b"x",
        b"x" * 200,
        GREETING.pack(b"ipckring", 2, 1, 0),
        GREETING.pack(b"ipckring", 1, 2, 0),
        GREETING.pack(b"wrong!!!", 1, 1, 0),
    ],
)
def test_a_wrong_greeting_is_refused(runtime_dir, no_descriptor_left, caplog, greeting):
    with ipckit.listen("shm://rings") as listener, raw_socket(runtime_dir / "rings.shm") as peer:
        peer.send(greeting)
        with pytest.raises(errors.Timeout):
            listener.accept(timeout=0.1)
        assert GREETING.unpack(peer.recv(100)) == (b"ipckring", 1, 3, errno.EPROTO)
        assert peer.recv(100) == b""
    assert "dropped a connection" in caplog.text


def test_descriptors_in_a_greeting_are_closed(runtime_dir, no_descriptor_left):
    with ipckit.listen("shm://rings") as listener, raw_socket(runtime_dir / "rings.shm") as peer:
        null = os.open(os.devnull, os.O_RDONLY)
        socket.send_fds(peer, [HELLO], [null] * 3)
        with listener.accept(timeout=1):
            data, fds, _, _ = socket.recv_fds(peer, 100, 5)
            assert GREETING.unpack(data) == (b"ipckring", 1, 2, 1 << 20)
            for fd in (*fds, null):
                os.close(fd)


def test_a_peer_that_leaves_during_the_handshake(runtime_dir, no_descriptor_left):
    with ipckit.listen("shm://rings") as listener:
        raw_socket(runtime_dir / "rings.shm").close()
        gone = raw_socket(runtime_dir / "rings.shm")
        gone.send(HELLO)
        gone.close()
        with contextlib.suppress(errors.Timeout), listener.accept(timeout=0.1) as channel:
            with pytest.raises(errors.PeerError):
                channel.recv(timeout=5)
            with pytest.raises(errors.PeerError):
                channel.send(b"")


def test_no_memory_for_rings_is_told_to_the_peer(monkeypatch, caplog):
    def full(capacity):
        raise OSError(errno.ENOSPC, "No space left on device")

    with ipckit.listen("shm://rings") as listener:
        monkeypatch.setattr(_native, "ring_create", full)
        outcome = []

        def connect():
            try:
                ipckit.connect("shm://rings", timeout=10).close()
            except errors.IpcError as error:
                outcome.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        with pytest.raises(errors.Timeout):
            listener.accept(timeout=0.5)
        thread.join(10)
    assert isinstance(outcome[0], errors.ResourceLimit)
    assert "No space left" in caplog.text


@contextlib.contextmanager
def impostor(runtime_dir, answer):
    """A listener that answers a greeting as `answer(socket)` does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(runtime_dir / "rings.shm"))
        sock.listen()
        sock.settimeout(10)

        def serve():
            with sock.accept()[0] as peer:
                peer.recv(100)
                answer(peer)
                peer.settimeout(10)
                peer.recv(100)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join(20)


def give(kinds, number=1 << 16, kind=2, version=1):
    def answer(peer):
        make = {
            "ring": lambda: _native.ring_create(1 << 16),
            "memory": lambda: os.memfd_create("unsealed"),
            "bell": lambda: os.eventfd(0),
            "file": lambda: os.open("/dev/null", os.O_RDWR),
        }
        fds = [make[kind]() for kind in kinds]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        peer.sendmsg([GREETING.pack(b"ipckring", version, kind, number)], rights)
        for fd in fds:
            os.close(fd)

    return answer


BELLS = ["bell"] * 4


@pytest.mark.parametrize(
    "answer",
    [
        give([]),
        give(["ring", *BELLS[1:]]),
        give(["ring", *BELLS, "bell"]),
        give(["ring", *BELLS * 20]),
        give(["memory", *BELLS]),
        give(["bell", *BELLS]),
        give(["ring", *BELLS[1:], "file"]),
        give(["ring", *BELLS], kind=1),
        give(["ring", *BELLS], version=7),
        give([], kind=3, number=errno.EPROTO),
        lambda peer: peer.send(b"short"),
        lambda peer: peer.send(b"long" * 100),
    ],
)
def test_a_listener_that_sends_something_else(runtime_dir, no_descriptor_left, answer):
    with impostor(runtime_dir, answer), pytest.raises(errors.ProtocolError):
        ipckit.connect("shm://rings", timeout=10)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread
def test_only_our_own_user_and_root_are_let_in(caplog):
    if os.geteuid() != 0:
        pytest.skip("acting as another user takes root")
    place = tempfile.mkdtemp(prefix="ipckit-test-")
    try:
        os.chmod(place, 0o755)
        with ipckit.listen(f"shm://{place}/rings") as listener:
            os.chmod(f"{place}/rings", 0o666)
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    os.setresuid(65534, 65534, 65534)
                    try:
                        ipckit.connect(f"shm://{place}/rings", timeout=10)
                    except errors.AccessDenied:
                        code = 0
                finally:
                    os._exit(code)
            with pytest.raises(errors.Timeout):
                listener.accept(timeout=0.5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(place)
    assert "uid 65534" in caplog.text


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread
def test_the_death_of_a_peer_has_its_pid(caplog):
    caplog.set_level(logging.DEBUG)
    with ipckit.listen("shm://rings") as listener:
        child = os.fork()
        if child == 0:
            try:
                channel = ipckit.connect("shm://rings", timeout=10)
                channel.send(b"last words")
                os.kill(os.getpid(), 9)
            finally:
                os._exit(1)
        with listener.accept(timeout=10) as channel:
            assert channel.peer.pid == child
            assert channel.recv(timeout=5) == b"last words"
            with pytest.raises(errors.PeerDied) as caught:
                channel.recv(timeout=5)
            assert caught.value.pid == child
            assert "SIGKILL" in str(caught.value)
            with pytest.raises(errors.PeerDied):
                channel.send(b"")
        os.waitpid(child, 0)
