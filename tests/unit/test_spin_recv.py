"""spin_recv: try_recv for somebody who is about to sleep, on every link that can spin."""

import threading

import pytest

import ipckit
from ipckit import errors
from ipckit._spi import Spinning


@pytest.fixture(params=["unix://", "shm://", "unix://?spin=0", "shm://?spin=0", "unix://?spin=1s", "shm://?spin=1s"])
def pair(request):
    left, right = ipckit.pair(request.param)
    with left, right:
        yield left, right


def test_nothing_there_is_none_and_again(pair):
    left, _ = pair
    assert isinstance(left._link, Spinning)
    assert [left._link.spin_recv() for _ in range(200)] == [None] * 200


def test_what_is_there_comes_in_order_then_the_end(pair):
    left, right = pair
    right.send_many([b"one", b"", b"x" * 100_000])
    right.close()
    assert [left._link.spin_recv() for _ in range(3)] == [b"one", b"", b"x" * 100_000]
    for _ in range(2):
        with pytest.raises(errors.PeerClosed):
            left._link.spin_recv()
    left.close()
    with pytest.raises(errors.Closed):
        left._link.spin_recv()


def test_it_does_not_wait_for_a_thread_that_receives(pair):
    left, right = pair
    got = []
    thread = threading.Thread(target=lambda: got.append(left.recv(timeout=20)))
    thread.start()
    left._link.spin_recv()  # whoever has the lane, this returns
    right.send_many([b"one", b"two"])
    thread.join(20)
    assert got == [b"one"]
    assert left.recv(timeout=20) == b"two"


def test_a_message_that_comes_while_it_looks_is_found(pair):
    left, right = pair
    rounds = 300

    def echo():
        for _ in range(rounds):
            right.send(right.recv(timeout=20))

    thread = threading.Thread(target=echo)
    thread.start()
    for number in range(rounds):
        left.send(b"%d" % number)
        while (frame := left._link.spin_recv()) is None:
            pass
        assert frame == b"%d" % number
    thread.join(20)
