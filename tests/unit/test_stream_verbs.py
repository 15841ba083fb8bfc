"""StreamLink's blocking calls: what is left of a send, signals in their midst, time, and several threads."""

import os
import select
import signal
import threading
import time
from typing import Any

import pytest

from ipckit._spi import Want

from .stream_links import (
    LIMIT,
    GaveUp,
    background,
    both_ends,  # noqa: F401 - fixtures
    fill,
    gives_up,
    make_pair,
)

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
    accepted: list[bytes] = []

    def until_it_gives_up(payload: bytes) -> str:
        while True:
            try:
                left.send(payload, timeout=0.02)
            except GaveUp as why:
                accepted.extend([payload] if why.reason == "UNKNOWN" else [])
                return why.reason
            accepted.append(payload)

    assert until_it_gives_up(os.urandom(LIMIT)) in {"UNKNOWN", "TIMED_OUT"}
    while until_it_gives_up(b"next") != "TIMED_OUT":  # TCP may make room a little later
        pass
    assert left.counters()[0] == len(accepted)
    with background(lambda: left.send(b"last", timeout=5)):
        check(right, [*accepted, b"last"])


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
