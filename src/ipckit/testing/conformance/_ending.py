"""How it ends: we close, they close, they are killed, they only pause, we fork, we are interrupted. Each has its own name."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import ipckit
import ipckit.aio
from ipckit import Capabilities, errors

from ._base import SLACK, Contract, Meeting, eventually, raises
from ._parties import HANG, Local, ShellName, shell_of
from ._process import Process, Remote
from ._programs import echo, fork_idle, interrupted, payload, send_all, used_in_child


class EndingContracts(Contract):
    # -- we close --------------------------------------------------------------------------------------------------

    def test_after_close(self, near: Meeting, capabilities: Capabilities) -> None:
        near.here.close()
        near.here.close()
        assert near.here.handle.closed
        assert "closed" in repr(near.here.handle)
        calls: list[tuple[Any, ...]] = [("send", b"x"), ("recv", 1), ("recv", 0), ("recv_into", bytearray(9), 1)]
        calls += [("send_many", [b"x"], 1), ("recv_many", 3, 1), ("fileno",)]
        for verb, *args in calls:
            raises(errors.Closed, partial(near.here.call, verb, *args))
        if near.listener is not None:
            near.listener.close()
            near.listener.close()
            raises(errors.Closed, partial(near.listener.call, "accept", 1))

    def test_sent_before_close_arrives(self, ends: Meeting, capabilities: Capabilities) -> None:
        """Close is immediate, and takes nothing back."""
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, 1500)
        ends.there.run(send_all, [size] * 5).result(HANG)
        ends.there.close()
        time.sleep(0.05)
        for number in range(5):
            assert ends.here.recv() == payload(number, size)
        raises(errors.PeerClosed, ends.here.recv)

    def test_accepted_channel_outlives_listener(self, ends: Meeting, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        assert ends.listener is not None
        ends.listener.close()
        ends.there.send(b"still")
        assert ends.here.recv() == b"still"
        ends.here.send(b"here")
        assert ends.there.recv() == b"here"

    # -- they close ------------------------------------------------------------------------------------------------

    def test_peer_closed(self, ends: Meeting) -> None:
        """First what it had sent, then PeerClosed, at every call; sending says the same."""
        for number in range(3):
            ends.there.send(payload(number, 50))
        ends.there.close()
        for number in range(3):
            assert ends.here.recv() == payload(number, 50)
        for _ in range(2):
            error = raises(errors.PeerClosed, ends.here.recv)
            assert isinstance(error, ConnectionError)
            raises(errors.PeerClosed, lambda: ends.here.recv(0))
            raises(errors.PeerClosed, lambda: ends.here.send(b"x"))
        ends.here.close()
        raises(errors.Closed, ends.here.recv)

    def test_peer_closed_with_messages_unread(self, ends: Meeting, capabilities: Capabilities) -> None:
        """A peer that closes without having read all that was sent to it has still closed in order, and its words count."""
        self.needs(capabilities.reliable, "reliable")
        for number in range(5):
            ends.here.send(payload(number, 500))
        for number in range(3):
            ends.there.send(payload(number, 500))
        ends.there.close()
        time.sleep(0.05)
        for number in range(3):
            assert ends.here.recv() == payload(number, 500)
        raises(errors.PeerClosed, ends.here.recv)

    def test_sending_to_a_closed_peer(self, ends: Meeting) -> None:
        """Without receiving, too, the sender hears that it was a close, and not a death."""
        ends.there.close()

        def until_it_hears() -> None:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                ends.here.send(b"x", 1)
                time.sleep(0.01)

        raises(errors.PeerClosed, until_it_hears)

    def test_peer_close_wakes(self, ends: Meeting) -> None:
        receiving = ends.here.start("recv", 20)
        time.sleep(0.05)
        ends.there.close()
        raises(errors.PeerClosed, lambda: receiving.result(HANG))

    def test_iteration_ends(self, ends: Meeting) -> None:
        for number in range(5):
            ends.there.send(bytes([number]))
        ends.there.close()
        assert ends.here.run(_listed).result(HANG) == [bytes([number]) for number in range(5)]

    def test_with_blocks(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        ends = self.meet(here, neighbour, url, capabilities)
        ends.here.run(_in_with_block).result(HANG)
        assert ends.here.handle.closed
        assert ends.there.recv() == b"from the block"
        raises(errors.PeerClosed, ends.there.recv)

    # -- they are killed -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("role", ["killed client", "killed server"])
    def test_peer_killed(
        self, role: str, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """First what it had committed, then PeerDied, at every call, within the declared bound."""
        self.needs(capabilities.death != "unreported", "death")
        if role == "killed server":
            self.needs(capabilities.listen, "listen")
            listener = spawned.open("listen", url, timeout=10).result(HANG)
            accepting = spawned.accept(listener, 10)
            mine = here.open("connect", listener.url, timeout=10).result(HANG)
            theirs = accepting.result(HANG)
        else:
            _, mine, theirs = self.meet(here, spawned, url, capabilities)
        count = 5 if capabilities.reliable else 0
        for number in range(count):
            theirs.send(payload(number, 300))
        if not capabilities.handed_over:
            time.sleep(0.05)
        pid = process.pid
        process.kill()
        start = time.monotonic()
        for number in range(count):
            assert mine.recv() == payload(number, 300)
        bound = capabilities.death_bound + SLACK
        error = raises(errors.PeerDied, lambda: mine.recv(bound))
        assert time.monotonic() - start < bound
        assert isinstance(error, ConnectionError)
        if capabilities.peer_credentials:
            assert isinstance(error, errors.PeerDied)
            assert error.pid == pid
        raises(errors.PeerDied, lambda: mine.recv(0))
        raises(errors.PeerDied, lambda: mine.send(b"x", 5))

    def test_death_wakes(self, far: Meeting, process: Process, capabilities: Capabilities) -> None:
        self.needs(capabilities.death != "unreported", "death")
        receiving = far.here.start("recv", capabilities.death_bound + SLACK)
        time.sleep(0.05)
        process.kill()
        raises(errors.PeerDied, lambda: receiving.result(HANG))

    def test_death_with_messages_unread(self, far: Meeting, process: Process, capabilities: Capabilities) -> None:
        """Killed before it read what was sent to it: its own words still come first."""
        self.needs(capabilities.death != "unreported", "death")
        self.needs(capabilities.reliable, "reliable")
        for number in range(5):
            far.here.send(payload(number, 500))
        for number in range(3):
            far.there.send(payload(number, 500))
        time.sleep(0.05)
        process.kill()
        for number in range(3):
            assert far.here.recv() == payload(number, 500)
        raises(errors.PeerDied, lambda: far.here.recv(capabilities.death_bound + SLACK))

    def test_paused_is_not_dead(self, far: Meeting, process: Process, capabilities: Capabilities) -> None:
        """A peer that stands still for a second is waited for."""
        echoing = far.there.run(echo)
        process.signal(signal.SIGSTOP)
        try:
            raises(errors.Timeout, lambda: far.here.recv(1.0))
        finally:
            process.signal(signal.SIGCONT)
        far.here.send(b"are you there?", 20)
        assert far.here.recv(20) == b"are you there?"
        far.here.close()
        echoing.result(HANG)

    # -- fork, Ctrl-C, the collector -------------------------------------------------------------------------------

    def test_forked_child_is_refused(
        self, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """A forked child gets ForkedError; what it does to its copies does not reach the peer."""
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        connecting = spawned.open("connect", listener.url, timeout=10)
        mine = listener.accept()
        theirs = connecting.result(HANG)
        blocked = theirs.start("recv", 20)  # a thread that the child does not have is inside the channel
        time.sleep(0.05)
        assert spawned.on_main_thread(used_in_child, theirs).result(HANG) == ["recv: ForkedError", "send: ForkedError"]
        raises(errors.Timeout, lambda: mine.recv(0.1))
        mine.send(b"the parent's")
        assert blocked.result(HANG) == b"the parent's"
        theirs.send(b"and back")
        assert mine.recv() == b"and back"

    def test_forked_child_leaves_the_name(
        self, here: Local, spawned: Remote, url: str, capabilities: Capabilities
    ) -> None:
        self.needs(capabilities.listen, "listen")
        listener = spawned.open("listen", url, timeout=10).result(HANG)
        assert spawned.on_main_thread(used_in_child, listener).result(HANG) == ["accept: ForkedError"]
        accepting = spawned.accept(listener, 10)
        mine = here.open("connect", listener.url, timeout=10).result(HANG)
        accepting.result(HANG).send(b"it is still there")
        assert mine.recv() == b"it is still there"

    def test_child_does_not_keep_the_connection(
        self, far: Meeting, spawned: Remote, process: Process, capabilities: Capabilities
    ) -> None:
        """The death of a process that has forked is heard, though its child lives and has all its descriptors."""
        self.needs(capabilities.death != "unreported", "death")
        far.there.send(b"mine")  # an unused end may pass to a child (pipe://)
        assert far.here.recv() == b"mine"
        child = spawned.on_main_thread(fork_idle).result(HANG)
        try:
            process.kill()
            raises(errors.PeerDied, lambda: far.here.recv(capabilities.death_bound + SLACK))
        finally:
            os.kill(child, signal.SIGKILL)

    @pytest.mark.parametrize("verb", ["recv", "accept"])
    def test_ctrl_c(
        self, verb: str, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """A blocked call ends with KeyboardInterrupt, and the process lives to tell."""
        if verb == "accept":
            self.needs(capabilities.listen, "listen")
            end = spawned.open("listen", url, timeout=10).result(HANG)
        else:
            end = self.meet(here, spawned, url, capabilities).there
        assert spawned.on_main_thread(interrupted, end, verb).result(HANG) == "KeyboardInterrupt"

    def test_unclosed_is_told(self, url: str, shell: ShellName, capabilities: Capabilities) -> None:
        """An endpoint that is dropped without a close warns, and is closed."""
        self.needs(capabilities.pair or capabilities.listen, "listen")
        with pytest.warns(ResourceWarning, match="unclosed"):
            _drop(url, shell, "listen" if capabilities.listen else "pair")
        if capabilities.listen:
            ipckit.listen(url, timeout=10).close()

    def test_nothing_leaks(self, url: str, shell: ShellName, capabilities: Capabilities) -> None:
        """Open, use and close leave no descriptor and no thread behind."""

        def once() -> None:
            here, there = Local(shell_of(shell)), Local(shell_of(shell))
            with contextlib.closing(here), contextlib.closing(there):
                ends = self.meet(here, there, url, capabilities)
                receiving = ends.here.start("recv", 20)
                ends.there.send(b"hello", 20)
                assert receiving.result(HANG) == b"hello"
                raises(errors.Timeout, lambda: ends.here.recv(0.001))

        _settles(once, 8)

    def test_failures_do_not_leak(self, url: str, shell: ShellName, here: Local, capabilities: Capabilities) -> None:
        """A connect that finds nobody, and a listen that finds the name taken, leave nothing either."""
        self.needs(capabilities.listen, "listen")

        def fail() -> None:
            raises(errors.NothingListening, lambda: here.open("connect", url, timeout=0.02).result(HANG))
            listener = here.open("listen", url, timeout=10).result(HANG)
            raises(errors.AddressInUse, lambda: here.open("listen", listener.url, timeout=1).result(HANG))
            listener.close()

        _settles(fail, 5)


def _settles(visit: Callable[[], None], count: int) -> None:
    """So many visits leave no descriptor and no thread that was not there before them.

    Libraries keep a few for good, and take them when it suits them, not at the first visit. So those who have left something are
    asked again: what grows with every `count` visits leaks.
    """
    for _ in range(2):
        visit()
    left = [_left(visit, count)]
    while left[-1] and len(left) < 4:
        left.append(_left(visit, count))
    assert not left[-1], left


def _left(visit: Callable[[], None], count: int) -> str:
    gc.collect()
    threads, descriptors = threading.active_count(), _descriptors()
    for _ in range(count):
        visit()
    gc.collect()
    if eventually(lambda: threading.active_count() <= threads and len(_descriptors()) <= len(descriptors), 5):
        return ""
    return f"{threading.active_count() - threads} threads, {sorted(_descriptors().items() - descriptors.items())}"


def _descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


async def _listed(end: Any) -> list[bytes]:
    return [message async for message in end]


async def _in_with_block(end: Any) -> None:
    async with end:
        await end.send(b"from the block")


def _drop(url: str, shell: ShellName, verb: str) -> None:
    if shell == "async":
        asyncio.run(getattr(ipckit.aio, verb)(url))
    else:
        getattr(ipckit, verb)(url)
    gc.collect()
