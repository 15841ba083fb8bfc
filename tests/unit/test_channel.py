"""What the conformance suite does not ask of every transport: the channel's own logic, over inproc and over links by hand."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import pickle
import re
import threading
import time
from typing import Any, get_overloads

import pytest

import ipckit
import ipckit.aio
from ipckit import errors
from ipckit._capabilities import Capabilities
from ipckit._spi import Buffer, Peer, Wait, Want
from ipckit._url import parse
from ipckit.channel import AsyncChannel, Channel
from ipckit.codecs import RAW, choose

URL = parse("toy://x")
CAPABILITIES = Capabilities(patterns=frozenset({"channel"}))


class Scripted:
    """A link that answers from lists: None is "not now"."""

    native = None
    peer = Peer()

    def __init__(self, sends: list[Any] = (), flushes: list[Any] = (), receives: list[Any] = ()) -> None:  # type: ignore[assignment]
        self.sends, self.flushes, self.receives = list(sends), list(flushes), list(receives)
        self.calls: list[str] = []
        self.closed = 0

    def _next(self, name: str, answers: list[Any], otherwise: Any) -> Any:
        self.calls.append(name)
        answer = answers.pop(0) if answers else otherwise
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def try_send(self, frame: Buffer) -> bool:
        return bool(self._next("send", self.sends, True))

    def try_flush(self) -> bool:
        return bool(self._next("flush", self.flushes, True))

    def try_recv(self) -> bytes | None:
        got: bytes | None = self._next("recv", self.receives, None)
        return got

    def arm(self, want: Want) -> Wait:
        self.calls.append(f"arm {want.name}")
        return Wait((), 0.001)

    def close(self) -> None:
        self.closed += 1


def channel_on(link: Any, codec: Any = RAW) -> Channel[Any]:
    return Channel(link, URL, codec, CAPABILITIES)


# -- try, arm, try, wait ------------------------------------------------------------------------------------------


def test_the_order_of_receiving() -> None:
    """The try after `arm` comes before the sleep; what it finds ends the call without one."""
    link = Scripted(receives=[None, b"second"])
    with channel_on(link) as channel:
        assert channel.recv(5) == b"second"
    assert link.calls == ["recv", "arm RECV", "recv"]


def test_receiving_after_a_sleep() -> None:
    link = Scripted(receives=[None, None, None, None, b"late"])
    with channel_on(link) as channel:
        assert channel.recv(5) == b"late"
    assert link.calls == ["recv", "arm RECV", "recv", "recv", "arm RECV", "recv", "recv"][: len(link.calls)]


def test_the_order_of_sending() -> None:
    """Each `arm` is followed by a try; a frame is offered until it is taken, and no more; then what is held is flushed."""
    link = Scripted(sends=[False] * 5 + [True], flushes=[False] * 5 + [True])
    with channel_on(link) as channel:
        channel.send(b"x", 5)
    assert link.calls.count("send") == 6
    assert link.calls.count("flush") == 6
    assert link.calls.index("flush") > max(at for at, call in enumerate(link.calls) if call == "send")
    for at, call in enumerate(link.calls):
        assert call != "arm SEND" or link.calls[at + 1] in ("send", "flush")
    assert channel.stats().messages_sent == 1


def test_timeout_before_it_is_taken_is_a_timeout() -> None:
    link = Scripted(sends=[False] * 1000)
    with channel_on(link) as channel:
        with pytest.raises(errors.Timeout) as caught:
            channel.send(b"x", 0.01)
        assert type(caught.value) is errors.Timeout
        assert channel.stats().messages_sent == 0


def test_timeout_after_it_is_taken_is_an_unknown_outcome() -> None:
    link = Scripted(flushes=[False] * 1000)
    with channel_on(link) as channel:
        with pytest.raises(errors.OutcomeUnknown, match="do not send it again"):
            channel.send(b"x", 0.01)
        assert channel.stats().messages_sent == 1


def test_send_many_says_how_many() -> None:
    link = Scripted(sends=[True, True, *[False] * 1000])
    with channel_on(link) as channel:
        assert channel.send_many([b"a", b"b", b"c"], 0.01) == 2
        with pytest.raises(errors.Timeout):
            channel.send_many([b"c"], 0.01)


def test_recv_many_keeps_an_end_for_the_next_call() -> None:
    end = errors.PeerClosed("gone", url=URL)
    link = Scripted(receives=[b"a", b"b", end, end])
    with channel_on(link) as channel:
        assert channel.recv_many(10, 5) == [b"a", b"b"]
        with pytest.raises(errors.PeerClosed):
            channel.recv_many(10, 5)


def test_recv_many_wants_one_at_least() -> None:
    with channel_on(Scripted()) as channel, pytest.raises(errors.BadOption):
        channel.recv_many(0)


# -- values -------------------------------------------------------------------------------------------------------


def numbers(*values: object) -> list[bytes]:
    return [str(value).encode() for value in values]


INTS = choose("json", int)


def test_recv_many_loses_no_message_to_its_neighbours_error() -> None:
    link = Scripted(receives=numbers(1, 2, '"x"', 3, 4))
    with channel_on(link, INTS) as channel:
        assert channel.recv_many(10, 5) == [1, 2]
        with pytest.raises(errors.SchemaError):
            channel.recv_many(10, 5)
        assert channel.recv(5) == 3
        assert channel.recv_many(10, 5) == [4]
        with pytest.raises(errors.Timeout):
            channel.recv(0)


def test_recv_many_of_one_bad_message_goes_on() -> None:
    link = Scripted(receives=numbers('"x"', 1))
    with channel_on(link, INTS) as channel:
        with pytest.raises(errors.SchemaError):
            channel.recv_many(10, 5)
        buffer = bytearray(8)
        assert channel.recv_into(buffer, 5) == 1
        assert buffer[:1] == b"1"


def test_what_is_kept_is_kept_from_a_small_buffer_too() -> None:
    link = Scripted(receives=numbers(1, '"x"', 22222))
    with channel_on(link, INTS) as channel:
        assert channel.recv_many(10, 5) == [1]
        with pytest.raises(errors.SchemaError):
            channel.recv(5)
        for _ in range(2):
            with pytest.raises(errors.MessageTooLarge):
                channel.recv_into(bytearray(2), 5)
        assert channel.recv(5) == 22222


def test_closed_comes_before_what_was_kept() -> None:
    channel = channel_on(Scripted(receives=numbers(1, '"x"', 2)), INTS)
    assert channel.recv_many(10, 5) == [1]
    channel.close()
    with pytest.raises(errors.Closed):
        channel.recv(5)


def test_async_recv_many_loses_nothing_either() -> None:
    async def main() -> None:
        link = Scripted(receives=numbers(1, '"x"', 2))
        async with AsyncChannel(link, URL, INTS, CAPABILITIES) as channel:
            assert await channel.recv_many(10, 5) == [1]
            with pytest.raises(errors.SchemaError):
                await channel.recv(5)
            buffer = bytearray(4)
            assert await channel.recv_into(buffer, 5) == 1
            assert buffer[:1] == b"2"

    asyncio.run(main())


def test_an_encoding_error_sends_nothing() -> None:
    link = Scripted()
    with channel_on(link, INTS) as channel:
        with pytest.raises(errors.CodecError):
            channel.send_many([1, object()])
        assert link.calls == []


# -- opening ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["listen", "connect", "pair"])
def test_mistakes_are_told_before_anything_is_opened(verb: str) -> None:
    for url, named, error in (
        ("inprok://x", {}, errors.UnknownScheme),
        ("inproc://x?limt=1", {}, errors.BadOption),
        ("inproc://x", {"require": {"durable"}}, errors.Unsupported),
        ("inproc://x", {"require": ["durabel"]}, errors.BadOption),
        ("inproc://x", {"require": "durable"}, errors.Unsupported),
        ("inproc://x", {"codec": "pickle"}, errors.BadOption),
        ("inproc://x", {"codec": "yaml"}, errors.BadOption),
    ):
        with pytest.raises(error):
            getattr(ipckit, verb)(url, **named)
        with pytest.raises(error):
            asyncio.run(getattr(ipckit.aio, verb)(url, **named))
    with pytest.raises(errors.NothingListening):
        ipckit.connect("inproc://x", timeout=0)


def test_a_parsed_url_will_do() -> None:
    with ipckit.listen(parse("inproc://parsed")) as listener, ipckit.connect(listener.url) as channel:
        assert channel.url == listener.url
        listener.accept(5).close()


def test_a_listener_iterates_until_it_is_closed() -> None:
    listener = ipckit.listen("inproc://iterated")
    served = []

    def serve() -> None:
        for channel in listener:
            with channel:
                served.append(channel.recv(5))

    thread = threading.Thread(target=serve)
    thread.start()
    for number in range(3):
        with ipckit.connect("inproc://iterated", timeout=5) as channel:
            channel.send(bytes([number]))
    while len(served) < 3:
        time.sleep(0.001)
    listener.close()
    thread.join(10)
    assert served == [b"\0", b"\1", b"\2"]


def test_an_async_listener_iterates_too() -> None:
    async def main() -> None:
        async with await ipckit.aio.listen("inproc://iterated") as listener:
            client = await ipckit.aio.connect("inproc://iterated", timeout=5)
            async for channel in listener:
                async with channel:
                    await channel.send(b"hello")
                await listener.close()
            assert [message async for message in client] == [b"hello"]
            await client.close()

    asyncio.run(main())


def test_a_thread_talks_to_a_task() -> None:
    def client() -> None:
        with ipckit.connect("inproc://mixed", timeout=5) as channel:
            for number in range(50):
                channel.send(bytes([number]))
                assert channel.recv(5) == bytes([number + 1])

    async def main() -> None:
        async with await ipckit.aio.listen("inproc://mixed") as listener:
            thread = threading.Thread(target=client)
            thread.start()
            async with await listener.accept(5) as channel:
                async for message in channel:
                    await channel.send(bytes([message[0] + 1]))
            thread.join(10)

    asyncio.run(main())


# -- endpoints ----------------------------------------------------------------------------------------------------


def test_repr() -> None:
    left, right = ipckit.pair("inproc://?limit=5")
    assert repr(left) == "<Channel inproc://?limit=5>"
    left.close()
    right.close()
    assert repr(left) == "<Channel inproc://?limit=5 closed>"


def test_only_what_may_be_given_away_is_pickled() -> None:
    left, right = ipckit.pair("inproc://")
    with left, right, pytest.raises(errors.Unsupported, match="pass the URL"):
        pickle.dumps(left)


def test_dropped_without_a_close() -> None:
    link = Scripted()
    channels = [channel_on(link)]
    with pytest.warns(ResourceWarning, match=r"unclosed <Channel toy://x>"):
        channels.clear()
    assert link.closed == 1


def test_dropped_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning that is an error must not keep the endpoint open."""
    import warnings

    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    link = Scripted()
    channel = channel_on(link)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del channel
        gc.collect()
    assert link.closed == 1
    assert len(told) == 1


def test_what_was_never_made_is_not_closed() -> None:
    class Refusing(Channel[bytes]):
        def __init__(self) -> None:
            raise LookupError

    with pytest.raises(LookupError):
        Refusing()
    gc.collect()


def test_the_connecting_side_keeps_nothing_of_its_opening() -> None:
    gc.collect()  # what other tests had left
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(errors.NothingListening):
            ipckit.connect("inproc://nobody", timeout=0.002)
        with pytest.raises(errors.NothingListening):
            asyncio.run(ipckit.aio.connect("inproc://nobody", timeout=0.002))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_priority_where_there_are_none() -> None:
    with channel_on(Scripted()) as channel, pytest.raises(errors.Unsupported, match="priorities"):
        channel.send(b"x", 1, 5)


def test_loan_and_borrow_where_there_are_none() -> None:
    with channel_on(Scripted()) as channel:
        with pytest.raises(errors.Unsupported):
            channel.loan(5)
        with pytest.raises(errors.Unsupported):
            channel.borrow()


@pytest.mark.parametrize("name", ["listen", "connect", "pair"])
def test_the_async_names_have_the_types_of_the_others(name: str) -> None:
    """Without a codec bytes, with `type=` that type: a type checker asks for an annotation otherwise."""
    sync, awaited = get_overloads(getattr(ipckit, name)), get_overloads(getattr(ipckit.aio, name))
    assert len(sync) == len(awaited) == 3
    for one, other in zip(sync, awaited, strict=True):
        assert inspect.signature(one).parameters == inspect.signature(other).parameters
        returns = re.sub(r"(Channel|Listener)", r"Async\1", one.__annotations__["return"])
        assert other.__annotations__["return"] == returns
