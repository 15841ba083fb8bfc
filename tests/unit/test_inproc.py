"""What is particular to inproc; the rest is its conformance."""

from __future__ import annotations

import gc
import os
import select
import threading
import weakref
from uuid import uuid4

import pytest

import ipckit
from ipckit import errors
from ipckit._options import read
from ipckit._spi import Want
from ipckit._url import parse
from ipckit.transports.inproc import TRANSPORT, InprocLink, Options


def pair(query: str = "") -> tuple[InprocLink, InprocLink]:
    url = parse("inproc://" + query)
    left, right = TRANSPORT.pair(url, read(Options, url))
    assert isinstance(left, InprocLink)
    assert isinstance(right, InprocLink)
    return left, right


def ready(fds: tuple[tuple[int, int], ...]) -> bool:
    poll = select.poll()
    for fd, events in fds:
        poll.register(fd, events)
    return bool(poll.poll(0))


def test_an_end_that_is_dropped_has_died() -> None:
    """Without a close, as a process that ends without a goodbye; its frames still come first."""
    left, right = pair()
    left.try_send(b"last words")
    wait = right.arm(Want.RECV)
    del left
    gc.collect()
    assert ready(wait.fds)
    assert right.try_recv() == b"last words"
    for action in (right.try_recv, lambda: right.try_send(b"x")):
        with pytest.raises(errors.PeerDied) as caught:
            action()
        assert caught.value.pid == os.getpid()
    right.close()


def test_ends_hold_each_other_by_nothing_but_the_ways() -> None:
    left, right = pair()
    watch = weakref.ref(left)
    del left
    assert watch() is None
    right.close()


def test_the_bell_is_rung_only_for_a_sleeper() -> None:
    left, right = pair()
    first = right.arm(Want.RECV)
    left.try_send(b"a")
    assert ready(first.fds)
    assert right.try_recv() == b"a"
    left.try_send(b"b")
    again = right.arm(Want.RECV)
    assert not ready(again.fds), "what was there before the announcement is for the second try"
    assert right.try_recv() == b"b"
    left.close()
    right.close()


def test_both_wants_at_once() -> None:
    left, right = pair("?capacity=100")
    assert left.try_send(bytes(10))
    assert not left.try_send(bytes(30))
    wait = left.arm(Want.RECV | Want.SEND)
    assert len(wait.fds) == 2
    assert not ready(wait.fds)
    right.try_recv()
    assert ready(wait.fds)
    right.close()
    left.close()


def test_capacity_counts_bytes_and_messages() -> None:
    left, right = pair("?capacity=1KiB")
    assert left.try_send(bytes(900))
    assert not left.try_send(bytes(100))
    right.try_recv()
    taken = 0
    while left.try_send(b""):
        taken += 1
    assert taken == 16
    left.close()
    right.close()


def test_a_frame_above_the_capacity_goes_alone() -> None:
    left, right = pair("?capacity=1KiB")
    assert left.try_send(bytes(5000))
    assert not left.try_send(b"")
    assert right.try_recv() == bytes(5000)
    left.close()
    right.close()


def test_the_smaller_limit_holds() -> None:
    name = uuid4().hex
    with (
        ipckit.listen(f"inproc://{name}?limit=10") as listener,
        ipckit.connect(f"inproc://{name}?limit=1000") as client,
        listener.accept(5) as server,
    ):
        for channel in (client, server):
            with pytest.raises(errors.MessageTooLarge, match="limit of 10"):
                channel.send(bytes(11))


def test_connecting_and_accepting_in_one_thread() -> None:
    name = uuid4().hex
    with (
        ipckit.listen(f"inproc://{name}") as listener,
        ipckit.connect(f"inproc://{name}") as client,
        listener.accept(0) as server,
    ):
        client.send(b"at once")
        assert server.recv(0) == b"at once"


def test_many_threads_meet_at_one_name() -> None:
    """Connects, accepts and a close, all racing: nobody hangs, and who was not accepted hears it."""
    for _ in range(20):
        name = uuid4().hex
        listener = ipckit.listen(f"inproc://{name}")
        outcomes: list[str] = []

        def client(name: str = name, outcomes: list[str] = outcomes) -> None:
            try:
                with ipckit.connect(f"inproc://{name}", timeout=0.2) as channel:
                    channel.send(b"x")
                    channel.recv(5)
                    outcomes.append("served")
            except errors.IpcError as error:
                outcomes.append(type(error).__name__)

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        with listener.accept(5) as channel:
            channel.send(channel.recv(5))
            listener.close()
        for thread in threads:
            thread.join(10)
        assert len(outcomes) == 4
        assert set(outcomes) <= {"served", "PeerClosed", "NothingListening"}
        assert "served" in outcomes


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_the_names_to_itself() -> None:
    name = uuid4().hex
    with ipckit.listen(f"inproc://{name}"):
        child = os.fork()
        if not child:
            status = 1
            try:
                with ipckit.listen(f"inproc://{name}") as listener, ipckit.connect(f"inproc://{name}", timeout=1):
                    listener.accept(1).close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(errors.AddressInUse):
            ipckit.listen(f"inproc://{name}")
