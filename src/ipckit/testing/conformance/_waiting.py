"""Who waits, for what, how long; and that whatever ends a wait loses nothing."""

from __future__ import annotations

import asyncio
import random
import select
import time
from contextlib import suppress
from typing import Any

import pytest

from ipckit import Capabilities, errors
from ipckit._spi import Link, Wait, Want

from ._base import Contract, Meeting, raises, with_options
from ._parties import HANG, Local, Party, in_thread
from ._programs import collect_until, echo, echo_uneven, fill, payload, ping, send_all

_CHUNK = 8192
#: Bytes that may be on their way before a sender has to wait: socket buffers grow to several MiB.
_ENOUGH = 64 << 20

#: For what threads do not have: cancellation, tasks.
only_async = pytest.mark.parametrize("shell", ["async"], indirect=True)


class WaitingContracts(Contract):
    # -- backpressure ----------------------------------------------------------------------------------------------

    def test_backpressure(self, ends: Meeting, capabilities: Capabilities) -> None:
        """With nobody receiving, a sender waits, within bounds; what was taken arrives, in order, each once."""
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, _CHUNK)
        taken, uncertain = ends.here.run(fill, size, _ENOUGH // size).result(HANG * 2)
        receiving = ends.there.run(collect_until, b"last")
        ends.here.send(b"last", 20)
        got = [int.from_bytes(message[:8], "big") for message in receiving.result(HANG)]
        if uncertain and capabilities.broker and got == list(range(taken - 1)):
            return  # a broker that never confirmed a message may never have had it
        assert got == list(range(taken))

    def test_backpressure_ends(self, ends: Meeting, capabilities: Capabilities) -> None:
        """A blocked sender goes on as soon as there is room."""
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, _CHUNK)
        taken, _ = ends.here.run(fill, size, _ENOUGH // size).result(HANG * 2)
        sending = ends.here.start("send", b"last", 20)
        time.sleep(0.05)
        got = ends.there.run(collect_until, b"last").result(HANG)
        sending.result(HANG)
        assert len(got) in (taken, taken - 1)

    def test_small_messages_are_bounded_too(self, near: Meeting, capabilities: Capabilities) -> None:
        """Empty messages take room: a sender of nothing cannot fill the memory."""
        self.needs(capabilities.reliable, "reliable")
        sending = near.here.start("send_many", [b""] * 3_000_000, 0.5)
        try:
            assert sending.result(HANG) < 3_000_000
        except errors.Timeout:
            pass
        finally:
            near.here.close()

    # -- timeouts --------------------------------------------------------------------------------------------------

    def test_timeouts(self, near: Meeting) -> None:
        """Typed, and never early; 0 tries."""
        for timeout in (0, 0.001, 0.15):
            start = time.monotonic()
            error = raises(errors.Timeout, lambda timeout=timeout: near.here.recv(timeout))  # type: ignore[misc]
            assert time.monotonic() - start >= timeout
            assert isinstance(error, TimeoutError)
            assert error.operation == "recv"

    @pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), (float("nan"), ValueError), ("1", TypeError)])
    def test_what_is_no_timeout(self, timeout: Any, error: type[Exception], near: Meeting) -> None:
        for call in (lambda: near.here.recv(timeout), lambda: near.here.send(b"not sent", timeout)):
            with pytest.raises(error):
                call()
        near.here.send(b"sent")
        assert near.there.recv() == b"sent"

    def test_zero_takes_what_is_there(self, near: Meeting) -> None:
        near.there.send(b"here")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with suppress(errors.Timeout):
                assert near.here.recv(0) == b"here"
                return
        raise AssertionError("recv(timeout=0) never saw a message that was there")

    def test_send_timeout(self, near: Meeting, capabilities: Capabilities) -> None:
        """Never early either, however often; 0 tries."""
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, _CHUNK)
        for timeout in (0.15, 0, 0.001):
            near.here.run(fill, size, _ENOUGH // size, timeout).result(HANG * 2)

    def test_long_timeout(self, near: Meeting) -> None:
        """A timeout of a thousand years is a timeout."""
        receiving = near.here.start("recv", 1e10)
        time.sleep(0.02)
        near.there.send(b"soon")
        assert receiving.result(HANG) == b"soon"

    def test_timeout_loses_nothing(self, near: Meeting) -> None:
        """Receiving with short timeouts, again and again, while messages come."""
        lengths = [number % 200 for number in range(150)]
        sending = near.there.run(send_all, lengths)
        received = near.here.run(_recv_impatiently, lengths, 1).result(HANG)
        sending.result(HANG)
        assert received == len(lengths)

    # -- sleeping and waking ---------------------------------------------------------------------------------------

    def test_wakes(self, ends: Meeting) -> None:
        """A receiver that sleeps wakes for a message."""
        for number in range(5):
            receiving = ends.here.start("recv", 20)
            time.sleep(0.02)
            ends.there.send(payload(number, 10))
            assert receiving.result(HANG) == payload(number, 10)

    def test_armed_before_data(self, near: Meeting) -> None:
        """By hand, on the link: data that comes after `arm` makes its Wait ready."""
        link = near.here.handle._link
        for number in range(20):
            assert link.try_recv() is None
            wait = link.arm(Want.RECV)
            assert link.try_recv() is None
            near.there.send(payload(number, 100))
            assert _recv_by_hand(link, wait) == payload(number, 100)

    def test_data_between_try_and_arm(self, near: Meeting) -> None:
        """By hand: data that came between the first try and `arm` is found by the second try, or makes the Wait ready."""
        link = near.here.handle._link
        for number in range(20):
            assert link.try_recv() is None
            near.there.send(payload(number, 100))
            if number % 2:
                time.sleep(0.002)
            wait = link.arm(Want.RECV)
            got = link.try_recv()
            assert (got if got is not None else _recv_by_hand(link, wait)) == payload(number, 100)

    def test_armed_before_room(self, near: Meeting, capabilities: Capabilities) -> None:
        """By hand: room that comes after `arm` makes its Wait ready."""
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, _CHUNK)
        link = near.here.handle._link
        taken = 0
        deadline = time.monotonic() + 20
        quiet = 0
        while quiet < 20 and time.monotonic() < deadline:  # what is on its way may still move on
            if link.try_send(bytes(size)):
                taken, quiet = taken + 1, 0
            else:
                quiet += 1
                _sleep_on(link.arm(Want.SEND), 0.005)
        assert quiet, "the link takes without end"
        wait = link.arm(Want.SEND)
        while link.try_send(bytes(size)):
            taken += 1
            wait = link.arm(Want.SEND)
        draining = near.there.run(collect_until, b"last")
        while not link.try_send(b"last"):
            assert _sleep_on(wait, 10), "there is room, and the Wait does not say so"
            wait = link.arm(Want.SEND)
        while not link.try_flush():
            _sleep_on(link.arm(Want.SEND), 0.1)
        assert len(draining.result(HANG)) == taken

    @pytest.mark.parametrize("seed", [1, 2])
    def test_no_wake_up_is_lost(
        self, seed: int, here: Local, there: Party, url: str, capabilities: Capabilities, options: frozenset[str]
    ) -> None:
        """Round trips at random tiny intervals, without spinning where that can be told, so that both sides race to sleep."""
        self.needs(capabilities.reliable, "reliable")
        ends = self.meet(here, there, with_options(url, spin=0) if "spin" in options else url, capabilities)
        echoing = ends.there.run(echo_uneven, seed)
        assert ends.here.run(ping, 150 if capabilities.broker else 600, seed).result(HANG)
        ends.here.close()
        echoing.result(HANG)

    def test_second_receiver_waits_its_turn(self, near: Meeting) -> None:
        """Two receivers on one channel: each message goes to one of them, and a timeout holds for who waits in line too."""
        first = near.here.start("recv", 20)
        time.sleep(0.02)
        start = time.monotonic()
        raises(errors.Timeout, lambda: near.here.recv(0.1))
        assert time.monotonic() - start >= 0.1
        second = near.here.start("recv", 20)
        near.there.send(b"a")
        near.there.send(b"b")
        assert sorted([first.result(HANG), second.result(HANG)]) == [b"a", b"b"]

    # -- close wakes -------------------------------------------------------------------------------------------------

    def test_close_wakes_receiver(self, near: Meeting) -> None:
        waiting = [near.here.start("recv", 20) for _ in range(2)]
        time.sleep(0.05)
        near.here.close()
        for future in waiting:
            raises(errors.Closed, lambda future=future: future.result(HANG))  # type: ignore[misc]

    def test_close_wakes_sender(self, near: Meeting, capabilities: Capabilities) -> None:
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, _CHUNK)
        waiting = near.here.start("send_many", [bytes(size)] * (_ENOUGH // size), 20)
        time.sleep(0.2)
        near.here.close()
        raises(errors.Closed, lambda: waiting.result(HANG))

    def test_close_wakes_accept(self, here: Local, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        waiting = listener.start("accept", 20)
        time.sleep(0.05)
        listener.close()
        raises(errors.Closed, lambda: waiting.result(HANG))

    # -- cancellation ------------------------------------------------------------------------------------------------

    @only_async
    def test_cancelled_receive(self, ends: Meeting, capabilities: Capabilities) -> None:
        """Cancelled at random points, again and again: every message still comes, once, in order."""
        self.needs(capabilities.reliable and capabilities.ordered, "reliable and ordered")
        lengths = [number % 3000 for number in range(250)]
        sending = ends.there.run(send_all, lengths)
        assert ends.here.run(_recv_cancelled, lengths, 3).result(HANG) == len(lengths)
        sending.result(HANG)

    @only_async
    def test_cancelled_send(self, ends: Meeting, capabilities: Capabilities) -> None:
        """A cancelled send has sent its message whole, or not at all; the others are not touched."""
        self.needs(capabilities.reliable and capabilities.ordered, "reliable and ordered")
        size = self.largest(capabilities, 60_000)
        receiving = ends.there.run(collect_until, b"last", 20, 0.0005)
        finished = ends.here.run(_send_cancelled, 120, size, 5).result(HANG)
        got = [int.from_bytes(message[:4], "big") for message in receiving.result(HANG)]
        assert got == sorted(set(got)), "out of order, or twice"
        assert set(finished) <= set(got), "lost"

    @only_async
    def test_cancelled_accept_and_connect(
        self, here: Local, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """A cancelled connect has left nothing that a later one would meet."""
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        listener.run(_cancel, "accept", [0, 0.001, 0.02]).result(HANG)
        neighbour.run(_cancel_connect, listener.url, [0, 0.0002, 0.001, 0.005, 0.02]).result(HANG)
        connecting = neighbour.open("connect", listener.url, timeout=20)
        identity = in_thread(lambda: connecting.result(HANG).send(b"it is me"))
        while True:
            channel = listener.accept(20)
            with suppress(errors.PeerError):
                assert channel.recv(20) == b"it is me"
                break
        identity.result(HANG)

    @only_async
    def test_many_tasks(self, near: Meeting) -> None:
        """Both directions from many tasks of one loop, on one channel."""
        echoing = near.there.run(echo)
        near.here.run(_task_group, 20).result(HANG)
        near.here.close()
        assert echoing.result(HANG) == 20

    @only_async
    def test_channels_come_and_go_on_one_loop(
        self, here: Local, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """Descriptors are numbers that come back: what the loop kept of a closed channel must not meet the next one."""
        for number in range(8):
            ends = self.meet(here, neighbour, f"{url}", capabilities)
            waiting = ends.here.start("recv", 20)
            ends.there.send(payload(number, 30))
            assert waiting.result(HANG) == payload(number, 30)
            if number % 2:
                ends.there.close()
                raises(errors.PeerClosed, ends.here.recv)
            ends.here.close()
            ends.there.close()
            if ends.listener is not None:
                ends.listener.close()


def _sleep_on(wait: Wait, seconds: float) -> bool:
    """What the drivers do: sleep until the Wait is ready. False: it was not, in that time."""
    poll = select.poll()
    for fd, events in wait.fds:
        poll.register(fd, events)
    limit = seconds if wait.at_most is None else min(seconds, wait.at_most)
    return bool(poll.poll(limit * 1000)) or wait.at_most is not None


def _recv_by_hand(link: Link, wait: Wait) -> bytes:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        assert _sleep_on(wait, 10), "a message is there, and the Wait does not say so"
        frame = link.try_recv()
        if frame is not None:
            return frame
        wait = link.arm(Want.RECV)  # ready for nothing: allowed
        if (frame := link.try_recv()) is not None:
            return frame
    raise AssertionError("the message never came")


async def _recv_impatiently(end: Any, lengths: list[int], seed: int) -> int:
    dice = random.Random(seed)
    for number, length in enumerate(lengths):
        while True:
            with suppress(errors.Timeout):
                assert await end.recv(dice.choice([0, 1e-5, 1e-4, 1e-3])) == payload(number, length)
                break
    return len(lengths)


async def _recv_cancelled(end: Any, lengths: list[int], seed: int) -> int:
    dice = random.Random(seed)
    for number, length in enumerate(lengths):
        while True:
            task = asyncio.create_task(end.recv())
            if dice.random() < 0.5:
                for _ in range(dice.randint(0, 3)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(dice.choice([0.0001, 0.001]))
            task.cancel()
            with suppress(asyncio.CancelledError):
                assert await task == payload(number, length)
                break
    return len(lengths)


async def _send_cancelled(end: Any, count: int, size: int, seed: int) -> list[int]:
    """Number and send; cancel most; the numbers of those that returned."""
    dice = random.Random(seed)
    finished = []
    for number in range(count):
        message = number.to_bytes(4, "big") + bytes(dice.randint(0, size - 4))
        try:
            async with asyncio.timeout(dice.choice([0, 0.0001, 0.001, 5])):
                await end.send(message)
        except TimeoutError:
            continue
        finished.append(number)
    await end.send(b"last")
    return finished


async def _cancel(end: Any, verb: str, delays: list[float]) -> None:
    for delay in delays:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await getattr(end, verb)()


async def _cancel_connect(url: str, delays: list[float]) -> None:
    import ipckit.aio

    for delay in delays:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await (await ipckit.aio.connect(url)).close()


async def _task_group(end: Any, count: int) -> None:
    async with asyncio.TaskGroup() as group:
        receiving = [group.create_task(end.recv(10)) for _ in range(count)]
        for number in range(count):
            group.create_task(end.send(bytes([number]), 10))
    assert sorted(task.result() for task in receiving) == [bytes([number]) for number in range(count)]
