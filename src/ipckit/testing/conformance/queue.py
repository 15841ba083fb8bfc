"""`QueueContract`: each message to one receiver, acknowledged, handed out again when its receiver did not."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections import Counter
from typing import Any

import msgspec
import pytest

import ipckit
from ipckit import Capabilities, errors

from ._base import SLACK, Contract, eventually, raises
from ._parties import HANG, End, Local, Party, ShellName, shell_of
from ._process import Process, Remote
from ._programs import payload, sizes, used_in_child
from ._queueing import (
    STOP,
    Taken,
    give,
    give_until_held,
    impatient,
    refuse,
    stopped,
    take,
    take_all,
    take_batches,
)


class Job(msgspec.Struct):
    """What the typed contracts send."""

    name: str
    size: int


def values(got: list[Taken]) -> list[Any]:
    return [message.value for message in got]


def numbered(count: int, start: int = 0) -> list[bytes]:
    return [b"%d" % number for number in range(start, start + count)]


class QueueContract(Contract):
    """A subclass brings the fixture `url`: a queue that nobody else uses and nothing is in."""

    @pytest.fixture(autouse=True)
    def has_queues(self, capabilities: Capabilities) -> None:
        self.needs("queue" in capabilities.patterns, "queue")

    @staticmethod
    def lease(capabilities: Capabilities) -> float:
        """Seconds until what a dead receiver had is somebody else's."""
        return capabilities.death_bound + SLACK

    @classmethod
    def feed(cls, here: Local, there: Party, url: str, **receiver: Any) -> tuple[End, End]:
        """Our sender and their receiver, who has the name where somebody must."""
        if (pair := cls.hand_one(here, [there], url)) is not None:
            opening = there.open("receiver", pair[1], timeout=10, **receiver)
            return here.open("sender", pair[0], timeout=10).result(HANG), opening.result(HANG)
        theirs = there.open("receiver", url, timeout=10, **receiver).result(HANG)
        return here.open("sender", theirs.url, timeout=10).result(HANG), theirs

    @classmethod
    def compete(cls, here: Local, others: list[Party], url: str, **receiver: Any) -> tuple[End, list[End]]:
        """Our sender, who has the name where somebody must, and the receivers that compete."""
        if not ipckit.capabilities(url).listen:
            cls.needs(len(others) == 1, "listen")
            sender, theirs = cls.feed(here, others[0], url, **receiver)
            return sender, [theirs]
        ours = here.open("sender", url, listen=True, timeout=10).result(HANG)
        opening = [other.open("receiver", ours.url, listen=False, timeout=10, **receiver) for other in others]
        return ours, [each.result(HANG) for each in opening]

    # -- what arrives ------------------------------------------------------------------------------------------------

    def test_each_once_in_order(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        sender, receiver = self.feed(here, there, url)
        sent = [payload(n, size) for n, size in enumerate(sizes(3, 200, self.largest(capabilities, 1 << 15)))]
        receiving = receiver.run(take, len(sent))
        ids = sender.run(give, sent).result(HANG)
        got = receiving.result(HANG)
        assert sorted(values(got)) == sorted(sent)
        if capabilities.ordered:
            assert values(got) == sent
        assert len(set(ids)) == len(sent)
        if capabilities.headers:
            assert {message.id: message.value for message in got} == dict(zip(ids, sent, strict=True))
        assert not any(message.redelivered for message in got)
        raises(errors.Timeout, lambda: receiver.call("recv", 0.1))

    def test_large_and_empty(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        sender, receiver = self.feed(here, there, url)
        for size in (0, 1, min(1 << 20, capabilities.max_message or 1 << 20)):
            receiving = receiver.run(take, 1)
            sender.call("send", payload(size, size), 20)
            assert values(receiving.result(HANG)) == [payload(size, size)]

    def test_before_anybody_receives(self, here: Local, there: Party, url: str) -> None:
        """A few messages need no receiver that is waiting already."""
        sender, receiver = self.feed(here, there, url)
        sender.run(give, numbered(5)).result(HANG)
        assert values(receiver.run(take, 5).result(HANG)) == numbered(5)

    def test_headers(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        sender, receiver = self.feed(here, there, url)
        headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "über".encode().hex(): "ü"}
        if not capabilities.headers:
            raises(errors.Unsupported, lambda: sender.call("send", b"x", 10, headers=headers))
            return
        returned = sender.call("send", b"with headers", 10, headers=headers, id="mine-17")
        sender.call("send", b"without", 10)
        first, second = receiver.run(take, 2).result(HANG)
        assert (first.value, first.id, first.headers) == (b"with headers", "mine-17", headers)
        assert returned == "mine-17"
        assert (second.value, second.headers) == (b"without", {})

    def test_bad_headers_and_ids(self, here: Local, neighbour: Local, url: str) -> None:
        sender, _ = self.feed(here, neighbour, url)
        for named in ({"headers": {"Upper": "x"}}, {"headers": {"a": "new\nline"}}, {"id": ""}, {"id": "with space"}):
            raises(errors.BadOption, lambda named=named: sender.call("send", b"x", 10, **named))  # type: ignore[misc]

    def test_priorities(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        sender, receiver = self.feed(here, neighbour, url)
        if capabilities.priorities:
            sender.call("send", b"low", 10)
            sender.call("send", b"high", 10, priority=1)
            assert set(values(receiver.run(take, 2).result(HANG))) == {b"low", b"high"}
        else:
            raises(errors.Unsupported, lambda: sender.call("send", b"x", 10, priority=1))

    def test_types(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        receiver = neighbour.open("receiver", url, timeout=10, type=Job).result(HANG)
        sender = here.open("sender", receiver.url, timeout=10, type=Job).result(HANG)
        foreign = here.open("sender", receiver.url, timeout=10).result(HANG)
        foreign.call("send", b"no job", 10)
        with pytest.raises(errors.ProtocolError):
            receiver.call("recv", 10)
        sender.call("send", Job("resize", 17), 10)
        assert values(receiver.run(take, 1).result(HANG)) == [Job("resize", 17)]

    def test_a_bad_one_costs_no_other(
        self, here: Local, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """Whatever batches they come in; and it can be settled, so that nobody has it again."""
        self.needs(capabilities.listen, "listen")
        receiver = neighbour.open("receiver", url, timeout=10, type=Job, ack="manual").result(HANG)
        sender = here.open("sender", receiver.url, timeout=10).result(HANG)
        first, last = Job("resize", 1), Job("resize", 2)
        bodies = [msgspec.msgpack.encode(first), b"no job", msgspec.msgpack.encode(last)]
        assert sender.call("send_many", bodies, 10) == 3
        assert receiver.run(take_batches, 3, "ack").result(HANG) == [first, b"no job", last]
        sender.call("drain", HANG)
        raises(errors.Timeout, lambda: receiver.call("recv", 0.1))

    def test_batches(self, here: Local, there: Party, url: str) -> None:
        sender, receiver = self.feed(here, there, url)
        sending = sender.start("send_many", numbered(100), 20)
        assert sorted(values(receiver.run(take, 100).result(HANG)), key=int) == numbered(100)
        assert sending.result(HANG) == 100
        assert sender.call("send_many", [], 1) == 0

    # -- several of them ---------------------------------------------------------------------------------------------

    def test_many_senders(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        first, receiver = self.feed(here, there, url)
        senders = [first] + [here.open("sender", receiver.url, timeout=10).result(HANG) for _ in range(3)]
        receiving = receiver.run(take, 4 * 30)
        sent = [[b"%d %d" % (who, number) for number in range(30)] for who in range(4)]
        for future in [sender.run(give, each) for sender, each in zip(senders, sent, strict=True)]:
            future.result(HANG)
        got = values(receiving.result(HANG))
        for who in range(4):
            mine = [value for value in got if value.startswith(b"%d " % who)]
            assert sorted(mine) == sorted(sent[who])
            if capabilities.ordered:
                assert mine == sent[who]

    def test_competing(self, here: Local, there: Party, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        """Each message to one of them."""
        sender, receivers = self.compete(here, [there, neighbour, there], url)
        receiving = [receiver.run(take_all, HANG, "ack") for receiver in receivers]
        sender.run(give, numbered(120)).result(HANG)
        sender.call("drain", HANG)  # an acknowledgement that is still on its way is not known when its receiver leaves
        again = HANG if capabilities.redelivery else 1  # else it is lost with one who was just leaving
        stopped(lambda: sender.call("send", STOP, 10), dict(zip(receiving, receivers, strict=True)), again)
        got = Counter(value for future in receiving for value in values(future.result(HANG)))
        assert got == Counter(numbered(120))

    def test_slow_one_does_not_hoard(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        """One that does not go on leaves the others to do the work."""
        self.needs(capabilities.redelivery, "redelivery")
        sender, (stuck, busy) = self.compete(here, [neighbour, neighbour], url, ack="manual")
        receiving = busy.run(take_all, HANG, "ack")
        sender.run(give, numbered(10)).result(HANG)
        stuck.run(take_all, 0.2, None).result(HANG)
        sender.run(give, numbered(190, 10)).result(HANG)
        assert eventually(lambda: busy.call("stats")["received"] >= 100, HANG)
        busy.close()
        receiving.result(HANG)

    # -- acknowledgement ---------------------------------------------------------------------------------------------

    def test_acknowledged_is_done(
        self, here: Local, there: Party, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        self.needs(capabilities.listen, "listen")
        sender, (receiver,) = self.compete(here, [there], url, ack="manual")
        sender.run(give, numbered(5)).result(HANG)
        assert len(receiver.run(take, 5, "ack").result(HANG)) == 5
        receiver.close()
        other = neighbour.open("receiver", sender.url, listen=False, timeout=10).result(HANG)
        raises(errors.Timeout, lambda: other.call("recv", 0.3))
        sender.call("drain", 10)

    def test_unacknowledged_is_handed_out_again(
        self, here: Local, there: Party, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """To somebody else, or to the next who comes; what was acknowledged is not."""
        self.needs(capabilities.redelivery, "redelivery")
        sender, (receiver,) = self.compete(here, [there], url, ack="manual")
        sender.run(give, numbered(6)).result(HANG)
        receiver.run(take, 2, "ack").result(HANG)
        receiver.run(take, 2).result(HANG)
        receiver.close()
        other = neighbour.open("receiver", sender.url, listen=False, timeout=10, ack="manual").result(HANG)
        got = other.run(take, 4, "ack", self.lease(capabilities)).result(HANG)
        assert sorted(values(got)) == numbered(4, 2)
        again = {message.value for message in got if message.redelivered}
        assert again >= {b"2", b"3"}

    def test_auto_acknowledges_the_one_before(
        self, here: Local, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """Without a word from the user, the last one that was handed out is not acknowledged."""
        self.needs(capabilities.redelivery, "redelivery")
        sender, (receiver,) = self.compete(here, [neighbour], url)
        sender.run(give, numbered(3)).result(HANG)
        assert values(receiver.run(take, 3).result(HANG)) == numbered(3)
        receiver.close()
        other = neighbour.open("receiver", sender.url, listen=False, timeout=10).result(HANG)
        got = other.run(take, 1, None, self.lease(capabilities)).result(HANG)
        assert values(got) == [b"2"]
        assert got[0].redelivered == 1

    def test_receiver_comes_back(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """The receiver that has the name goes and comes again: its senders find it, and nothing is lost."""
        self.needs(capabilities.redelivery, "redelivery")
        sender, receiver = self.feed(here, there, url, ack="manual")
        sender.run(give, numbered(6)).result(HANG)
        receiver.run(take, 2, "ack").result(HANG)
        receiver.close()
        again = there.open("receiver", receiver.url, timeout=10, ack="manual").result(HANG)
        assert sorted(values(again.run(take, 4, "ack", self.lease(capabilities)).result(HANG))) == numbered(4, 2)
        sender.call("send", b"more", 10)
        assert values(again.run(take, 1, "ack").result(HANG)) == [b"more"]
        sender.call("drain", 10)

    def test_nack(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.redelivery, "redelivery")
        sender, (receiver,) = self.compete(here, [there], url, ack="manual")
        sender.call("send", b"again", 10)
        assert receiver.run(refuse, 0.0).result(HANG).redelivered == 0
        again = receiver.run(take, 1, "ack", self.lease(capabilities)).result(HANG)
        assert [(message.value, message.redelivered) for message in again] == [(b"again", 1)]
        raises(errors.Timeout, lambda: receiver.call("recv", 0.2))

    def test_nack_with_a_delay(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.redelivery, "redelivery")
        sender, (receiver,) = self.compete(here, [there], url, ack="manual")
        sender.call("send", b"later", 10)
        receiver.run(refuse, 0.7).result(HANG)
        raises(errors.Timeout, lambda: receiver.call("recv", 0.3))
        assert values(receiver.run(take, 1, "ack", self.lease(capabilities)).result(HANG)) == [b"later"]

    # -- killed and stopped ------------------------------------------------------------------------------------------

    def test_killed_receiver(
        self, here: Local, spawned: Remote, process: Process, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """What a killed receiver had not acknowledged goes to another; nothing is lost."""
        self.needs(capabilities.redelivery, "redelivery")
        sender, (dying,) = self.compete(here, [spawned], url, ack="manual")
        sender.run(give, numbered(8)).result(HANG)
        done = dying.run(take, 2, "ack").result(HANG)
        held = dying.run(take, 3).result(HANG)
        process.kill()
        other = neighbour.open("receiver", sender.url, listen=False, timeout=10, ack="manual").result(HANG)
        got = other.run(take, 6, "ack", self.lease(capabilities) + 10).result(HANG)
        twice = set(values(done)) & set(values(got))
        if twice and not capabilities.handed_over:  # acknowledgements that were still in the killed process
            got += other.run(take, len(twice), "ack").result(HANG)
        else:
            assert not twice
        assert sorted({*values(done), *values(got)}, key=int) == numbered(8)
        again = {message.value: message.redelivered for message in got}
        assert all(again[message.value] >= 1 for message in held)

    def test_stopped_receiver(
        self, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """One that stands still for a while is not dead, and loses nothing."""
        sender, receiver = self.feed(here, spawned, url)
        receiving = receiver.run(take, 60)
        sender.run(give, numbered(30)).result(HANG)
        process.signal(signal.SIGSTOP)
        try:
            sending = sender.run(give, numbered(30, 30))
            time.sleep(0.3)
        finally:
            process.signal(signal.SIGCONT)
        sending.result(HANG)
        assert sorted(values(receiving.result(HANG)), key=int) == numbered(60)

    # -- waiting and ending ------------------------------------------------------------------------------------------

    def test_timeouts(self, here: Local, neighbour: Local, url: str) -> None:
        _, receiver = self.feed(here, neighbour, url)
        raises(errors.Timeout, lambda: receiver.call("recv", 0))
        raises(errors.Timeout, lambda: receiver.call("recv", 0.05))
        raises(errors.Timeout, lambda: receiver.call("recv_many", 5, 0.05))

    def test_backpressure(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        """Where nobody keeps messages for us, a sender that nobody listens to is held; all it was let send arrives."""
        self.needs(not capabilities.broker, "a bound of its own")
        sender, receiver = self.feed(here, neighbour, url)
        sent = sender.run(give_until_held, 200_000).result(HANG)
        assert values(receiver.run(take, sent).result(HANG)) == numbered(sent)
        assert len(receiver.run(take_all, 0.1).result(HANG)) <= 1  # an OutcomeUnknown may have come after all

    def test_wakes(self, here: Local, there: Party, url: str) -> None:
        sender, receiver = self.feed(here, there, url)
        receiving = receiver.run(take, 1)
        time.sleep(0.05)
        sender.call("send", b"wake up", 10)
        assert values(receiving.result(HANG)) == [b"wake up"]

    def test_close_wakes(self, here: Local, neighbour: Local, url: str) -> None:
        sender, receiver = self.feed(here, neighbour, url)
        receiving = receiver.start("recv", 20)
        time.sleep(0.05)
        receiver.close()
        raises(errors.Closed, lambda: receiving.result(HANG))
        raises(errors.Closed, lambda: receiver.call("recv", 0))
        sender.close()
        sender.close()
        raises(errors.Closed, lambda: sender.call("send", b"x", 1))
        assert sender.handle.closed

    def test_sent_before_close_arrives(self, here: Local, there: Party, url: str) -> None:
        sender, receiver = self.feed(here, there, url)
        sender.run(give, numbered(8)).result(HANG)
        sender.close()
        assert values(receiver.run(take, 8).result(HANG)) == numbered(8)

    def test_cancelling_loses_nothing(self, here: Local, shell: ShellName, neighbour: Local, url: str) -> None:
        if shell == "sync":
            pytest.skip("threads cannot be cancelled")
        sender, receiver = self.feed(here, neighbour, url)
        receiving = receiver.run(impatient, 50)
        sender.run(give, numbered(50)).result(HANG)
        assert sorted(values(receiving.result(HANG)), key=int) == numbered(50)

    def test_counters(self, here: Local, there: Party, url: str) -> None:
        sender, receiver = self.feed(here, there, url)
        sender.run(give, [b"12345"] * 7).result(HANG)
        receiver.run(take, 7).result(HANG)
        stats, theirs = sender.call("stats"), receiver.call("stats")
        assert (stats["sent"], stats["bytes_sent"]) == (7, 35)
        assert (theirs["received"], theirs["bytes_received"]) == (7, 35)

    def test_groups(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        if not capabilities.consumer_groups:
            opening = here.open("receiver", url, group="workers", timeout=5)
            raises(errors.Unsupported, lambda: opening.result(HANG))
            return
        groups = [neighbour.open("receiver", url, group=name, timeout=10).result(HANG) for name in ("one", "two")]
        sender = here.open("sender", url, timeout=10).result(HANG)
        sender.run(give, numbered(10)).result(HANG)
        for group in groups:
            assert values(group.run(take, 10).result(HANG)) == numbered(10)

    def test_forked_child_is_refused(self, spawned: Remote, here: Local, url: str) -> None:
        """A forked child gets ForkedError, and what it does there does not reach the others."""
        sender, receiver = self.feed(here, spawned, url)
        assert spawned.on_main_thread(used_in_child, receiver).result(HANG) == ["recv: ForkedError"]
        sender.call("send", b"the parent's", 10)
        assert values(receiver.run(take, 1).result(HANG)) == [b"the parent's"]

    def test_nothing_leaks(self, url: str, shell: ShellName) -> None:
        """Open, use and close leave no thread behind."""

        def once() -> None:
            here, there = Local(shell_of(shell)), Local(shell_of(shell))
            try:
                sender, receiver = self.feed(here, there, url)
                sender.call("send", b"hello", 10)
                assert values(receiver.run(take, 1, "ack").result(HANG)) == [b"hello"]
            finally:
                here.close()
                there.close()

        for _ in range(3):
            once()
        gc.collect()
        threads = threading.active_count()
        for _ in range(5):
            once()
        gc.collect()
        assert eventually(lambda: threading.active_count() <= threads), threading.enumerate()

    def test_unclosed_is_told(self, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        with pytest.warns(ResourceWarning, match="unclosed"):
            _drop(url)


def _drop(url: str) -> None:
    ipckit.receiver(url, timeout=10)
    gc.collect()
