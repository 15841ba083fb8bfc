"""`ipckit gc` and `ipckit locks`: what the dead left goes; what lives, and what is a stranger's, is never touched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import ipckit
from ipckit import errors
from ipckit.cli import main
from ipckit.sync import (
    Barrier,
    BoundedSemaphore,
    Condition,
    Event,
    Latest,
    Lock,
    RLock,
    RWLock,
    Segment,
    Semaphore,
    _inventory,
    _tenancy,
)
from ipckit.transports import _litter

from .test_sync import Child, runtime_dir, until  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread

OBJECTS = {
    "lock": lambda: Lock("shm://lock"),
    "rlock": lambda: RLock("shm://rlock"),
    "semaphore": lambda: Semaphore(2, "shm://semaphore"),
    "bounded": lambda: BoundedSemaphore(2, "shm://bounded"),
    "leased": lambda: Semaphore(2, "shm://leased", leased=True),
    "rwlock": lambda: RWLock("shm://rwlock"),
    "condition": lambda: Condition(url="shm://condition"),
    "event": lambda: Event("shm://event"),
    "barrier": lambda: Barrier(2, url="shm://barrier"),
    "segment": lambda: Segment("shm://segment", 5000),
    "latest": lambda: Latest("shm://latest", 64),
}
LISTENERS = ["unix", "shm", "fifo", "mq"]
_kept = []


@pytest.fixture(autouse=True)
def default_dir(runtime_dir, tmp_path, monkeypatch):  # noqa: F811
    """Where the records of kernel queues are: the user's, but for this test."""
    path = tmp_path / "session"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    return path / "ipckit"


@pytest.fixture
def there(runtime_dir, default_dir):  # noqa: F811
    def files():
        roots = (runtime_dir, default_dir)
        return sorted(str(path) for root in roots for path in root.rglob("*") if not path.is_dir())

    return files


def keep(make):
    return lambda: _kept.append(make())


def everything():
    """One of each, open."""
    made = [make() for make in OBJECTS.values()]
    made += [ipckit.listen(f"{scheme}://desk") for scheme in LISTENERS]
    return made


def gc(capsys, *arguments):
    capsys.readouterr()
    assert main(["gc", "--json", *arguments]) == 0
    return sorted(each["path"] for each in json.loads(capsys.readouterr().out))


# -- the dead -----------------------------------------------------------------------------------------------------------


def test_what_a_dead_process_left_goes(there, capsys):
    pytest.importorskip("posix_ipc")
    child = Child(keep(everything))
    left = there()
    assert len(left) >= len(OBJECTS) + 2 * len(LISTENERS)
    assert gc(capsys) == []
    assert there() == left
    child.kill()
    found = gc(capsys, "--dry-run")
    assert there() == left
    assert gc(capsys) == found
    assert there() == []
    assert gc(capsys) == []


def test_a_dead_handshake_goes(runtime_dir, there, capsys):  # noqa: F811
    """Both ends of a FIFO's or a queue's handshake have names for a while."""
    for scheme in ("fifo", "mq"):
        if scheme == "mq":
            pytest.importorskip("posix_ipc")
        with ipckit.listen(f"{scheme}://desk"):
            # A client that is never accepted.
            child = Child(lambda scheme=scheme: _knock(f"{scheme}://desk"))
            until(lambda: len(there()) > 3 or None)
            child.kill()
            gone = gc(capsys)
            assert gone
            assert not [path for path in there() if path in gone]
        assert there() == []


def _knock(url):
    def connect():
        with contextlib.suppress(errors.IpcError):
            ipckit.connect(url, timeout=30)

    threading.Thread(target=connect, daemon=True).start()


def test_half_made_things_go(runtime_dir, capsys):  # noqa: F811
    dead = subprocess.run(
        [sys.executable, "-c", "from ipckit.transports._owner import fresh_name as f; print(f())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    lost = runtime_dir / "lost.segment"
    Child(keep(lambda: Segment("shm://lost", 10))).kill()
    (runtime_dir / "lost.segment.lock").unlink()
    half = runtime_dir / f"{dead}.tmp"
    half.touch(0o600)
    lock = runtime_dir / "never.segment.lock"
    lock.touch(0o600)
    assert gc(capsys) == sorted(map(str, (half, lock, lost)))
    assert list(runtime_dir.iterdir()) == []


def test_a_generation_that_never_took_its_place_goes(runtime_dir, capsys):  # noqa: F811
    """Its maker was killed; others are attached, and keep what they have."""
    with Segment("shm://segment", 10) as segment:
        aside = runtime_dir / "segment.segment.lock.next"
        aside.touch(0o600)
        fd = os.open(runtime_dir / "segment.segment.lock", os.O_RDWR)
        assert _tenancy.try_record(fd, 0)
        assert gc(capsys) == []  # its maker is at it
        os.close(fd)
        assert gc(capsys, "--dry-run") == [str(aside)]
        assert aside.exists()
        assert gc(capsys) == [str(aside)]
        assert not aside.exists()
        aside.touch(0o600)
        Segment("shm://segment").close()  # whoever comes by does the same
        assert not aside.exists()
        segment.resize(20)
        assert gc(capsys) == []


@pytest.mark.parametrize("scheme", ["fifo", "mq"])
def test_an_empty_queue_goes_one_with_messages_stays(scheme, runtime_dir, there, capsys):  # noqa: F811
    if scheme == "mq":
        pytest.importorskip("posix_ipc")
    url = f"{scheme}://jobs"
    if "queue" not in ipckit.capabilities(url).patterns:
        pytest.skip(f"{scheme} has no queues")
    child = Child(keep(lambda: ipckit.sender(url)))
    assert gc(capsys) == []
    child.kill()
    assert [path.rpartition("/")[2] for path in gc(capsys)] == [f"jobs.{scheme}.d"]
    assert list(runtime_dir.iterdir()) == []
    child = Child(lambda: _send(url))
    with ipckit.receiver(url, ack="manual") as receiver:
        child.kill()
        assert receiver.recv(timeout=20).value == b"one"
        assert gc(capsys) == []
    assert gc(capsys) == []  # it was not acknowledged, so it waits for somebody else
    with ipckit.receiver(url) as receiver:
        assert receiver.recv(timeout=20).value == b"one"


def _send(url):
    _kept.append(ipckit.sender(url))
    _kept[-1].send(b"one")


def test_an_abandoned_lock_is_kept(there, capsys):
    def act():
        with contextlib.ExitStack() as stack:
            stack.enter_context(Lock("shm://lock"))
            stack.enter_context(RWLock("shm://rwlock").write)
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        act()
    os.waitpid(pid, 0)
    assert RWLock("shm://rwlock").abandoned  # though nobody has met the dead one yet
    assert gc(capsys) == []
    assert main(["gc"]) == 0
    assert capsys.readouterr().out.count("kept ") == 2
    with Lock("shm://lock").recover():
        pass
    assert [path.rpartition("/")[2] for path in gc(capsys)] == ["lock.sync"]
    assert main(["gc", "--abandoned"]) == 0
    assert "removed" in capsys.readouterr().out
    assert there() == []
    assert main(["gc"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


def test_notes_of_dead_waiters_go(runtime_dir, there, capsys):  # noqa: F811
    held = Lock("shm://lock", debug=True)

    def wait():
        threading.Thread(target=Lock("shm://lock", debug=True).acquire, daemon=True).start()
        until(lambda: any(runtime_dir.glob("waits/*")))

    with held:
        child = Child(wait)
        assert gc(capsys) == []
        child.kill()
        left = [str(path) for path in runtime_dir.glob("waits/*")]
        assert gc(capsys) == sorted(left)
    assert there() == [str(runtime_dir / "lock.sync")]


# -- the living -----------------------------------------------------------------------------------------------------------


def test_nothing_alive_is_removed(there, capsys):
    pytest.importorskip("posix_ipc")
    here = everything()
    before = there()
    assert gc(capsys) == gc(capsys, "--abandoned") == []
    assert there() == before
    # Not even by one who thought a moment ago that it was dead.
    for path in before:
        name = _inventory.Path(path)
        assert not _litter.bury_name(name.with_suffix("") if name.suffix == ".lock" else name)
        assert not _litter.bury_owned(name)
        assert not _litter._bury_queue(name)
        assert not _inventory._bury_object(name, True)
        assert not _tenancy.bury_at_once(name)
    assert there() == before
    for scheme, listener in zip(LISTENERS, here[-len(LISTENERS) :], strict=True):
        answered = []
        thread = threading.Thread(target=lambda at=listener, to=answered: to.append(at.accept(timeout=20)))
        thread.start()
        with ipckit.connect(f"{scheme}://desk", timeout=20) as channel:
            thread.join()
            assert gc(capsys) == []
            channel.send(b"alive")
            assert answered[0].recv(timeout=20) == b"alive"
            answered[0].close()
    for thing in here:
        getattr(thing, "close", lambda: None)()


def test_a_daemon_that_closed_its_descriptors_is_alive(there, capsys):
    def become_a_daemon():
        lock = Lock("shm://lock")
        os.closerange(lock._fd, lock._fd + 1)
        kept.append(lock)

    kept = []
    child = Child(become_a_daemon)
    assert gc(capsys) == []
    child.kill()
    assert gc(capsys) != []
    assert there() == []


def test_one_in_the_middle_of_coming_is_alive(runtime_dir, capsys):  # noqa: F811
    lock = runtime_dir / "coming.segment.lock"
    lock.touch(0o600)
    fd = os.open(lock, os.O_RDWR)
    assert _tenancy.try_record(fd, 0)
    assert gc(capsys) == []
    os.close(fd)
    assert gc(capsys) == [str(lock)]


# -- strangers --------------------------------------------------------------------------------------------------------------


def test_a_strangers_things_are_never_touched(runtime_dir, default_dir, there, capsys):  # noqa: F811
    main(["gc"])
    (runtime_dir / "fifo").mkdir(mode=0o700, exist_ok=True)
    (default_dir / "mq").mkdir(mode=0o700, exist_ok=True)
    (runtime_dir / "waits").mkdir(mode=0o700)
    dead = "999999999.1.1"
    for name in (
        "notes.txt",
        "data.segment",
        "data.latest",
        "data.sync",
        "work.lock",
        "calc.sock",
        f"{dead}.keep",
        "fifo/notes",
        f"fifo/{dead}.other",
        "queue.mq.d.lock",
        "waits/notes",
        f"waits/{os.getpid()}",
    ):
        (runtime_dir / name).write_text("mine")
    (runtime_dir / "data.segment.lock").write_text("mine")
    (runtime_dir / "alone.segment.lock").write_text("mine")
    (runtime_dir / "alone.segment.lock.next").write_text("mine")
    (runtime_dir / "alone.segment.lock").chmod(0o600)
    (runtime_dir / "plain.sock").write_text("a file, and a lock that nobody holds")
    (runtime_dir / "plain.sock.lock").touch(0o600)
    (default_dir / "mq" / "notes").write_text("mine")
    (default_dir / "mq" / dead).write_text("a file where a FIFO would be")
    (runtime_dir / "link.sync").symlink_to("/etc/passwd")
    (runtime_dir / "link.segment").symlink_to("/etc/passwd")
    (runtime_dir / "jobs.fifo.d").mkdir(mode=0o700)
    (runtime_dir / "jobs.fifo.d" / f"{dead}.hand").write_text("a message")
    server = socket.socket(socket.AF_UNIX)  # another program's, beside a lock that nobody holds
    server.bind(str(runtime_dir / "other.sock"))
    server.listen()
    (runtime_dir / "other.sock.lock").touch(0o600)
    os.mkfifo(runtime_dir / "read.fifo", 0o600)
    reader = os.open(runtime_dir / "read.fifo", os.O_RDONLY | os.O_NONBLOCK)
    (runtime_dir / "read.fifo.lock").touch(0o600)
    if os.geteuid() == 0:
        other = runtime_dir / f"{dead}.tmp"
        other.touch(0o600)
        os.chown(other, 12345, 12345)
    before = there()
    assert gc(capsys, "--abandoned", "--dry-run") == gc(capsys, "--abandoned") == []
    assert there() == before
    assert main(["locks", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    with Segment("shm://mine", 10):  # which removes what the dead left, before it takes memory
        pass
    assert there() == before
    server.close()
    os.close(reader)
    assert gc(capsys) == sorted(str(runtime_dir / name) for name in ("other.sock", "read.fifo"))


# -- locks ------------------------------------------------------------------------------------------------------------------


def listed(capsys):
    capsys.readouterr()
    assert main(["locks", "--json"]) == 0
    return {each["url"].removeprefix("shm://"): each for each in json.loads(capsys.readouterr().out)}


def test_locks_lists_all_kinds(capsys):
    made = {name: make() for name, make in OBJECTS.items()}
    found = listed(capsys)
    assert sorted(found) == sorted(OBJECTS)
    for name, each in found.items():
        assert each["attached"] == [os.getpid()], name
        assert each["used"]
        assert each["holders"] == []
        assert not each["waiters"]
        assert each["age"] < 600
        assert each["bytes"] >= 4096
    assert found["semaphore"]["state"] == "2 free"
    assert found["barrier"]["state"] == "0 of 2 are there"
    assert found["segment"]["state"] == "generation 1"
    assert found["event"]["state"] == "clear"
    with made["lock"], made["rwlock"].read, made["leased"], made["condition"]:
        made["latest"].write(b"x")
        made["event"].set()
        made["segment"].resize(10)
        found = listed(capsys)
        for name, role in (("lock", "holds"), ("rwlock", "reads"), ("leased", "unit"), ("condition", "holds")):
            assert [(each["pid"], each["role"]) for each in found[name]["holders"]] == [(os.getpid(), role)]
            assert found[name]["holders"][0]["since"] > 1e9
        assert [each["role"] for each in found["latest"]["holders"]] == ["writes"]
        states = {
            name: found[name]["state"]
            for name in ("lock", "rwlock", "leased", "condition", "event", "latest", "segment")
        }
        assert states == {
            "lock": "held",
            "rwlock": "read",
            "leased": "1 free",
            "condition": "held",
            "event": "set",
            "latest": "value 1",
            "segment": "generation 2",
        }


def test_the_age_is_that_of_the_object_and_not_of_its_last_use(runtime_dir, capsys):  # noqa: F811
    lock = Lock("shm://lock")
    assert listed(capsys)["lock"]["age"] < 600
    with open(runtime_dir / "lock.sync", "r+b") as file:
        file.seek(48)  # `made` in sync_layout.h
        file.write(struct.pack("=Q", time.time_ns() - 5000 * 10**9))
    with lock:
        assert 4000 < listed(capsys)["lock"]["age"] < 6000


def test_locks_counts_who_waits(capsys):
    lock, semaphore = Lock("shm://lock"), Semaphore(1, "shm://semaphore")
    threads = [
        threading.Thread(target=lambda at=at: at.acquire(timeout=20) and at.release()) for at in (lock, lock, semaphore)
    ]
    with lock, semaphore:
        for thread in threads:
            thread.start()
        # The system may forbid to look at others' system calls; then the waiters of a Lock are not known.
        until(lambda: listed(capsys)["semaphore"]["waiters"] == 1 and listed(capsys)["lock"]["waiters"] in (2, None))
        assert main(["locks"]) == 0
        text = capsys.readouterr().out
        assert "shm://lock" in text
        assert f"{os.getpid()} holds for" in text
    for thread in threads:
        thread.join(20)
    assert listed(capsys)["lock"]["waiters"] == 0


def test_locks_of_the_dead(capsys):
    def act():
        Lock("shm://lock").acquire()
        _kept.append(Segment("shm://segment", 10))

    Child(act).kill()
    found = listed(capsys)
    assert found["lock"]["state"] == "abandoned"
    assert found["lock"]["abandoned"]
    assert not found["lock"]["used"]
    assert not found["segment"]["used"]
    assert main(["locks"]) == 0
    assert "nobody: gc" in capsys.readouterr().out


def test_nothing_to_list(capsys, runtime_dir):  # noqa: F811
    assert main(["locks"]) == 0
    assert capsys.readouterr().out == f"nothing in {runtime_dir}\n"
