"""What happens to messages: whole, in order, each once, of every size."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest

from ipckit import Capabilities, errors
from ipckit import codecs as codecs_module

from ._base import Contract, Meeting, eventually, raises, with_options
from ._parties import HANG, Local, Party
from ._programs import collect, echo, payload, recv_all, send_all, sizes

_LIMIT = 1 << 21


class Order(msgspec.Struct):
    """What the typed contracts send."""

    sku: str
    qty: int


class MessageContracts(Contract):
    def test_order(self, ends: Meeting, capabilities: Capabilities) -> None:
        """What is sent comes in order, each message once, in both directions."""
        self.needs(capabilities.ordered, "ordered")
        lengths = [number % 40 for number in range(200)]
        for sender, receiver in ((ends.here, ends.there), (ends.there, ends.here)):
            receiving = receiver.run(recv_all, lengths)
            assert sender.run(send_all, lengths).result(HANG) == len(lengths)
            assert receiving.result(HANG) == len(lengths)

    def test_sizes(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """Every size from nothing to the limit goes through, and comes back, unchanged; one byte more does not."""
        limit = self.largest(capabilities, _LIMIT)
        edges = [0, 1, 63, 64, 65, 4095, 4096, 4097, 65535, 65536, 65537, 1 << 20, limit - 1, limit]
        ends = self.meet(here, there, with_options(url, limit=limit), capabilities)
        echoing = ends.there.run(echo)
        for size in (size for size in edges if size <= limit):
            sending = ends.here.start("send", payload(1, size), 20)
            assert ends.here.recv(20) == payload(1, size), f"{size} bytes came back changed"
            sending.result(HANG)
        raises(errors.MessageTooLarge, lambda: ends.here.send(bytes(limit + 1)))
        ends.here.send(b"the link stays good")
        assert ends.here.recv() == b"the link stays good"
        ends.here.close()
        echoing.result(HANG)

    def test_too_large_for_the_receiver(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """Where only the receiver has the smaller limit, it or the sender refuses; nobody allocates."""
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", with_options(url, limit=1000), timeout=10).result(HANG)
        connecting = there.open("connect", with_options(url, limit=5000), timeout=10)
        receiver = listener.accept()
        sender = connecting.result(HANG)
        sender.send(bytes(1000))
        assert receiver.recv() == bytes(1000)
        try:
            sender.send(bytes(1001), 5)
        except errors.MessageTooLarge:
            sender.send(b"the link stays good")
            assert receiver.recv() == b"the link stays good"
        else:
            raises(errors.ProtocolError, lambda: receiver.recv(5))

    def test_random_sizes(self, ends: Meeting, capabilities: Capabilities) -> None:
        lengths = sizes(7, 60, self.largest(capabilities, 1 << 18))
        receiving = ends.there.run(recv_all, lengths)
        assert ends.here.run(send_all, lengths).result(HANG) == len(lengths)
        assert receiving.result(HANG) == len(lengths)

    def test_buffers(self, ends: Meeting) -> None:
        """Any contiguous buffer is taken, and belongs to its owner again when send returns."""
        mutable = bytearray(b"bytearray")
        for value in (mutable, memoryview(b"memoryview"), memoryview(b"12345678").cast("I")):
            ends.here.send(value)
            expected = bytes(value)
            if value is mutable:
                mutable[:] = b"#########"
            assert ends.there.recv() == expected

    def test_what_is_no_buffer(self, ends: Meeting) -> None:
        for value in ("text", 5, None):
            with pytest.raises(TypeError):
                ends.here.send(value)
        ends.here.send(b"still good")
        assert ends.there.recv() == b"still good"

    def test_full_duplex(self, ends: Meeting, capabilities: Capabilities) -> None:
        """Both directions at once, both ends sending and receiving."""
        self.needs(capabilities.reliable, "reliable")
        lengths = sizes(11, 150, self.largest(capabilities, 1 << 14))
        work = [end.run(program, lengths) for end in ends[1:] for program in (send_all, recv_all)]
        assert [future.result(HANG) for future in work] == [len(lengths)] * 4

    def test_many_senders(self, ends: Meeting, capabilities: Capabilities) -> None:
        """Several threads or tasks send on one channel: no message is torn, and each sender's come in its order."""
        self.needs(capabilities.reliable, "reliable")
        size = self.largest(capabilities, 20_000)
        sent = [[bytes([sender, number]) + bytes([sender]) * (size - 2) for number in range(15)] for sender in range(4)]
        receiving = ends.there.run(collect, 20)
        sending = [ends.here.start("send_many", messages, 20) for messages in sent[:2]]
        sending += [ends.here.run(_send_each, messages) for messages in sent[2:]]
        assert [future.result(HANG) for future in sending] == [15] * 4
        ends.here.close()
        got = receiving.result(HANG)
        assert [[message for message in got if message[0] == sender] for sender in range(4)] == sent

    # -- batches -----------------------------------------------------------------------------------------------------

    def test_batches(self, ends: Meeting, capabilities: Capabilities) -> None:
        self.needs(capabilities.reliable and capabilities.ordered, "reliable and ordered")
        messages = [payload(number, number * 3) for number in range(100)]
        sending = ends.here.start("send_many", messages, 20)
        got: list[bytes] = []
        while len(got) < 100:
            batch = ends.there.call("recv_many", 30, 10)
            assert 1 <= len(batch) <= 30
            got += batch
        assert got == messages
        assert sending.result(HANG) == 100
        assert ends.here.call("send_many", [], 1) == 0

    def test_batch_times_out(self, ends: Meeting) -> None:
        raises(errors.Timeout, lambda: ends.here.call("recv_many", 5, 0.05))

    def test_batch_before_the_end(self, ends: Meeting) -> None:
        """A batch is never lost to an end that was found while it was gathered."""
        ends.there.call("send_many", [b"one", b"two"], 10)
        ends.there.close()
        got: list[bytes] = []
        while len(got) < 2:
            got += ends.here.call("recv_many", 10, 10)
        assert got == [b"one", b"two"]
        raises(errors.PeerClosed, lambda: ends.here.call("recv_many", 10, 10))

    # -- in place ----------------------------------------------------------------------------------------------------

    def test_recv_into(self, near: Meeting) -> None:
        buffer = bytearray(100)
        near.there.send(b"hello")
        assert near.here.call("recv_into", buffer, 10) == 5
        assert buffer[:6] == b"hello\0"
        near.there.send(b"")
        assert near.here.call("recv_into", memoryview(buffer)[10:], 10) == 0

    def test_recv_into_too_small(self, near: Meeting) -> None:
        """The message is kept: it can be had with a larger buffer, or with recv."""
        near.there.send(b"larger than three")
        near.there.send(b"next")
        for _ in range(2):
            raises(errors.MessageTooLarge, lambda: near.here.call("recv_into", bytearray(3), 10))
        assert near.here.recv() == b"larger than three"
        assert near.here.recv() == b"next"

    def test_borrow_what_recv_into_kept(self, near: Meeting, capabilities: Capabilities) -> None:
        self.needs(capabilities.zero_copy, "zero_copy")
        near.there.send(b"larger than three")
        near.there.send(b"next")
        raises(errors.MessageTooLarge, lambda: near.here.call("recv_into", bytearray(3), 10))
        assert near.here.run(_borrowed, 2).result(HANG) == [b"larger than three", b"next"]

    def test_view_kept_past_its_block(self, near: Meeting, capabilities: Capabilities) -> None:
        """It raises, and does not dangle: the memory stays until the view is gone. Then the channel goes on."""
        self.needs(capabilities.zero_copy, "zero_copy")
        near.there.send(b"borrowed")
        assert near.here.run(_keep, "borrow", 10).result(HANG) == b"borrowed"
        near.here.run(_keep, "loan", 8, 10).result(HANG)
        near.here.send(b"after")
        assert near.there.recv() == b"after"

    def test_recv_into_what_cannot_be_written(self, near: Meeting) -> None:
        """Whatever is wrong with the buffer, the message is kept."""
        near.there.send(b"kept")
        for wrong in (b"read-only", memoryview(b"read-only"), "no buffer", None):
            with pytest.raises((TypeError, BufferError)):
                near.here.call("recv_into", wrong, 10)
        assert near.here.recv() == b"kept"

    def test_loan_and_borrow(self, ends: Meeting, capabilities: Capabilities) -> None:
        """Written in place by one, read in place by the other; an exception takes a loan back."""
        self.needs(capabilities.zero_copy, "zero_copy")
        borrowing = ends.there.run(_borrowed, 2)
        ends.here.run(_lend, [b"first", b"", b"second"]).result(HANG)
        assert borrowing.result(HANG) == [b"first", b"second"]

    def test_no_loan(self, near: Meeting, capabilities: Capabilities) -> None:
        if not capabilities.zero_copy:
            raises(errors.Unsupported, lambda: near.here.run(_lend, [b"x"]).result(HANG))
            raises(errors.Unsupported, lambda: near.here.run(_borrowed, 1).result(HANG))

    # -- priorities --------------------------------------------------------------------------------------------------

    def test_priorities(self, ends: Meeting, capabilities: Capabilities) -> None:
        """What waits is received highest first; equals in the order sent."""
        self.needs(capabilities.priorities, "priorities")
        top = capabilities.priorities - 1
        ends.there.send(b"first", priority=0)
        for text, priority in ((b"low", 0), (b"high a", top), (b"low too", 0), (b"high b", top)):
            ends.there.send(text, priority=priority)
        ends.there.send(b"last", priority=0)
        got = [ends.here.recv() for _ in range(6)]
        high = [text for text in got if text.startswith(b"high")]
        low = [text for text in got if not text.startswith(b"high")]
        assert high == [b"high a", b"high b"]
        assert low == [b"first", b"low", b"low too", b"last"]
        assert got.index(b"high b") < got.index(b"last")

    def test_no_priorities(self, ends: Meeting, capabilities: Capabilities) -> None:
        if not capabilities.priorities:
            raises(errors.Unsupported, lambda: ends.here.send(b"x", priority=1))

    # -- values ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("codec", ["json", "msgpack"])
    def test_typed(self, codec: str, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        """A value of another type raises SchemaError with the path, at the receiver, and the channel goes on."""
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10, codec=codec, type=Order).result(HANG)
        connecting = neighbour.open("connect", listener.url, timeout=10, codec=codec, type=dict)
        receiver = listener.accept()
        sender = connecting.result(HANG)
        sender.send({"sku": "a", "qty": 2})
        assert receiver.recv() == Order("a", 2)
        sender.send({"sku": "a", "qty": "two"})
        assert "$.qty: expected int" in str(raises(errors.SchemaError, receiver.recv))
        sender.send({"sku": "b", "qty": 3})
        assert receiver.recv() == Order("b", 3)
        raises(errors.CodecError, lambda: sender.send({"sku": object()}))
        receiver.send(Order("back", 1))
        assert sender.recv() == {"sku": "back", "qty": 1}

    def test_own_codec(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> None:
        shout = codecs_module.Codec("upper", lambda text: str(text).encode(), lambda data: data.decode().upper())
        if not capabilities.listen:
            pytest.skip("the transport does not declare 'listen'")
        ends = self.meet(here, neighbour, url, capabilities, codec=shout)
        assert ends.here.call("send_many", ["quiet", "calm"], 10) == 2
        assert ends.there.recv() == "QUIET"
        assert ends.there.call("recv_many", 1, 10) == ["CALM"]

    def test_stats(self, near: Meeting) -> None:
        for size in (0, 10, 100):
            near.here.send(bytes(size))
            near.there.recv()
        near.there.send(b"12345")
        near.here.recv()
        assert eventually(lambda: near.here.handle.stats().messages_sent == 3)
        stats = near.here.handle.stats()
        assert (stats.messages_sent, stats.bytes_sent) == (3, 110)
        assert (stats.messages_received, stats.bytes_received) == (1, 5)
        assert near.there.handle.stats().bytes_received == 110


async def _send_each(end: Any, messages: list[bytes]) -> int:
    for message in messages:
        await end.send(message, 20)
    return len(messages)


class _GiveUp(Exception):
    """Leaves the block of a loan."""


async def _lend(end: Any, messages: list[bytes]) -> None:
    """Loan, fill and send each; give an empty one up."""
    for message in messages:
        with suppress(_GiveUp):
            async with end.loan(max(len(message), 1), 10) as view:
                if not message:
                    raise _GiveUp
                view[:] = message


async def _keep(end: Any, verb: str, *args: Any) -> bytes:
    kept = None
    with pytest.raises(BufferError):
        async with getattr(end, verb)(*args) as view:
            kept = view[:]
    assert kept is not None
    content = bytes(kept)
    kept.release()
    return content


async def _borrowed(end: Any, count: int) -> list[bytes]:
    got = []
    for _ in range(count):
        async with end.borrow(10) as view:
            got.append(bytes(view))
    return got
