"""How StreamLinks end: goodbyes, resets, descriptors that are taken over, forks, and what is left in memory."""

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import struct
import weakref
from typing import Any

import pytest

from ipckit import _native
from ipckit._spi import Wait

from .stream_links import (  # noqa: F401 - fixtures
    LIMIT,
    GaveUp,
    both_ends,
    frame,
    gives_up,
    make,
    make_pair,
    one_end,
    open_descriptors,
    refuse_fork,
)

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
