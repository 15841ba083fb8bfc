"""StreamLink against a raw socket and against itself: frames, ends, rests, time, threads, forks."""

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipckit import _native
from ipckit._spi import Peer, Wait, Want

REASONS = ["CLOSED", "ENDED", "GOODBYE", "TIMED_OUT", "UNKNOWN", "TOO_LARGE", "PROTOCOL", "SYSTEM", "UNSUPPORTED"]
NAMES = {getattr(_native, name): name for name in REASONS}
LIMIT = 1 << 20


class GaveUp(Exception):
    def __init__(self, reason: int, operation: str, detail: object) -> None:
        super().__init__(NAMES[reason], operation, detail)
        self.reason, self.operation, self.detail = NAMES[reason], operation, detail


def refuse_fork() -> None:
    raise RuntimeError("forked")


def make(
    rfd: int, wfd: int | None = None, *, limit: int = LIMIT, spin: int = 0, goodbye: bool = True, on_fork: Any = None
):
    wfd = rfd if wfd is None else wfd
    return _native.StreamLink(rfd, wfd, GaveUp, on_fork or refuse_fork, limit, spin, goodbye, Wait, None, Peer(pid=1))


@contextlib.contextmanager
def gives_up(reason: str, detail: object = ...) -> Iterator[None]:
    with pytest.raises(GaveUp) as caught:
        yield
    assert caught.value.reason == reason
    if detail is not ...:
        assert caught.value.detail == detail


@pytest.fixture(params=["unix", "tcp", "pipe"])
def pair(request: pytest.FixtureRequest):
    links = make_pair(request.param)
    yield links
    for link in links:
        link.close()


def make_pair(kind: str, **options: Any):
    if kind == "pipe":
        (r1, w1), (r2, w2) = os.pipe(), os.pipe()
        return make(r1, w2, **options), make(r2, w1, **options)
    if kind == "unix":
        left, right = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
    return make(left.detach(), **options), make(right.detach(), **options)


@pytest.fixture
def raw():
    """A link, and the raw socket at its other end."""
    mine, theirs = socket.socketpair()
    link = make(mine.detach())
    with theirs:
        theirs.settimeout(5)
        yield link, theirs
        link.close()


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def fill(link) -> int:
    """Send until nothing more is accepted; the number of frames, the last of which left a rest."""
    count = 0
    while link.try_send(b"y" * 60000):
        count += 1
    assert not link.try_flush()
    return count


# -- frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 64, 4096, 4097, 65531, 65532, 65533, 300000, LIMIT])
def test_sizes(pair, size: int) -> None:
    left, right = pair
    payload = os.urandom(size)
    with background(lambda: left.send(payload)):
        assert right.recv(timeout=5) == payload
    with background(lambda: right.send(memoryview(payload))):
        assert left.recv() == payload
    assert left.counters() == right.counters() == (1, size, 1, size)


@contextlib.contextmanager
def background(work: Any) -> Iterator[None]:
    trouble: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        assert not thread.is_alive()
    if trouble:
        raise trouble[0]


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_of_the_bytes_yields_the_same_frames(data: st.DataObject) -> None:
    sizes = st.one_of(st.integers(0, 200), st.sampled_from([4096, 65530, 65532, 65533, 70000, 150000]))
    payloads = [bytes([i % 251]) * size for i, size in enumerate(data.draw(st.lists(sizes, max_size=12)))]
    stream = b"".join(map(frame, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    mine, theirs = socket.socketpair()
    link = make(mine.detach())
    received = []
    with theirs:
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            part = memoryview(stream)[start:end]
            while part:
                theirs.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    part = part[theirs.send(part) :]
                match data.draw(st.sampled_from(["try_recv", "recv", "recv_many", "recv_into"])):
                    case "try_recv":
                        if (got := link.try_recv()) is not None:
                            received.append(got)
                    case "recv":
                        with contextlib.suppress(GaveUp):
                            received.append(link.recv(timeout=0))
                    case "recv_many":
                        with contextlib.suppress(GaveUp):
                            received += link.recv_many(3, timeout=0)
                    case _:
                        buffer = bytearray(200000)
                        with contextlib.suppress(GaveUp):
                            received.append(bytes(buffer[: link.recv_into(buffer, timeout=0)]))
    with gives_up("ENDED", False):
        while True:
            received.append(link.recv())
    assert received == payloads
    link.close()


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=150, deadline=None)
def test_rubbish_ends_the_link_and_nothing_else(rubbish: bytes, goodbye: bool) -> None:
    mine, theirs = socket.socketpair()
    link = make(mine.detach(), limit=1000, goodbye=goodbye)
    with theirs:
        theirs.send(rubbish)
    with pytest.raises(GaveUp) as caught:
        assert all(len(payload) <= 1000 for payload in iter(link.recv, None))
    assert caught.value.reason in {"ENDED", "PROTOCOL", "GOODBYE"}
    with gives_up(caught.value.reason):
        link.recv()
    with gives_up(caught.value.reason):
        link.send(b"")
    link.close()


def test_a_hostile_prefix_costs_no_memory(raw) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    links = [raw[0]]
    before = resident()
    mine, theirs = socket.socketpair()
    links.append(make(mine.detach(), limit=512 << 20))
    theirs.send(struct.pack(">I", 512 << 20) + b"x" * 10)
    assert links[1].try_recv() is None
    raw[1].send(b"\xff\xff\xff\xfe")
    with gives_up("PROTOCOL", f"length prefix {0xFFFFFFFE} is above the limit of {LIMIT}"):
        raw[0].recv()
    assert resident() - before < 1 << 20
    theirs.close()
    with gives_up("ENDED", True):
        links[1].recv()
    links[1].close()


def test_above_the_limit_is_refused_and_harmless(pair) -> None:
    left, right = pair
    for send in (left.send, left.try_send, lambda payload: left.send_many([b"x", payload])):
        with gives_up("TOO_LARGE", (LIMIT + 1, LIMIT)):
            send(bytes(LIMIT + 1))
    left.send(b"fits")
    assert right.recv() == b"fits"
    assert right.try_recv() is None


def test_only_contiguous_buffers(pair) -> None:
    left, right = pair
    with pytest.raises(TypeError):
        left.send("text")
    with pytest.raises(BufferError):
        left.send(memoryview(b"abcdef")[::2])
    left.send(bytearray(b"array"))
    assert right.recv() == b"array"


# -- recv_into, and the many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 200000])
def test_recv_into(pair, size: int) -> None:
    left, right = pair
    buffer = bytearray(size + 5)
    payload = os.urandom(size)
    with background(lambda: (left.send(payload), left.send(payload))):
        with gives_up("TOO_LARGE", (size, size - 1)):
            right.recv_into(memoryview(buffer)[: size - 1], timeout=5)
        assert right.recv_into(buffer, timeout=5) == size
        assert buffer[:size] == payload
        assert right.recv() == payload
    with pytest.raises((TypeError, BufferError)):
        right.recv_into(b"constant")


def test_recv_into_keeps_what_came_of_an_unfinished_frame(raw) -> None:
    link, theirs = raw
    payload = os.urandom(150000)
    theirs.send(frame(payload)[:100000])
    buffer = bytearray(200000)
    with gives_up("TIMED_OUT"):
        link.recv_into(buffer, timeout=0.01)
    buffer[:] = bytes(200000)
    with gives_up("TOO_LARGE", (150000, 10)):
        link.recv_into(bytearray(10), timeout=0)
    theirs.send(frame(payload)[100000:])
    assert link.recv_into(buffer) == 150000
    assert buffer[:150000] == payload


def test_many(pair) -> None:
    left, right = pair
    payloads = [os.urandom(size) for size in [*range(0, 6000, 11), 100000, 3, 200000, *range(900)]]
    received: list[bytes] = []
    with background(lambda: left.send_many(payloads)):
        while len(received) < len(payloads):
            some = right.recv_many(100, timeout=5)
            assert 1 <= len(some) <= 100
            received += some
    assert received == payloads
    assert left.counters()[:2] == (len(payloads), sum(map(len, payloads)))
    assert left.send_many([]) == 0


def test_send_many_tells_how_many_were_accepted(pair) -> None:
    left, right = pair
    payloads = [b"%06d" % i * 500 for i in range(5000)]
    accepted = left.send_many(payloads, timeout=0.05)
    assert 0 < accepted < len(payloads)
    with gives_up("TIMED_OUT"):
        while True:  # TCP finds a little more room now and then
            accepted += left.send_many(payloads[accepted:], timeout=0)
    assert left.counters()[0] == accepted
    received = []
    while len(received) < accepted:
        received += right.recv_many(1000, timeout=5)
        left.try_flush()
    assert received == payloads[:accepted]
    assert right.try_recv() is None


def test_recv_many_leaves_the_end_to_the_next_call(pair) -> None:
    left, right = pair
    left.send_many([b"1", b"2"])
    left.close()
    assert right.recv_many(10) == [b"1", b"2"]
    with gives_up("GOODBYE"):
        right.recv_many(10)
    with pytest.raises(ValueError, match="limit"):
        right.recv_many(0)


# -- rests ---------------------------------------------------------------------------------------------------------


def test_an_accepted_rest_is_driven_out_by_receiving(pair) -> None:
    left, right = pair
    assert left.arm(Want.RECV) is left.arm(Want.RECV)
    count = fill(left)
    assert any(events & select.POLLOUT for _, events in left.arm(Want.RECV).fds)
    with background(lambda: left.recv(timeout=5)):  # waits for the answer, and sends what is left meanwhile
        for _ in range(count):
            assert right.recv(timeout=5) == b"y" * 60000
        right.send(b"answer")
    assert left.try_flush()
    assert not any(events & select.POLLOUT for _, events in left.arm(Want.RECV).fds)


def test_a_timeout_in_mid_frame_is_unknown_and_the_rest_goes_out(pair) -> None:
    left, right = pair
    payload = os.urandom(LIMIT)
    accepted = 0

    def send_many() -> None:
        nonlocal accepted
        while True:
            left.send(payload, timeout=0.02)
            accepted += 1

    with pytest.raises(GaveUp) as caught:
        send_many()
    assert caught.value.reason in {"UNKNOWN", "TIMED_OUT"}
    accepted += caught.value.reason == "UNKNOWN"
    with gives_up("TIMED_OUT"):
        left.send(b"next", timeout=0.02)
    assert left.counters()[0] == accepted
    with background(lambda: left.send(b"next", timeout=5)):
        for _ in range(accepted):
            assert right.recv(timeout=5) == payload
        assert right.recv(timeout=5) == b"next"


def test_a_signal_handler_that_raises_loses_nothing() -> None:
    left, right = make_pair("unix")
    payload = os.urandom(LIMIT)

    def handler(*_: object) -> None:
        raise InterruptedError("enough")

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        for operation in (lambda: left.send(payload), lambda: left.recv()):
            timer = threading.Timer(
                0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            )
            timer.start()
            with pytest.raises(InterruptedError, match="enough"):
                operation()
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    with background(lambda: left.send(b"next")):
        assert right.recv() == payload
        assert right.recv() == b"next"
    left.close()
    right.close()


@pytest.mark.parametrize("operation", ["recv", "send"])
def test_a_signal_handler_may_close(pair, operation: str) -> None:
    left, _ = pair
    fill(left)
    before = signal.signal(signal.SIGALRM, lambda *_: left.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with gives_up("CLOSED"):
            left.recv() if operation == "recv" else left.send(b"more")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_long_spin_does_not_hold_back_the_rest() -> None:
    left, right = make_pair("unix", spin=20_000_000_000)
    count = fill(left)
    with background(lambda: left.recv(timeout=10)):
        for _ in range(count):
            assert right.recv(timeout=5) == b"y" * 60000
        right.send(b"answer")
    left.close()
    right.close()


@pytest.mark.parametrize("spin", [0, 3_000_000_000, -1])
def test_a_signal_ends_a_spin_too(spin: int) -> None:
    left, right = make_pair("pipe", spin=spin)

    def handler(*_: object) -> None:
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        with pytest.raises(InterruptedError):
            left.recv(timeout=30)
        assert time.monotonic() - start < 2
    finally:
        signal.signal(signal.SIGALRM, before)
    left.close()
    right.close()


# -- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spin", [0, 200_000, -1])
@pytest.mark.parametrize("kind", ["unix", "pipe"])
def test_a_timeout_is_never_early(kind: str, spin: int) -> None:
    left, right = make_pair(kind, spin=spin)
    for timeout in (0.001, 0.02, 0.07):
        start = time.monotonic()
        with gives_up("TIMED_OUT"):
            left.recv(timeout=timeout)
        assert time.monotonic() - start >= timeout
    fill(left)
    start = time.monotonic()
    with gives_up("TIMED_OUT"):
        left.send(b"x", timeout=0.03)
    assert time.monotonic() - start >= 0.03
    with gives_up("TIMED_OUT"):
        left.send(b"x", timeout=0)
    left.close()
    right.close()


def test_waiting_burns_no_core_even_if_somebody_changes_the_socket(pair) -> None:
    left, right = pair
    os.set_blocking(left.fileno(), False)
    before = time.process_time()
    with gives_up("TIMED_OUT"):
        left.recv(timeout=0.4)
    with gives_up("TIMED_OUT"):
        right.recv(timeout=0.4)
    assert time.process_time() - before < 0.05


def test_arguments(pair) -> None:
    left, _ = pair
    for timeout in (-1, -0.1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            left.recv(timeout)
    for wrong in (lambda: left.recv("soon"), lambda: left.recv(1, 2), lambda: left.recv(wait=1), left.send):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(TypeError):
        left.recv(1, timeout=1)
    with gives_up("UNSUPPORTED"):
        left.send(b"", priority=3)
    left.send(b"", None, 0)
    with pytest.raises(ValueError, match="RECV"):
        left.arm(0)


def test_spinning_finds_what_comes() -> None:
    for spin in (50_000, -1):
        left, right = make_pair("unix", spin=spin)

        def echo(link: Any = right) -> None:
            for _ in range(300):
                link.send(link.recv())

        with background(echo):
            for i in range(300):
                left.send(b"%d" % i)
                assert left.recv(timeout=5) == b"%d" % i
        left.close()
        right.close()


# -- ends ----------------------------------------------------------------------------------------------------------


def test_what_was_sent_before_a_close_arrives_before_the_goodbye(pair) -> None:
    left, right = pair
    left.send(b"first")
    assert left.try_send(b"z" * 90000)
    left.close()
    left.close()
    with gives_up("CLOSED"):
        left.recv()
    assert right.recv() == b"first"
    assert right.recv() == b"z" * 90000
    for _ in range(2):
        with gives_up("GOODBYE"):
            right.recv()
    with gives_up("GOODBYE"):
        right.send(b"x")
    assert right.counters() == (0, 0, 2, 90005)


def test_a_send_that_fails_reports_the_goodbye_and_keeps_the_frames() -> None:
    left, right = make_pair("unix")
    right.send_many([b"unread", bytes(100000)])
    right.close()
    for _ in range(2):
        with gives_up("GOODBYE"):
            left.send(b"x")
    assert left.recv() == b"unread"
    assert left.recv() == bytes(100000)
    with gives_up("GOODBYE"):
        left.recv()
    left.close()


def test_a_broken_pipe_leaves_the_other_direction() -> None:
    (r1, w1), (r2, w2) = os.pipe(), os.pipe()
    link = make(r1, w2)
    os.close(r2)
    os.write(w1, frame(b"still here"))
    with gives_up("SYSTEM", errno.EPIPE):
        link.send(b"x")
    with gives_up("SYSTEM", errno.EPIPE):
        link.try_send(b"x")
    assert link.recv() == b"still here"
    with gives_up("TIMED_OUT"):
        link.recv(timeout=0.01)
    os.close(w1)
    with gives_up("ENDED", False):
        link.recv()
    link.close()


def test_sigpipe_kills_nobody() -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for kind in ("pipe", "unix"):
            left, right = make_pair(kind)
            right.close()
            with contextlib.suppress(GaveUp):
                left.send(b"x")
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_the_last_bytes_are_the_goodbye(raw) -> None:
    link, theirs = raw
    link.send(b"hi")
    link.close()
    assert theirs.recv(100) == frame(b"hi") + b"\xff" * 4
    assert theirs.recv(100) == b""


@pytest.mark.parametrize("how", ["let go", "flag", "dropped"])
def test_no_goodbye(how: str) -> None:
    mine, theirs = socket.socketpair()
    link = make(mine.detach(), goodbye=how != "flag")
    link.send(b"hi")
    if how == "dropped":
        del link
    else:
        link.close(goodbye=how != "let go")
    with theirs:
        assert theirs.recv(100) == frame(b"hi")
        assert theirs.recv(100) == b""


def test_a_reset_is_an_error_behind_the_frames() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        served, _ = server.accept()
    link = make(served.detach())
    client.send(frame(b"before"))
    assert select.select([link], [], [], 5)[0]
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    assert link.recv(timeout=5) == b"before"
    for _ in range(2):
        with gives_up("SYSTEM", errno.ECONNRESET):
            link.recv(timeout=5)
    with gives_up("SYSTEM", errno.ECONNRESET):
        link.send(b"x")
    link.close()


# -- threads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["recv", "recv_many", "recv_into", "send", "send_many", "second recv"])
def test_close_wakes_whoever_waits(pair, operation: str) -> None:
    left, _ = pair
    waiting = {
        "recv": lambda: left.recv(),
        "recv_many": lambda: left.recv_many(5, 30),
        "recv_into": lambda: left.recv_into(bytearray(5), timeout=30),
        "send": lambda: left.send(b"x" * LIMIT),
        "send_many": lambda: left.send_many([b"x" * 1000] * 5000),
        "second recv": lambda: left.recv(),
    }[operation]
    count = 2 if operation == "second recv" else 1
    if operation.startswith("send"):
        fill(left)
    reasons: list[str] = []

    def wait() -> None:
        try:
            waiting()
        except GaveUp as error:
            reasons.append(error.reason)

    threads = [threading.Thread(target=wait) for _ in range(count)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    left.close()
    for thread in threads:
        thread.join(5)
    assert reasons == ["CLOSED"] * count


def open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}


def test_a_second_receiver_waits_for_the_first(pair) -> None:
    left, right = pair
    received: list[bytes] = []
    with (
        background(lambda: received.append(left.recv(timeout=5))),
        background(lambda: received.append(left.recv(timeout=5))),
    ):
        time.sleep(0.05)
        assert left.try_recv() is None  # never waits, not for them either
        with gives_up("TIMED_OUT"):
            left.recv(timeout=0.02)
        right.send(b"1")
        right.send(b"2")
    assert sorted(received) == [b"1", b"2"]


def test_one_sends_while_another_receives(pair) -> None:
    left, right = pair
    payloads = [os.urandom(size) for size in (10, 70000, 5, 300000, 4096)] * 5

    def send(link: Any) -> None:
        for payload in payloads:
            link.send(payload)

    with background(lambda: send(left)), background(lambda: send(right)), background(lambda: check(left, payloads)):
        check(right, payloads)


def check(link: Any, payloads: list[bytes]) -> None:
    for payload in payloads:
        assert link.recv(timeout=10) == payload


# -- descriptors, forks, memory -------------------------------------------------------------------------------------


def test_detach(raw) -> None:
    link, theirs = raw
    fd = link.fileno()
    theirs.send(frame(b"one") + b"\0\0")
    assert link.recv() == b"one"
    with pytest.raises(ValueError, match="part of a message"):
        link.detach()
    theirs.send(b"\0\1x")
    assert link.recv() == b"x"
    assert link.detach() == (fd, fd)
    assert not os.get_blocking(fd)
    with gives_up("CLOSED"):
        link.recv()
    link.close()
    os.write(fd, b"alive")
    assert theirs.recv(10) == b"alive"
    os.close(fd)


def test_a_failed_constructor_leaves_the_descriptors() -> None:
    r, w = os.pipe()
    for arguments in (
        (r, w, None, None, 1, 0, True, Wait, None, None),
        (r, w, GaveUp, GaveUp, -1, 0, True, Wait, None, None),
    ):
        with pytest.raises((TypeError, ValueError)):
            _native.StreamLink(*arguments)
    os.write(w, b"x")
    os.close(r)
    os.close(w)


def in_child(work: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            os._exit(work())
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_is_refused_and_says_no_goodbye(raw) -> None:
    link, theirs = raw

    def child() -> int:
        for use in (link.recv, lambda: link.send(b"x"), link.try_recv, link.fileno, lambda: link.arm(1)):
            with pytest.raises(RuntimeError, match="forked"):
                use()
        link.close()
        return 5

    assert in_child(child) == 5
    link.send(b"still ours")
    assert theirs.recv(100) == frame(b"still ours")


def test_a_forked_child_can_adopt() -> None:
    mine, theirs = socket.socketpair()
    asked: list[int] = []
    link = make(mine.detach(), on_fork=lambda: asked.append(1))
    other = make(theirs.detach())

    def child() -> int:
        link.send(link.recv() + b" adopted")
        link.send(b"again")
        link.close()
        return len(asked)

    other.send(b"hello")
    assert in_child(child) == 1
    link.close(goodbye=False)
    assert not asked
    assert [other.recv(), other.recv()] == [b"hello adopted", b"again"]
    with gives_up("GOODBYE"):
        other.recv()
    other.close()


def test_half_a_message_is_not_adopted(raw) -> None:
    mine, theirs = socket.socketpair()
    link = make(mine.detach(), on_fork=lambda: None)
    theirs.send(frame(b"whole") + b"\0\0")
    assert link.recv() == b"whole"

    def child() -> int:
        with gives_up("UNSUPPORTED"):
            link.recv()
        return 3

    assert in_child(child) == 3
    theirs.close()
    link.close()


def test_nothing_leaks() -> None:
    gc.collect()  # what earlier tests of this worker left to the collector
    before = open_descriptors()
    for _ in range(3):
        left, right = make_pair("unix")
        assert left.try_send(bytes(LIMIT))
        with contextlib.suppress(GaveUp):
            right.recv(timeout=0)
        del left, right
    gc.collect()
    assert open_descriptors() == before

    class Held:
        def fail(self, *_: object) -> BaseException:
            return ValueError()

    # A cycle through `fail` is found by the collector.
    mine, theirs = socket.socketpair()
    held = Held()
    held.link = _native.StreamLink(mine.detach(), theirs.fileno(), held.fail, refuse_fork, 1, 0, True, Wait, held, None)
    ref = weakref.ref(held.link)
    theirs.detach()
    del held
    gc.collect()
    assert ref() is None
    assert open_descriptors() == before


# -- peers of another make


def test_a_glance_takes_nothing(raw) -> None:
    link, peer = raw
    assert link.try_glance(5) is None
    peer.send(b"\0\0\0")
    assert link.try_glance(5) is None
    peer.send(b"\1xrest")
    assert link.try_glance(5) == link.try_glance(5) == b"\0\0\0\1x"
    assert link.try_recv() == b"x"
    peer.send(b"\xff\xff\xff\xff")
    with gives_up("PROTOCOL"):
        link.try_glance(5)


def test_a_glance_hears_the_end(raw) -> None:
    link, peer = raw
    peer.send(b"\xff\xff\xff\xff")
    with gives_up("GOODBYE"):
        link.try_glance(5)
    with pytest.raises(ValueError, match="64"):
        link.try_glance(65)


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\0", b"\0\1\0\0", b"\0\0\0\1"])
def test_a_glance_hears_an_end_that_comes_too_soon(raw, sent: bytes) -> None:
    link, peer = raw
    peer.send(sent)
    peer.shutdown(socket.SHUT_WR)
    with gives_up("ENDED"):
        link.try_glance(5)


@pytest.mark.parametrize("size", [3, 100, 5000, 300_000, LIMIT + 3])
def test_a_header_that_the_length_does_not_count(raw, size: int) -> None:
    link, peer = raw
    peer.setblocking(True)
    link.reframe(2, 3)
    body = os.urandom(size)
    sent = struct.pack(">I", size - 3) + body

    def send() -> None:
        link.send(body, 10)
        link.send_many([body], 10)

    with background(send):
        got = b""
        while len(got) < 2 * len(sent):
            got += peer.recv(1 << 16)
    assert got == 2 * sent
    said = os.urandom(size - 1)
    with background(lambda: peer.sendall(struct.pack(">I", size - 3) + said)):
        assert link.recv(10) == said
    with pytest.raises(ValueError, match="shorter than its header"):
        link.try_send(b"xx")
    link.close()
    assert peer.recv(10) == b""  # such a peer would take a goodbye for a length
