"""`PubSubContract`: each message to every subscriber that wants it, or to one of each group; what is dropped is counted."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from ipckit import Capabilities, errors
from ipckit.pubsub import matches

from ._base import Contract, eventually, raises
from ._parties import HANG, End, Local, Party
from ._process import Process, Remote
from ._programs import payload, sizes
from ._queueing import STOP, Taken, publish, stopped, take, take_all
from .queue import numbered, values


def topical(messages: list[Taken]) -> list[tuple[Any, str]]:
    return [(message.value, message.topic) for message in messages]


class PubSubContract(Contract):
    """A subclass brings the fixture `url`: topics that nobody else uses."""

    @pytest.fixture(autouse=True)
    def has_topics(self, capabilities: Capabilities) -> None:
        self.needs("pubsub" in capabilities.patterns, "pubsub")

    @classmethod
    def gather(
        cls, here: Local, others: list[Party], url: str, named: dict[str, Any] | None = None, **subscriber: Any
    ) -> tuple[End, list[End]]:
        """Our publisher, and their subscribers, all of them there."""
        pair = cls.hand_one(here, others, url)
        ours = here.open("publisher", url if pair is None else pair[0], timeout=10, **(named or {})).result(HANG)
        if pair is not None:
            return ours, [others[0].open("subscriber", pair[1], timeout=10, **subscriber).result(HANG)]
        opening = [other.open("subscriber", ours.url, timeout=10, **subscriber) for other in others]
        theirs = [each.result(HANG) for each in opening]
        ours.call("wait_for_subscribers", len(others), 10)
        return ours, theirs

    # -- who gets what -----------------------------------------------------------------------------------------------

    def test_everybody_gets_everything(
        self, here: Local, there: Party, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        self.needs(capabilities.reliable, "reliable")
        publisher, subscribers = self.gather(here, [there, neighbour, there], url)
        sent = [payload(n, size) for n, size in enumerate(sizes(5, 150, self.largest(capabilities, 1 << 14)))]
        receiving = [subscriber.run(take, len(sent)) for subscriber in subscribers]
        publisher.run(publish, [(value, "") for value in sent]).result(HANG)
        for future in receiving:
            got = future.result(HANG)
            assert values(got) == sent if capabilities.ordered else sorted(values(got)) == sorted(sent)
            assert not any(message.gap for message in got)

    def test_topics(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """`*` is one level, `>` the rest; a subscriber with several patterns gets a message once."""
        self.needs(capabilities.listen, "listen")
        self.needs(capabilities.reliable, "reliable")
        wanted = [(">",), ("eu.*",), ("eu.>",), ("*.paris", "eu.*"), ("eu.paris",), ("us",)]
        topics = ["eu.paris", "eu.rome", "us.paris", "eu.paris.north", "us", "eu", ""]
        publisher = here.open("publisher", url, timeout=10).result(HANG)
        subscribers = [
            there.open("subscriber", publisher.url, timeout=10, topics=list(each)).result(HANG) for each in wanted
        ]
        publisher.call("wait_for_subscribers", len(wanted), 10)
        messages = [(b"%d" % number, topic) for number, topic in enumerate(topics)]
        publisher.run(publish, messages).result(HANG)
        for subscriber, patterns in zip(subscribers, wanted, strict=True):
            due = [each for each in messages if any(matches(pattern, each[1]) for pattern in patterns)]
            got = subscriber.run(take, len(due)).result(HANG)
            assert sorted(topical(got)) == sorted(due), patterns
            raises(errors.Timeout, lambda subscriber=subscriber: subscriber.call("recv", 0.05))  # type: ignore[misc]

    def test_bad_topics(self, here: Local, neighbour: Local, url: str) -> None:
        publisher, _ = self.gather(here, [neighbour], url)
        for topic in ("eu.*", ">", "a..b", ".a", "with space"):
            raises(errors.BadOption, lambda topic=topic: publisher.call("publish", b"x", topic, 5))  # type: ignore[misc]
        for topics in ([], "eu.*", ["a.>.b"], ["a*"]):
            opening = neighbour.open(
                "subscriber", publisher.url, topics=topics, timeout=5
            )  # told before anything is opened
            raises(errors.BadOption, lambda opening=opening: opening.result(HANG))  # type: ignore[misc]

    def test_groups(self, here: Local, there: Party, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        """Each group gets each message once, and its members share."""
        self.needs(capabilities.reliable, "reliable")
        publisher, (first, second) = self.gather(here, [there, neighbour], url, group="metrics")
        alone = neighbour.open("subscriber", publisher.url, timeout=10).result(HANG)
        publisher.call("wait_for_subscribers", 3, 10)
        everyone = alone.run(take_all, HANG, "ack")
        # A member that asks gets some, however far ahead of it the other one is.
        begun = [member.run(take, 1, "ack") for member in (first, second)]
        sent = 0
        while not all(future.done() for future in begun):
            publisher.run(publish, [(b"%d" % sent, "t")]).result(HANG)
            sent += 1
        firsts = [message for future in begun for message in future.result(HANG)]
        receiving = [subscriber.run(take_all, HANG, "ack") for subscriber in (first, second)] + [everyone]
        publisher.run(publish, [(b"%d" % number, "t") for number in range(sent, sent + 40)]).result(HANG)
        taking = dict(zip(receiving, (first, second, alone), strict=True))
        stopped(lambda: publisher.call("publish", STOP, "t", 10), taking, again=2)
        one, two, everything = (values(future.result(HANG)) for future in receiving)
        assert sorted(values(firsts) + one + two, key=int) == numbered(sent + 40)
        assert everything == numbered(sent + 40)

    def test_headers(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.headers, "headers")
        publisher, (subscriber,) = self.gather(here, [there], url)
        publisher.call("publish", b"x", "a.b", 10, headers={"traceparent": "00-1-2-01"})
        (got,) = subscriber.run(take, 1).result(HANG)
        assert (got.value, got.topic, got.headers) == (b"x", "a.b", {"traceparent": "00-1-2-01"})

    def test_nobody_there(self, here: Local, url: str, capabilities: Capabilities) -> None:
        """Publishing to nobody costs nothing, and waits for nobody."""
        self.needs(capabilities.listen, "listen")
        publisher = here.open("publisher", url, timeout=10).result(HANG)
        publisher.run(publish, [(b"x", "t")] * 20).result(HANG)
        raises(errors.Timeout, lambda: publisher.call("wait_for_subscribers", 1, 0.1))

    def test_late_subscriber(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """With `retain`, the last values of each topic it wants come first."""
        self.needs(capabilities.listen, "listen")
        self.needs(not capabilities.replay and capabilities.reliable, "a log of its own instead")
        publisher = here.open("publisher", url, timeout=10, retain=2).result(HANG)
        publisher.run(publish, [(b"1", "a"), (b"2", "b"), (b"3", "a"), (b"4", "a"), (b"5", "c")]).result(HANG)
        subscriber = there.open("subscriber", publisher.url, timeout=10, topics=["a", "b"]).result(HANG)
        assert topical(subscriber.run(take, 3).result(HANG)) == [(b"2", "b"), (b"3", "a"), (b"4", "a")]
        publisher.call("publish", b"6", "b", 10)
        assert topical(subscriber.run(take, 1).result(HANG)) == [(b"6", "b")]

    # -- slow, stopped, dead -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("on_full", ["drop_old", "drop_new"])
    def test_received_and_dropped_is_sent(
        self, on_full: str, here: Local, there: Party, url: str, capabilities: Capabilities
    ) -> None:
        """One that does not receive for a while misses messages, and is told exactly how many; also at the end."""
        self.needs(not capabilities.broker and capabilities.reliable, "a bound of its own")
        publisher, (subscriber,) = self.gather(here, [there], url, {"on_full": on_full})
        count, size = 6000, min(2000, self.largest(capabilities, 2000))
        sent = [b"%06d" % number + bytes(size - 6) for number in range(count)]
        publisher.run(publish, [(value, "t") for value in sent]).result(HANG)
        dropped = publisher.call("stats")["dropped"]
        assert dropped, "it was not slow enough for this test"
        publisher.close()
        got = subscriber.run(take_all, 10.0).result(HANG)
        stats = subscriber.call("stats")
        assert (stats["received"], stats["dropped"]) == (len(got), dropped)
        assert len(got) + dropped == count
        numbers = [int(message.value[:6]) for message in got]
        at = -1
        for number, message in zip(numbers, got, strict=True):
            assert number == at + 1 + message.gap
            at = number
        # Which of the others go is a matter of who was how fast.
        assert numbers[-1] == count - 1 if on_full == "drop_old" else numbers[0] == 0
        raises(errors.PeerClosed, lambda: subscriber.call("recv", 5))

    def test_every_loss_is_counted(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """Where nobody is waited for: one that does not receive for a while knows exactly what it missed; also at the end."""
        self.needs(not capabilities.reliable, "losses")
        self.needs(capabilities.counted, "counted")
        publisher, (subscriber,) = self.gather(here, [there], url)
        count = 4000
        publisher.run(publish, [(b"%06d" % number + bytes(2000), "t") for number in range(count)]).result(HANG)
        publisher.close()
        got = subscriber.run(take_all, 2.0).result(HANG)
        at = -1
        for message in got:
            number = int(message.value[:6])
            assert number == at + 1 + message.gap
            at = number
        stats = subscriber.call("stats")
        assert stats["dropped"], "it was not slow enough for this test"
        assert (stats["received"], stats["received"] + stats["dropped"]) == (len(got), count)

    def test_on_full_error(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        self.needs(not capabilities.broker and capabilities.reliable, "a bound of its own")
        publisher, (subscriber,) = self.gather(here, [neighbour], url, {"on_full": "error"})
        sending = publisher.run(publish, [(bytes(2000), "t")] * 20_000)
        raises(errors.QueueFull, lambda: sending.result(HANG))
        sent = publisher.call("stats")["sent"]
        assert len(subscriber.run(take, sent).result(HANG)) == sent

    def test_block_loses_nothing(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(not capabilities.broker and capabilities.reliable, "a bound of its own")
        publisher, (subscriber,) = self.gather(here, [there], url)
        sending = publisher.run(publish, [(b"%d" % n + bytes(4000), "t") for n in range(1500)])
        time.sleep(0.3)
        got = subscriber.run(take, 1500).result(HANG)
        sending.result(HANG)
        assert [int(message.value.rstrip(b"\0")) for message in got] == list(range(1500))

    def test_killed_subscriber(
        self, here: Local, spawned: Remote, process: Process, neighbour: Local, url: str, capabilities: Capabilities
    ) -> None:
        """The others go on, though it was full."""
        self.needs(capabilities.reliable, "reliable")
        publisher, (_, alive) = self.gather(here, [spawned, neighbour], url)
        receiving = alive.run(take, 400)
        sending = publisher.run(publish, [(bytes(2000), "t")] * 400)
        time.sleep(0.1)
        process.kill()
        sending.result(HANG)
        assert len(receiving.result(HANG)) == 400

    def test_stopped_subscriber(
        self, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """One that stands still for a while is not dead, and misses nothing it was not told of."""
        self.needs(capabilities.reliable, "reliable")
        publisher, (subscriber,) = self.gather(here, [spawned], url)
        receiving = subscriber.run(take, 200)
        process.signal(signal.SIGSTOP)
        try:
            sending = publisher.run(publish, [(value, "t") for value in numbered(200)])
            time.sleep(0.3)
        finally:
            process.signal(signal.SIGCONT)
        sending.result(HANG)
        assert values(receiving.result(HANG)) == numbered(200)

    # -- waiting and ending ------------------------------------------------------------------------------------------

    def test_timeouts_and_close(self, here: Local, neighbour: Local, url: str) -> None:
        publisher, (subscriber,) = self.gather(here, [neighbour], url)
        raises(errors.Timeout, lambda: subscriber.call("recv", 0))
        raises(errors.Timeout, lambda: subscriber.call("recv", 0.05))
        receiving = subscriber.start("recv", 20)
        time.sleep(0.05)
        subscriber.close()
        raises(errors.Closed, lambda: receiving.result(HANG))
        publisher.close()
        raises(errors.Closed, lambda: publisher.call("publish", b"x", "", 1))

    def test_publisher_closes(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """What was published before is received; then, where there is one publisher, that is the end."""
        self.needs(capabilities.reliable, "reliable")
        publisher, (subscriber,) = self.gather(here, [there], url)
        publisher.run(publish, [(value, "t") for value in numbered(5)]).result(HANG)
        publisher.close()
        assert values(subscriber.run(take, 5).result(HANG)) == numbered(5)
        if not capabilities.broker:
            raises(errors.PeerClosed, lambda: subscriber.call("recv", 10))

    def test_counters(self, here: Local, there: Party, url: str) -> None:
        publisher, (subscriber,) = self.gather(here, [there], url)
        publisher.run(publish, [(b"12345", "t")] * 7).result(HANG)
        subscriber.run(take, 7).result(HANG)
        stats, theirs = publisher.call("stats"), subscriber.call("stats")
        assert (stats["sent"], stats["bytes_sent"]) == (7, 35)
        assert (theirs["received"], theirs["bytes_received"], theirs["dropped"]) == (7, 35, 0)

    def test_subscriber_leaves(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(not capabilities.broker and capabilities.reliable, "subscribers that are counted exactly")
        publisher, (subscriber,) = self.gather(here, [there], url)
        subscriber.close()
        assert eventually(lambda: publisher.call("stats")["subscribers"] == 0)
        publisher.run(publish, [(b"x", "t")] * 20).result(HANG)
