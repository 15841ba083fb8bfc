"""What is particular to queues that the kernel keeps: files of the dead, priorities, large messages, what is left behind."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
from ipckit import errors
from ipckit.message import Parcel
from ipckit.transports import _kernelwire as wire

ids = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=40) | st.binary(
    min_size=16, max_size=16
).map(bytes.hex)
headers = st.dictionaries(
    st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,9}", fullmatch=True), st.from_regex(r"\w{0,9}", fullmatch=True)
)


@pytest.fixture(params=["mq", "fifo"])
def scheme(request):
    if request.param == "mq":
        pytest.importorskip("posix_ipc")
    return request.param


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(directory))
    return directory


@pytest.fixture
def place(home, scheme):
    return home / f"q.{scheme}.d"


@given(ids, headers, st.integers(0, 31), st.binary(max_size=200))
def test_records_round_trip(id, headers, priority, body):
    parcel = Parcel(body, id, headers, priority)
    assert wire.read(wire.message(parcel)) == parcel


@given(st.binary(max_size=60), st.integers(0, 80), st.integers(0, 255))
def test_bad_records_are_refused_or_read(body, at, value):
    """Any bytes whatever: a parcel, a name, or a ProtocolError."""
    record = bytearray(wire.message(Parcel(body, "i", {"a": "b"})))
    if at < len(record):
        record[at] = value
    for data in (bytes(record), bytes(record[:at]), body):
        try:
            found = wire.read(data)
        except errors.ProtocolError:
            continue
        assert isinstance(found, Parcel | str)


def test_priorities_and_their_bounds():
    pytest.importorskip("posix_ipc")
    with ipckit.sender("mq://q") as sender, ipckit.receiver("mq://q") as receiver:
        for priority in (0, 31, 7, 31):
            sender.send(b"%d" % priority, priority=priority)
        got = [receiver.recv(1) for _ in range(4)]
        assert [(message.value, message.priority) for message in got] == [
            (b"31", 31), (b"31", 31), (b"7", 7), (b"0", 0)
        ]  # fmt: skip
        with pytest.raises(errors.BadOption):
            sender.send(b"x", priority=32)


def test_large_messages_of_many_keep_their_place_and_leave_no_file(scheme, place):
    with ipckit.receiver(f"{scheme}://q", ack="manual") as receiver:
        senders = [ipckit.sender(f"{scheme}://q") for _ in range(3)]
        sent = [bytes([number]) * (10 if number % 2 else 50_000) for number in range(8)]
        for number, body in enumerate(sent):
            senders[number % 3].send(body)
        got = [receiver.recv(1) for _ in sent]
        assert [message.value for message in got] == sent
        assert len(list(place.glob("*.hand"))) == 1 + 4
        for message in got:
            message.ack()
        assert len(list(place.glob("*.hand"))) == 1
        for sender in senders:
            sender.close()
    assert not place.exists()


def test_above_the_limit(scheme):
    with ipckit.sender(f"{scheme}://q?limit=10kB") as sender, ipckit.receiver(f"{scheme}://q") as receiver:
        with pytest.raises(errors.MessageTooLarge):
            sender.send(bytes(10_001))
        sender.send(bytes(10_000))
        assert len(receiver.recv(1).value) == 10_000


def test_a_receiver_with_a_lower_limit_leaves_it_to_another(scheme):
    url = f"{scheme}://q"
    with ipckit.sender(url) as sender:
        sender.send(bytes(3 << 20))
        sender.send(b"small")
        with ipckit.receiver(f"{url}?limit=1kB") as modest:
            with pytest.raises(errors.MessageTooLarge):
                modest.recv(1)
            assert modest.recv(1).value == b"small"
        with ipckit.receiver(url) as other:
            assert len(other.recv(5).value) == 3 << 20


def test_messages_outlive_both_ends(scheme):
    """Closed in order, a FIFO's too; the large ones included."""
    with ipckit.sender(f"{scheme}://q") as sender:
        sender.send(b"one", headers={"a": "b"}, id="first")
        sender.send(bytes(20_000), id="second")
    with ipckit.receiver(f"{scheme}://q") as receiver:
        got = sorted((receiver.recv(5) for _ in range(2)), key=lambda message: message.id)
        assert [(message.id, len(message.value)) for message in got] == [("first", 3), ("second", 20_000)]
        assert [message.redelivered for message in got] == [0, 0]
        assert got[0].headers == {"a": "b"}


def test_a_nack_for_later_is_anybodys(scheme):
    url = f"{scheme}://q"
    with ipckit.sender(url) as sender, ipckit.receiver(url) as other:
        sender.send(b"x", id="x")
        with ipckit.receiver(url, ack="manual") as receiver:
            message = receiver.recv(1)
            began = time.time_ns()
            message.nack(0.2)
            message.nack()  # settled already
            message.ack()
        again = other.recv(10)
        assert time.time_ns() - began >= 200_000_000
        assert (again.id, again.redelivered) == ("x", 1)


DYING = """
import os, sys, ipckit
from ipckit.transports import _hands
url, step = sys.argv[1:]
def die(*_):
    os.kill(os.getpid(), 9)
with ipckit.sender(url) as sender:
    if step == "written":
        sender._outlet._kernel.put = die
    elif step == "named":
        _hands.Place.mark_sent = die
    elif step == "draft":
        os.rename = die
    sender.send(bytes(20_000), id="large")
"""


@pytest.mark.parametrize(("step", "arrives"), [("draft", 0), ("written", 1), ("named", 1)])
def test_a_sender_killed_at_any_step_of_a_large_message(scheme, place, step, arrives):
    """Its fate is nobody's promise; but it is whole, comes once, and leaves nothing."""
    url = f"{scheme}://q"
    with ipckit.sender(url):
        done = subprocess.run([sys.executable, "-c", DYING, url, step], timeout=30, check=False)
        assert done.returncode == -signal.SIGKILL
        with ipckit.receiver(url) as receiver:
            assert [receiver.recv(5).id for _ in range(arrives)] == ["large"] * arrives
            with pytest.raises(errors.Timeout):
                receiver.recv(0.1)
    assert not place.exists()


def test_foreign_bytes_cost_nobody_else(scheme, place):
    with ipckit.sender(f"{scheme}://q") as sender, ipckit.receiver(f"{scheme}://q") as receiver:
        for junk in (b"hello", wire.elsewhere("../../etc/passwd", 0), wire.elsewhere("1.2.3.gone", 0)):
            assert sender._outlet._kernel.put(junk, 0)
        (place / "1.2.3.hand").write_bytes(b"junk" * 5000)
        sender.send(b"good")
        assert receiver.recv(1).value == b"good"


def test_an_open_place_is_refused(scheme, place, home):
    home.mkdir(mode=0o700)
    place.mkdir(mode=0o755)
    with pytest.raises(errors.AccessDenied):
        ipckit.sender(f"{scheme}://q")


def test_another_shape_is_an_error_and_no_change():
    pytest.importorskip("posix_ipc")
    with ipckit.sender("mq://q?depth=5&frame=4096"), pytest.raises(errors.BadOption, match="depth=5"):
        ipckit.receiver("mq://q?depth=6")


def test_empty_queues_of_the_dead_make_room(home, monkeypatch):
    """The user's budget is used up: what nobody has open and nothing is in goes first; what holds messages stays."""
    pytest.importorskip("posix_ipc")
    from ipckit.transports import _mq_queue

    code = "import os, sys, ipckit; s = ipckit.sender(sys.argv[1]); len(sys.argv) > 2 and s.send(b'x'); os.kill(os.getpid(), 9)"
    for arguments in (["mq://empty"], ["mq://full", "send"]):
        subprocess.run([sys.executable, "-c", code, *arguments], timeout=30, check=False)
    real = _mq_queue.make

    def make(url, *rest):
        if (home / "empty.mq.d").exists():
            raise errors.ResourceLimit("no room", url=url)
        return real(url, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(_mq_queue, "make", make)
        ipckit.sender("mq://new").close()
    with ipckit.receiver("mq://full") as receiver:
        assert receiver.recv(1).value == b"x"


def test_a_full_disk_loses_nothing(scheme, monkeypatch):
    with ipckit.sender(f"{scheme}://q") as sender, ipckit.receiver(f"{scheme}://q") as receiver:
        sender.send(b"here")

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(errors.ResourceLimit):
                receiver.recv(1)
            patch.setattr(os, "write", full)
            with pytest.raises(errors.ResourceLimit):
                sender.send(bytes(20_000))
        assert receiver.recv(1).value == b"here"


def test_modes(scheme, place):
    with ipckit.receiver(f"{scheme}://q"):
        assert {entry.name.rpartition(".")[2]: oct(entry.stat().st_mode)[-3:] for entry in os.scandir(place)} == (
            {"lock": "600", "hand": "600"} | ({"queue": "600"} if scheme == "fifo" else {})
        )


# -- an end of a pair in place of a URL -------------------------------------------------------------------------------


def test_taken_over_channels_are_closed():
    left, right = ipckit.pair("pipe://")
    with ipckit.sender(left) as sender, ipckit.receiver(right) as receiver:
        for use in (lambda: left.send(b"x"), lambda: right.recv(0), lambda: ipckit.publisher(left), right.fileno):
            with pytest.raises(errors.Closed):
                use()
        left.close()
        right.close()
        sender.send(b"still there")
        assert receiver.recv(5).value == b"still there"
        sender.close()
        with pytest.raises(errors.PeerClosed):
            receiver.recv(5)


def test_the_codec_is_inherited():
    left, right = ipckit.pair("unix://any", codec="json")
    with ipckit.sender(left) as sender, ipckit.receiver(right) as receiver:
        sender.send({"a": 1})
        assert receiver.recv(5).value == {"a": 1}


def test_nack_over_a_pair():
    left, right = ipckit.pair("pipe://")
    with ipckit.sender(left) as sender, ipckit.receiver(right, ack="manual") as receiver:
        sender.send(b"again")
        receiver.recv(5).nack()
        message = receiver.recv(5)
        assert message.redelivered == 1
        message.ack()
        sender.drain(5)


def test_a_sender_hears_that_its_only_receiver_is_gone():
    left, right = ipckit.pair("pipe://")
    with ipckit.sender(left) as sender:
        with ipckit.receiver(right) as receiver:
            sender.send(b"1")
            assert receiver.recv(5).value == b"1"
        with pytest.raises(errors.PeerClosed):
            sender.send_many([b"2"] * 2000, 5)


def test_a_message_that_waits_is_not_thrown_away():
    left, right = ipckit.pair("pipe://")
    with left, right:
        left.send(b"too large")
        with pytest.raises(errors.MessageTooLarge):
            right.recv_into(bytearray(2))
        if right._frames.holds:
            with pytest.raises(errors.ConfigError):
                ipckit.receiver(right)


def test_in_a_forked_child():
    left, right = ipckit.pair("pipe://")
    sender = ipckit.sender(left)
    pid = os.fork()
    if not pid:
        try:
            receiver = ipckit.receiver(right)
            os._exit(0 if receiver.recv(10).value == b"for the child" else 1)
        except BaseException:
            os._exit(2)
    right.close()
    with sender:
        sender.send(b"for the child", 10)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_dead_letters(scheme, home):
    """Handed out so often, by whomever, it is put aside, whole, and the others go on."""
    url = f"{scheme}://q"
    with ipckit.sender(url) as sender, ipckit.receiver(f"{url}?max_deliver=2", ack="manual") as receiver:
        sender.send(b"poison", id="p", headers={"who": "me"})
        sender.send(bytes(20_000), id="large")
        for _ in range(2):
            receiver.recv(5).nack()
            receiver.recv(5).nack()
        with pytest.raises(errors.Timeout):
            receiver.recv(0.1)
        sender.send(b"good")
        assert receiver.recv(5).value == b"good"
        assert receiver.stats()["dead_letters"] == 2
    with ipckit.receiver(f"{url}-dead") as dead:
        letters = {letter.id: letter for letter in (dead.recv(5), dead.recv(5))}
        assert (letters["p"].value, letters["p"].headers, letters["p"].redelivered) == (b"poison", {"who": "me"}, 2)
        assert letters["large"].value == bytes(20_000)
    with ipckit.receiver(url) as receiver:
        assert receiver.recv(5).value == b"good"
    assert [path.name for path in home.iterdir() if path.name.endswith(".d")] == []


def test_a_letter_that_is_not_dead_is_left_to_the_next(scheme):
    """Only a receiver that asks for it puts aside; killed and closed receivers count like a nack."""
    url = f"{scheme}://q"
    with ipckit.sender(url) as sender:
        sender.send(b"x")
    for again in range(3):
        with ipckit.receiver(url, ack="manual") as receiver:
            assert receiver.recv(5).redelivered == again
    with ipckit.receiver(f"{url}?max_deliver=3") as receiver, ipckit.receiver(f"{url}-dead") as dead:
        with pytest.raises(errors.Timeout):
            receiver.recv(0.1)
        assert dead.recv(5).redelivered == 3
