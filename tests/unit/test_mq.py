"""What is particular to mq://: priorities, the kernel's limits, what is left behind."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import ipckit
from ipckit import errors
from ipckit._url import parse
from ipckit.transports import _mqueue, _owner, mq

posix_ipc = pytest.importorskip("posix_ipc")


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "names"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path / "ipckit"
    _owner.sweep(tmp_path / "ipckit" / "mq", lambda name: mq._remove(tmp_path / "ipckit" / "mq" / name))


def pair(url="mq://prio"):
    with ipckit.listen(url) as listener:
        found = []
        thread = threading.Thread(target=lambda: found.append(ipckit.connect(url, timeout=20)))
        thread.start()
        server = listener.accept(timeout=20)
        thread.join()
        return found[0], server


def exists(name):
    try:
        posix_ipc.MessageQueue(_mqueue.path_of(name)).close()
    except posix_ipc.ExistentialError:
        return False
    return True


def test_the_urgent_first_and_the_same_priority_in_order():
    a, b = pair()
    with a, b:
        for n, priority in enumerate((0, 5, 31, 5, 0)):
            a.send(b"%d" % n, priority=priority)
        assert [b.recv(timeout=5) for _ in range(5)] == [b"2", b"1", b"3", b"0", b"4"]
        with pytest.raises(errors.BadOption):
            a.send(b"", priority=32)
        a.send(b"", priority=31)
        a.close()
        assert list(b) == [b""]  # the goodbye is behind every message


def test_fragments_of_two_priorities():
    a, b = pair("mq://prio?depth=10&frame=2048")
    low, high = os.urandom(8000), os.urandom(5000)
    with a, b:
        a.send(low, priority=1)
        a.send(high, priority=2)
        assert b.recv(timeout=5) == high
        assert b.recv(timeout=5) == low


def test_nothing_is_left_while_a_channel_lives(run_dir):
    a, b = pair()
    with a, b:
        assert os.listdir(run_dir / "mq") == []
        assert os.listdir(run_dir.parent / "names") == []
        assert b.peer.pid == os.getpid()
        assert b.peer.uid == os.geteuid()


CHILD = """
import os, sys, ipckit, posix_ipc
owner, name = {"queue": (posix_ipc, "MessageQueue"), "fifo": (os, "mkfifo"), "card": (os, "rename")}[sys.argv[1]]
real = getattr(owner, name)
def last(*args, **kwargs):
    if sys.argv[2] == "after":
        real(*args, **kwargs)
    print(*os.listdir(os.environ["XDG_RUNTIME_DIR"] + "/ipckit/mq"), flush=True)
    os.kill(os.getpid(), 9)
setattr(owner, name, last)
ipckit.listen("mq://prio", timeout=5)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["fifo", "queue", "card"])
def test_killed_at_any_step_the_next_start_clears_it(run_dir, step, when):
    done = subprocess.run([sys.executable, "-c", CHILD, step, when], capture_output=True, timeout=20, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    records = done.stdout.decode().split()
    assert len(records) == (0 if (step, when) == ("fifo", "before") else 1)
    assert [exists(name) for name in records] == [step == "card" or (step, when) == ("queue", "after")] * len(records)
    a, b = pair()
    with a, b:
        assert not any(exists(name) for name in records)
        assert os.listdir(run_dir / "mq") == []


def test_a_killed_client_leaves_nothing_behind_the_next_start(run_dir):
    code = """
import os
from ipckit.opening import _Opening
steps = _Opening("mq://prio", None, None, (), "connect").connect()
next(steps)  # it has said who it is, and would sleep
os.kill(os.getpid(), 9)
"""
    with ipckit.listen("mq://prio") as listener:
        subprocess.run([sys.executable, "-c", code], timeout=20, check=False)
        left = [name for name in os.listdir(run_dir / "mq") if _owner.owner_of(name).pid != os.getpid()]
        assert len(left) == 1
        assert exists(left[0])
        with pytest.raises(errors.Timeout):
            listener.accept(timeout=0.1)
        ipckit.listen("mq://elsewhere").close()
        assert not exists(left[0])
        assert left[0] not in os.listdir(run_dir / "mq")


def test_what_the_living_made_is_not_swept(run_dir):
    with ipckit.listen("mq://one"), ipckit.listen("mq://two"):
        names = os.listdir(run_dir / "mq")
        assert len(names) == 2
        assert all(exists(name) for name in names)


ALONE = """
import os, resource, tempfile, threading
import urllib.parse  # ipckit imports it when first asked: perhaps not this user's to read by then
import posix_ipc
import ipckit
from ipckit import errors
from ipckit.transports import _mqueue, mq
if os.geteuid() == 0:
    os.setuid(50000 + os.getpid() % 10000)  # the budget is a user's, and this one has nobody else's queues
directory = tempfile.TemporaryDirectory()
os.environ["IPCKIT_RUNTIME_DIR"] = os.environ["XDG_RUNTIME_DIR"] = directory.name
"""


def alone(code):
    done = subprocess.run([sys.executable, "-c", ALONE + code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_users_budget_shrinks_the_queues_and_then_says_so():
    out = alone("""
resource.setrlimit(resource.RLIMIT_MSGQUEUE, (140_000, 140_000))
listener = ipckit.listen("mq://prio")
channels, frames = [], set()
def accept():
    try:
        while True:
            channels.append(listener.accept())
    except errors.Closed:
        pass
thread = threading.Thread(target=accept)
thread.start()
try:
    while len(channels) < 100:
        channels.append(ipckit.connect("mq://prio", timeout=1))
        frames.add(channels[-1].native.inbox.max_message_size)
except errors.ResourceLimit as error:
    print(len(channels), len(frames), error)
except errors.NothingListening as error:
    print(len(channels), len(frames), "the listener had no room")
for channel in channels:
    channel.close()
listener.close()
thread.join()
""")
    opened, sizes = map(int, out.split()[:2])
    assert opened >= 4
    assert sizes >= 1


def test_no_budget_at_all_is_explained():
    out = alone("""
resource.setrlimit(resource.RLIMIT_MSGQUEUE, (1000, 1000))
try:
    ipckit.listen("mq://prio")
except errors.ResourceLimit as error:
    print(error)
""")
    assert "RLIMIT_MSGQUEUE, 1000 bytes" in out
    assert "ulimit -q" in out


def test_more_than_the_system_allows_is_explained():
    out = alone("""
for url in ("mq://prio?frame=10MiB", "mq://prio?depth=60000"):
    try:
        ipckit.listen(url)
    except errors.ResourceLimit as error:
        print(error)
""")
    assert "sysctl fs.mqueue.msgsize_max=10485760" in out
    assert "sysctl fs.mqueue.msg_max=60000" in out


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_another_user_cannot_open_a_queue(run_dir):
    with ipckit.listen("mq://prio"):
        (name,) = os.listdir(run_dir / "mq")
        out = alone(f"""
os.geteuid = lambda: 0
try:
    with _mqueue.mapped("mq://prio", "connect"):
        _mqueue.open_queue("mq://prio", _mqueue.path_of({name!r}))
except errors.AccessDenied as error:
    print(error)
""")
    assert "belongs to somebody else" in out


def test_a_queue_of_somebody_else_is_refused(monkeypatch):
    real = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: 77)
    queue = posix_ipc.MessageQueue(_mqueue.path_of("1.1.1"), posix_ipc.O_CREX, mode=0o600)
    try:
        with pytest.raises(errors.AccessDenied, match="somebody else"):
            _mqueue.open_queue(None, _mqueue.path_of("1.1.1"))
    finally:
        queue.close()
        queue.unlink()
    assert real != 77


@pytest.mark.parametrize(
    "card", [{}, {"queue": 1}, {"queue": "../x"}, {"queue": "1.1.1", "records": "/"}, {"queue": "1.1.1/x"}]
)
def test_a_card_is_checked(card):
    post = mq._Post(parse("mq://prio"), mq.MqOptions())
    with pytest.raises((errors.ProtocolError, errors.NothingListening)):
        next(post.open_outbox(card))


def test_options():
    with pytest.raises(errors.BadOption):
        ipckit.listen("mq://prio?frame=100")
    with pytest.raises(errors.BadUrl):
        ipckit.listen("mq://a/b")


def test_the_start_of_a_process_tells_it_from_another_with_its_pid():
    owner = _owner.me()
    assert owner.alive()
    assert not _owner.Owner(owner.pid, owner.start + 1).alive()
    assert _owner.owner_of("x.1.2") is None
