# ruff: noqa: PT012 - what raises at the end of a block is what these tests are about
"""loan() and borrow(): frames in place, and what becomes of views that outlive their block."""

import gc
import threading

import numpy as np
import pytest

import ipckit
from ipckit import errors


@pytest.fixture
def ends():
    left, right = ipckit.pair("shm://claims?size=64KiB")
    with left, right:
        yield left, right


def test_a_loan_is_sent_at_the_end_of_its_block(ends):
    left, right = ends
    with left.loan(5) as view:
        assert not view.readonly
        assert len(view) == 5
        view[:] = b"hello"
        with pytest.raises(errors.Timeout):
            right.recv(timeout=0)
    assert right.recv(timeout=0) == b"hello"
    assert left.stats().messages_sent == right.stats().messages_received == 1
    with pytest.raises(ValueError, match="released"):
        view[0] = 1


def test_an_exception_takes_a_loan_back(ends):
    left, right = ends
    with pytest.raises(ZeroDivisionError), left.loan(5) as view:
        view[:] = b"oops!"
        raise ZeroDivisionError
    left.send(b"next")
    assert right.recv(timeout=0) == b"next"


def test_a_loan_that_is_never_entered_is_nothing(ends):
    left, right = ends
    left.loan(5)
    left.send(b"next")
    assert right.recv(timeout=0) == b"next"


def test_loans_of_every_size_up_to_the_ring(ends):
    left, right = ends
    for size in (0, 1, 4096, 40_000, (64 << 10) - 8):
        with left.loan(size, timeout=1) as view:
            view[:] = bytes([size % 251]) * size
        with right.borrow(timeout=1) as view:
            assert view.readonly
            assert bytes(view) == bytes([size % 251]) * size
    with pytest.raises(errors.MessageTooLarge):
        left.loan(64 << 10)
    with pytest.raises(ValueError, match="negative"):
        left.loan(-1)


def test_an_array_is_written_and_read_in_place(ends):
    left, right = ends
    with left.loan(8 * 1000) as view:
        array = np.frombuffer(view, dtype=np.float64)
        array[:] = np.arange(1000)
        del array
    with right.borrow() as view:
        array = np.frombuffer(view, dtype=np.float64)
        assert not array.flags.writeable
        assert array.sum() == 499500
        del array


@pytest.mark.parametrize("keep", [lambda view: view[1:3], lambda view: np.frombuffer(view, np.uint8), memoryview])
def test_a_view_that_outlives_its_loan_unsends_it(ends, keep):
    left, right = ends
    with pytest.raises(BufferError, match="not sent"), left.loan(8) as view:
        kept = keep(view)
    with pytest.raises(errors.Timeout):
        left.send(b"the lane is still the loan's", timeout=0.01)
    np.asarray(kept)[:] = 7  # valid, and nobody's
    del kept, view
    gc.collect()
    left.send(b"next", timeout=1)
    assert right.recv(timeout=1) == b"next"


@pytest.mark.parametrize("keep", [lambda view: view[1:3], lambda view: np.frombuffer(view, np.uint8)[1:3]])
def test_a_view_that_outlives_its_borrow_keeps_the_memory(ends, keep):
    left, right = ends
    left.send(b"abcdefgh")
    with pytest.raises(BufferError, match="outlives"), right.borrow() as view:
        kept = keep(view)
    sent = 0
    for _ in range(200):  # far more than the ring holds
        try:
            left.send(b"x" * 1000, timeout=0)
            sent += 1
        except errors.Timeout:
            break
    assert sent < 70, "the memory of the borrow was given away"
    assert [len(frame) for frame in right.recv_many(100)] == [1000] * sent, "receiving goes on"
    with pytest.raises(errors.Timeout):
        for _ in range(100):
            left.send(b"x" * 1000, timeout=0)
    assert bytes(kept) == b"bc"
    del kept, view
    gc.collect()
    left.send(b"x" * 1000, timeout=1)


def test_views_outlive_even_the_channel(ends):
    left, right = ends
    left.send(b"abcdefgh")
    with pytest.raises(BufferError), right.borrow() as view:
        kept = view[2:]
    with pytest.raises(BufferError), left.loan(8) as view:
        kept_loan = view[2:]
    right.close()
    left.close()
    del left, right, view
    gc.collect()
    assert bytes(kept) == b"cdefgh"
    kept_loan[:] = b"123456"
    assert bytes(kept_loan) == b"123456"


def test_the_error_of_a_block_wins_over_a_kept_view(ends):
    left, right = ends
    left.send(b"abc")
    with pytest.raises(ZeroDivisionError), right.borrow() as view:
        kept = view[1:]
        raise ZeroDivisionError
    assert bytes(kept) == b"bc"


def test_borrows_may_overlap(ends):
    left, right = ends
    for n in range(3):
        left.send(b"%d" % n)
    with right.borrow() as first, right.borrow() as second:
        assert right.recv(timeout=0) == b"2"
        assert bytes(first) + bytes(second) == b"01"
    for _ in range(500):
        left.send(b"x" * 1000, timeout=1)
        assert len(right.recv(timeout=1)) == 1000


def test_a_borrow_that_is_never_entered_loses_nothing(ends):
    left, right = ends
    left.send(b"first")
    left.send(b"second")
    right.borrow()
    assert right.stats().messages_received == 0
    assert right.recv(timeout=0) == b"first"
    assert right.recv(timeout=0) == b"second"


def test_a_frame_that_streamed_can_be_borrowed(ends):
    left, right = ends
    large = bytes(range(256)) * 1000
    sender = threading.Thread(target=left.send, args=(large,))
    sender.start()
    try:
        with right.borrow(timeout=10) as view:
            assert view.readonly
            assert view == large
    finally:
        sender.join()
    left.send(b"next")
    assert right.recv(timeout=0) == b"next"


def test_a_claim_is_good_for_one_block(ends):
    left, right = ends
    loan = left.loan(3)
    with loan as view:
        view[:] = b"abc"
    with pytest.raises(ValueError, match="one `with` block"), loan:
        pass
    with pytest.raises(BufferError):
        memoryview(loan)
    assert right.recv(timeout=0) == b"abc"


def test_close_under_an_open_loan_wakes_who_waits_for_the_lane(ends):
    left, right = ends
    outcomes = []

    def wait():
        try:
            left.send(b"waits for the lane", timeout=20)
        except errors.IpcError as error:
            outcomes.append(type(error))

    with pytest.raises(errors.Closed), left.loan(5) as view:
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.05)
        left.close()
        waiting.join(10)
        assert not waiting.is_alive()
        view[:] = b"valid"
    assert outcomes == [errors.Closed]
    with pytest.raises(errors.PeerClosed):
        right.recv(timeout=1)


def test_a_loan_to_a_peer_that_left_says_so(ends):
    left, right = ends
    with pytest.raises(errors.PeerClosed), left.loan(5) as view:
        view[:] = b"12345"
        right.close()


def test_a_borrow_that_ends_while_another_thread_receives(ends):
    """Both give memory back; the sender must never see its ring's head go backwards, nor wait for ever."""
    left, right = ends
    large = bytes(range(256)) * 800
    rounds = 150
    wrong = []

    def send():
        try:
            for _ in range(rounds):
                left.send(b"small", timeout=20)
                left.send(large, timeout=20)
        except errors.IpcError as error:
            wrong.append(error)

    def receive():
        try:
            if right.recv(timeout=20) != large:
                wrong.append("torn")
        except errors.IpcError as error:
            wrong.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    for n in range(rounds):
        with right.borrow(timeout=20) as view:
            assert bytes(view) == b"small"
            receiver = threading.Thread(target=receive)
            receiver.start()
            receiver.join(0.0003 * (n % 8))
        receiver.join(20)
        assert not receiver.is_alive()
        assert not wrong, wrong
    sender.join(20)
    assert not sender.is_alive()
    assert not wrong, wrong
