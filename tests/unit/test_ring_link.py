"""RingLink by itself: two links on one ring in this process, threads where somebody must wait."""

import contextlib
import os
import random
import select
import signal
import socket
import threading
import time
import zlib

import pytest

from ipckit import _native
from ipckit._spi import Peer, Wait, Want

PAGE = os.sysconf("SC_PAGESIZE")


class GaveUp(Exception):
    @property
    def reason(self):
        return self.args[0]


class Forked(Exception):
    pass


def no_fork():
    raise Forked


def descriptors(capacity=1 << 16):
    memory = _native.ring_create(capacity)
    return memory, [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]


def make_link(memory, bells, control, side, *, limit=16 << 20, spin=-1):
    return _native.RingLink(
        memory, tuple(bells), control, side, lambda *why: GaveUp(*why), no_fork, limit, spin, Wait, None, Peer()
    )


@pytest.fixture
def pair():
    """pair(capacity, limit=, spin=) -> two links; every one is closed afterwards."""
    links = []

    def make(capacity=1 << 16, **options):
        memory, bells = descriptors(capacity)
        left, right = socket.socketpair()
        copies = [os.dup(memory), [os.dup(bell) for bell in bells]]
        made = make_link(memory, bells, left.detach(), 0, **options), make_link(*copies, right.detach(), 1, **options)
        links.extend(made)
        return made

    yield make
    for link in links:
        link.close()


@contextlib.contextmanager
def thread(function, *args, **kwargs):
    """Run it beside the block; what it raised, or its result, is in `.outcome` afterwards."""

    def body():
        try:
            running.outcome = function(*args, **kwargs)
        except BaseException as error:
            running.outcome = error

    running = threading.Thread(target=body)
    running.start()
    try:
        yield running
    finally:
        running.join(20)
        assert not running.is_alive()


def gives(reason, call, *args, **kwargs):
    with pytest.raises(GaveUp) as caught:
        call(*args, **kwargs)
    assert caught.value.reason == reason, caught.value
    return caught.value


def ready(wait):
    poll = select.poll()
    for fd, events in wait.fds:
        poll.register(fd, events)
    return bool(poll.poll(0))


def patterned(size, seed=1):
    return random.Random(seed).randbytes(size)


# -- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spin", [-1, 0, 1_000_000])
def test_every_size_arrives_whole_and_in_order(pair, spin):
    left, right = pair(spin=spin)
    sizes = [
        0,
        1,
        7,
        8,
        9,
        63,
        64,
        65,
        4095,
        4096,
        (1 << 14) - 1,
        1 << 14,
        (1 << 14) + 1,
        (1 << 16) - 8,
        1 << 16,
        300_001,
    ]
    frames = [patterned(size, size) for size in sizes] * 2
    with thread(lambda: [left.send(frame, timeout=10) for frame in frames]):
        for frame in frames:
            assert right.recv(timeout=10) == frame
    total = sum(map(len, frames))
    assert left.counters() == (len(frames), total, 0, 0)
    assert right.counters() == (0, 0, len(frames), total)


def test_both_directions_at_once(pair):
    left, right = pair(1 << 14)
    frames = [patterned(random.Random(n).randrange(9000), n) for n in range(400)]

    def talk(link):
        sums = []
        with thread(lambda: [link.send(frame, timeout=20) for frame in frames]):
            for _ in frames:
                sums.append(zlib.crc32(link.recv(timeout=20)))
        return sums

    with thread(talk, left) as other:
        mine = talk(right)
    assert mine == other.outcome == [zlib.crc32(frame) for frame in frames]


def test_a_ring_wraps_many_times_at_every_alignment(pair):
    left, right = pair(PAGE)
    for n in range(3000):
        frame = patterned(n % 997, n)
        left.send(frame, timeout=1)
        assert right.recv(timeout=1) == frame


def test_any_buffer_is_sent_and_strided_ones_are_refused(pair):
    left, right = pair()
    for frame in (bytearray(b"abc"), memoryview(b"xabc")[1:], memoryview(bytearray(range(8))).cast("I")):
        left.send(frame)
        assert right.recv() == bytes(frame)
    with pytest.raises((BufferError, TypeError)):
        left.send(memoryview(b"abcd")[::2])
    with pytest.raises(TypeError):
        left.send("text")
    left.send(b"fine")
    assert right.recv(0) == b"fine"


def test_several_senders_are_serialised(pair):
    left, right = pair(PAGE)
    with contextlib.ExitStack() as stack:
        for who in range(4):
            stack.enter_context(thread(lambda who: [left.send(bytes([who, n]), 20) for n in range(250)], who))
        got = [right.recv(20) for _ in range(1000)]
    for who in range(4):
        assert [n for sender, n in got if sender == who] == [*range(250)]


def test_many(pair):
    left, right = pair(1 << 14)
    frames = [patterned(n % 50, n) for n in range(5000)]
    with thread(left.send_many, frames, timeout=20) as sender:
        got = []
        while len(got) < len(frames):
            part = right.recv_many(70, timeout=20)
            assert 1 <= len(part) <= 70
            got += part
    assert got == frames
    assert sender.outcome == len(frames)


def test_send_many_says_how_many_fitted(pair):
    left, right = pair(PAGE)
    sent = left.send_many([b"x" * 1000] * 10, timeout=0)
    assert 1 <= sent < 10
    gives(_native.TIMED_OUT, left.send_many, [b"x" * 1000], 0)
    assert [len(frame) for frame in right.recv_many(100)] == [1000] * sent
    assert left.send_many([]) == 0


def test_send_many_sends_nothing_when_one_frame_is_wrong(pair):
    left, right = pair(limit=1000)
    gives(_native.TOO_LARGE, left.send_many, [b"good", b"x" * 1001])
    with pytest.raises(TypeError):
        left.send_many([b"good", None])
    assert right.try_recv() is None


def test_recv_into(pair):
    left, right = pair()
    buffer = bytearray(10)
    left.send(b"0123456789ab")
    assert gives(_native.TOO_LARGE, right.recv_into, buffer, 1).args[2] == (12, 10)
    assert right.recv(0) == b"0123456789ab", "the frame was kept"
    left.send(b"abc")
    assert right.recv_into(buffer, timeout=1) == 3
    assert buffer[:3] == b"abc"
    large, into = patterned(200_000), bytearray(200_000)
    with thread(left.send, large, 10):
        assert right.recv_into(into, 10) == len(large)
    assert into == large


def test_wrong_arguments(pair):
    left, _ = pair()
    for call in (left.recv, lambda timeout: left.send(b"", timeout)):
        for timeout, error in ((-1, ValueError), ("1", TypeError), (float("nan"), ValueError)):
            with pytest.raises(error):
                call(timeout)
    with pytest.raises(TypeError):
        left.send()
    with pytest.raises(TypeError):
        left.recv(1, timeout=1)
    with pytest.raises(TypeError):
        left.recv(patience=1)
    with pytest.raises(ValueError):
        left.recv_many(0)
    gives(_native.UNSUPPORTED, left.send, b"", priority=3)


# -- limits and large frames ----------------------------------------------------------------------------------------


def test_the_limit_is_for_both_sides(pair):
    left, right = pair(limit=5000)
    assert gives(_native.TOO_LARGE, left.send, b"x" * 5001).args[2] == (5001, 5000)
    left.send(b"x" * 5000)
    assert len(right.recv(0)) == 5000


@pytest.mark.parametrize("size", [6000, 100_000])
def test_a_frame_above_the_receivers_limit_ends_the_link(size):
    memory, bells = descriptors()
    copies = os.dup(memory), [os.dup(bell) for bell in bells]
    ends = socket.socketpair()
    left = make_link(memory, bells, ends[0].detach(), 0)
    right = make_link(*copies, ends[1].detach(), 1, limit=5000)
    left.send(b"fine")
    left.try_send(b"x" * size)
    assert right.recv(0) == b"fine"
    for _ in range(2):
        gives(_native.PROTOCOL, right.recv, 1)
        gives(_native.PROTOCOL, right.send, b"")
    gives(_native.ENDED, left.recv, 5)
    left.close()
    right.close()


def test_a_timeout_inside_a_large_frame_keeps_its_rest(pair):
    left, right = pair(1 << 14)
    large = bytearray(patterned(100_000))
    gives(_native.UNKNOWN, left.send, large, 0.02)
    expected = bytes(large)
    large[:] = bytes(len(large))  # the link has its own copy of what it still holds
    assert not left.try_flush()
    assert not left.try_send(b"next")
    gives(_native.TIMED_OUT, left.send, b"next", 0.01)
    got = None
    while got is None:
        got = right.try_recv()
        left.try_flush()
    assert got == expected
    assert left.try_flush()
    left.send(b"next", 1)
    assert right.recv(1) == b"next"
    assert left.counters()[:2] == (2, len(expected) + 4)


def test_the_rest_leaves_while_its_sender_only_receives(pair):
    left, right = pair(1 << 14, spin=0)
    large = patterned(200_000)
    assert left.try_send(large)

    def answer():
        right.send(right.recv(10)[:3], 10)

    with thread(answer):
        assert left.recv(10) == large[:3]


def test_armed_for_receiving_with_a_rest_waits_for_room_too(pair):
    left, right = pair(1 << 14)
    assert left.try_send(patterned(100_000))
    wait = left.arm(Want.RECV)
    assert left.try_recv() is None
    assert not ready(wait)
    assert right.try_recv() is None  # takes what there is of it
    assert ready(wait)


def test_a_partial_frame_survives_timeouts_of_its_receiver(pair):
    left, right = pair(1 << 14)
    large = patterned(100_000)
    assert left.try_send(large)
    for _ in range(50):
        gives(_native.TIMED_OUT, right.recv, 0)
        if left.try_flush():
            break
    assert right.recv(1) == large


# -- waiting --------------------------------------------------------------------------------------------------------


def test_nothing_there(pair):
    left, right = pair()
    assert right.try_recv() is None
    for timeout in (0, 0.02):
        gives(_native.TIMED_OUT, right.recv, timeout)
        gives(_native.TIMED_OUT, right.recv_many, 5, timeout)
        gives(_native.TIMED_OUT, right.recv_into, bytearray(9), timeout)
    begin = time.monotonic()
    gives(_native.TIMED_OUT, right.recv, 0.1)
    assert time.monotonic() - begin >= 0.1
    left.send(b"still works")
    assert right.recv(0) == b"still works"


def test_no_room(pair):
    left, right = pair(PAGE)
    frame = b"x" * 1000
    while left.try_send(frame):
        pass
    gives(_native.TIMED_OUT, left.send, frame, 0)
    gives(_native.TIMED_OUT, left.send, frame, 0.02)
    assert right.recv(0) == frame
    left.send(frame, 0)


@pytest.mark.parametrize("spin", [0, -1, 50_000])
def test_a_sleeping_receiver_and_a_sleeping_sender_are_woken(pair, spin):
    left, right = pair(PAGE, spin=spin)
    for n in range(30):
        with thread(right.recv, 10) as receiver:
            if n % 3:
                time.sleep(0.002)
            left.send(b"%d" % n)
        assert receiver.outcome == b"%d" % n
    frame = b"x" * 1000
    while left.try_send(frame):
        pass
    for n in range(30):
        with thread(left.send, frame, 10) as sender:
            if n % 3:
                time.sleep(0.002)
            assert right.recv(10) == frame
        assert sender.outcome is None


def test_arm_then_a_change_makes_the_wait_ready(pair):
    left, right = pair(PAGE)
    for n in range(20):
        wait = right.arm(Want.RECV)
        assert right.try_recv() is None
        assert not ready(wait), f"ready for nothing, round {n}"
        left.send(b"now")
        assert ready(wait)
        assert right.try_recv() == b"now"
    while left.try_send(b"x" * 1000):
        pass
    for _ in range(20):
        wait = left.arm(Want.SEND)
        assert not left.try_send(b"x" * 1000)
        assert not ready(wait)
        assert right.try_recv() is not None
        assert ready(wait)
        assert left.try_send(b"x" * 1000)


def test_a_wait_that_is_ready_for_nothing_falls_silent(pair):
    left, right = pair()
    right.arm(Want.RECV)
    left.send(b"one")  # rings
    assert right.try_recv() == b"one"
    for _ in range(3):
        wait = right.arm(Want.RECV)
        assert right.try_recv() is None
    assert not ready(wait)
    os.eventfd_write(wait.fds[0][0], 7)  # nobody of ours would
    for _ in range(3):
        wait = right.arm(Want.RECV)
        assert right.try_recv() is None
    assert not ready(wait)


def test_blocking_and_arming_may_alternate(pair):
    left, right = pair(spin=0)
    for n in range(10):
        with thread(right.recv, 10):
            time.sleep(0.005)
            left.send(b"a")
        for _ in range(2 if n % 2 else 1):
            wait = right.arm(Want.RECV)
            assert right.try_recv() is None
        left.send(b"b")
        assert ready(wait)
        assert right.try_recv() == b"b"


def test_who_was_turned_away_from_a_lane_is_woken_when_it_is_free(pair):
    left, right = pair()
    loan = left.try_loan(8)
    with loan as view:
        assert not left.try_send(b"second")
        wait = left.arm(Want.SEND)
        assert not left.try_send(b"second")
        view[:] = b"firstone"
    assert ready(wait)
    assert left.try_send(b"second")
    assert right.recv_many(5) == [b"firstone", b"second"]


def test_fileno_is_readable_exactly_when_there_is_something(pair):
    left, right = pair()
    fd = right.fileno()
    assert right.fileno() == fd

    def readable():
        return bool(select.select([fd], [], [], 0)[0])

    for _ in range(3):
        assert not readable()
        left.send(b"1")
        left.send(b"2")
        assert readable()
        assert right.recv(0) == b"1"
        assert readable()
        assert right.try_recv() == b"2"
        assert not readable()
        assert right.try_recv() is None
        assert not readable()
    left.close()
    assert readable()


class Interrupted(Exception):
    pass


@pytest.fixture
def alarm():
    """alarm(seconds) -> Interrupted is raised in the main thread then, as Ctrl-C would be."""

    def handler(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("spin", [0, 5_000_000_000])
def test_a_signal_handler_ends_a_wait(pair, alarm, spin):
    left, right = pair(PAGE, spin=spin)
    frame = b"x" * 1000
    begin = time.monotonic()
    alarm(0.05)
    with pytest.raises(Interrupted):
        right.recv(20)
    while left.try_send(frame):
        pass
    alarm(0.05)
    with pytest.raises(Interrupted):
        left.send(frame, 20)
    assert time.monotonic() - begin < 10
    assert [len(got) for got in right.recv_many(100)] == [1000] * 4, "the interrupted frame is not among them"


def test_an_interrupted_large_frame_keeps_its_rest(pair, alarm):
    left, right = pair(1 << 14)
    large = patterned(100_000)
    alarm(0.05)
    with pytest.raises(Interrupted):
        left.send(large, 20)
    with thread(right.recv, 10) as receiver:
        while not left.try_flush():
            pass
    assert receiver.outcome == large


# -- ends -----------------------------------------------------------------------------------------------------------


def test_what_was_sent_before_close_is_delivered_before_the_goodbye(pair):
    left, right = pair()
    for n in range(100):
        left.send(b"%d" % n)
    left.close()
    gives(_native.GOODBYE, right.send, b"too late")
    assert [right.recv(0) for _ in range(100)] == [b"%d" % n for n in range(100)]
    for call in (right.recv, right.try_recv, right.try_borrow, lambda: right.try_send(b""), lambda: right.try_loan(1)):
        gives(_native.GOODBYE, call)
        gives(_native.GOODBYE, call)


class Victim:
    """The other side of a link, that can end as if it had been killed."""

    def __init__(self, capacity=1 << 16, **options):
        memory, bells = descriptors(capacity)
        copies = os.dup(memory), [os.dup(bell) for bell in bells]
        ours, theirs = socket.socketpair()
        self._lifeline = theirs.dup()
        self.survivor = make_link(memory, bells, ours.detach(), 0, **options)
        self.victim = make_link(*copies, theirs.detach(), 1, **options)

    def __enter__(self):
        return self

    def die(self):
        """Only the life line ends; the shared memory stays as it is."""
        self._lifeline.shutdown(socket.SHUT_RDWR)

    def __exit__(self, *_):
        self._lifeline.close()
        self.survivor.close()
        self.victim.close()


def test_what_was_committed_before_death_is_delivered_before_the_end():
    with Victim() as both:
        for n in range(100):
            both.victim.send(b"%d" % n)
        both.die()
        assert [both.survivor.recv(5) for _ in range(100)] == [b"%d" % n for n in range(100)]
        for call in (both.survivor.recv, both.survivor.try_recv, lambda: both.survivor.try_send(b"")):
            for _ in range(2):
                assert gives(_native.ENDED, call).args[2] is False


def test_death_inside_a_frame_discards_it():
    with Victim(1 << 14) as both:
        both.victim.send(b"whole")
        assert both.victim.try_send(patterned(100_000))
        both.die()
        assert both.survivor.recv(5) == b"whole"
        assert gives(_native.ENDED, both.survivor.recv, 5).args[2] is True


@pytest.mark.parametrize("spin", [0, 5_000_000_000])
@pytest.mark.parametrize("waiting", ["recv", "send", "lane"])
def test_a_waiting_survivor_hears_of_the_death(spin, waiting):
    with Victim(PAGE, spin=spin) as both:
        link = both.survivor
        while waiting == "send" and link.try_send(b"x" * 1000):
            pass
        call = (lambda: link.send(b"x" * 1000, 20)) if waiting == "send" else (lambda: link.recv(20))
        with contextlib.ExitStack() as stack:
            threads = [stack.enter_context(thread(call)) for _ in range(2 if waiting == "lane" else 1)]
            time.sleep(0.05)
            both.die()
        for running in threads:
            assert isinstance(running.outcome, GaveUp)
            assert running.outcome.reason == _native.ENDED


@pytest.mark.parametrize("operation", ["try_recv", "try_send", "recv", "send"])
def test_a_survivor_that_never_sleeps_hears_of_the_death(operation):
    with Victim() as both:
        call = {
            "try_recv": both.survivor.try_recv,
            "try_send": lambda: both.survivor.try_send(b"") and both.victim.recv(0),
            "recv": lambda: both.survivor.recv(0),
            "send": lambda: both.survivor.send(b"", 0) or both.victim.recv(0),
        }[operation]
        with contextlib.suppress(GaveUp):
            call()
        both.die()
        until = time.monotonic() + 10
        with pytest.raises(GaveUp) as caught:  # noqa: PT012
            while time.monotonic() < until:
                try:
                    call()
                except GaveUp as gave_up:
                    if gave_up.reason != _native.TIMED_OUT:
                        raise
        assert caught.value.reason == _native.ENDED


@pytest.mark.parametrize("spin", [0, 5_000_000_000])
def test_close_wakes_everybody_who_waits_here(pair, spin):
    left, right = pair(PAGE, spin=spin)
    while left.try_send(b"x" * 1000):
        pass
    with contextlib.ExitStack() as stack:
        threads = [
            stack.enter_context(thread(call, 20))
            for call in (left.recv, left.recv, lambda t: left.send(b"x" * 1000, t), lambda t: left.send(b"x" * 1000, t))
        ]
        time.sleep(0.05)
        left.close()
        left.close()
    assert [running.outcome.reason for running in threads] == [_native.CLOSED] * 4
    for call in (left.recv, left.try_recv, left.try_borrow, left.try_flush, left.fileno, lambda: left.arm(Want.RECV)):
        gives(_native.CLOSED, call)
    assert len(right.recv_many(100)) >= 3
    gives(_native.GOODBYE, right.recv)


def test_a_dropped_link_closes_in_order(pair):
    memory, bells = descriptors()
    copies = os.dup(memory), [os.dup(bell) for bell in bells]
    ends = socket.socketpair()
    left, right = make_link(memory, bells, ends[0].detach(), 0), make_link(*copies, ends[1].detach(), 1)
    left.send(b"last words")
    del left
    assert right.recv(1) == b"last words"
    gives(_native.GOODBYE, right.recv, 1)
    right.close()


def test_no_descriptor_is_left(pair):
    before = sorted(os.listdir("/proc/self/fd"))
    left, right = pair(spin=0)
    right.fileno()
    with thread(right.recv, 10):
        time.sleep(0.01)
        left.send(b"x")
    left.close()
    right.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread
def test_a_forked_child_is_refused_and_does_not_keep_the_peer_waiting(pair):
    left, right = pair()
    left.send(b"for the parent")
    hold, release = os.pipe()
    child = os.fork()
    if child == 0:
        verdict = 1
        try:
            os.close(release)
            right.abandon()
            for call in (right.recv, right.try_recv, lambda: right.try_send(b""), right.fileno, right.try_flush):
                try:
                    call()
                except Forked:
                    continue
                os._exit(2)
            right.close()
            del right
            verdict = 0
            os.read(hold, 1)  # outlive the parent's link
        finally:
            os._exit(verdict)
    os.close(hold)
    try:
        assert right.recv(1) == b"for the parent"
        right.send(b"and back", 1)
        assert left.recv(1) == b"and back"
        right.close()
        gives(_native.GOODBYE, left.recv, 5)
    finally:
        os.close(release)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- what is handed to the constructor ------------------------------------------------------------------------------


def test_capacities():
    for capacity in (0, 1, PAGE - 1, PAGE + 1, 3 * PAGE, 1 << 31, -1):
        with pytest.raises(OSError, match="Invalid argument"):
            _native.ring_create(capacity)
    os.close(_native.ring_create(PAGE))


def spoiled_memory(how):
    size = PAGE + 2 * (1 << 16)
    if how == "file":
        return os.open("/proc/self/exe", os.O_RDONLY)
    good = _native.ring_create(1 << 16)
    try:
        content = bytearray(os.pread(good, size, 0))
    finally:
        os.close(good)
    if how == "magic":
        content[0] ^= 1
    elif how == "version":
        content[8] ^= 2
    elif how == "capacity":
        content[16:24] = (1 << 17).to_bytes(8, "little")
    elif how == "huge":
        content[16:24] = (1 << 63).to_bytes(8, "little")
    elif how == "short":
        del content[-1:]
    elif how == "tiny":
        del content[100:]
    memory = os.memfd_create("spoiled", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(memory, content)
    if how != "unsealed":
        import fcntl

        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return memory


@pytest.mark.parametrize("how", ["file", "unsealed", "magic", "version", "capacity", "huge", "short", "tiny"])
def test_memory_that_is_no_ring_is_refused_before_it_is_used(how):
    before = sorted(os.listdir("/proc/self/fd"))
    memory = spoiled_memory(how)
    bells = [os.eventfd(0) for _ in range(4)]
    ends = socket.socketpair()
    gives(_native.PROTOCOL, make_link, memory, bells, ends[0].fileno(), 1)
    for fd in (memory, *bells):
        os.close(fd)  # still ours
    for end in ends:
        end.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
