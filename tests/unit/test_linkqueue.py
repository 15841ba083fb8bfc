"""Queues over links, beyond their contract: frames, garbage, foreign senders, kills under load, what a broken link repeats."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
from ipckit import _linkwire as wire
from ipckit import aio, errors
from ipckit.message import Parcel
from ipckit.testing.conformance import free_port

_spawn = multiprocessing.get_context("spawn")
ids = st.one_of(
    st.just(""), st.binary(min_size=16, max_size=16).map(bytes.hex), st.from_regex(r"[!-~]{1,128}", fullmatch=True)
)
headers = st.dictionaries(
    st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,63}", fullmatch=True),
    st.text(st.characters(min_codepoint=0x80, max_codepoint=0x2FFF)),
)


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))


@given(
    st.binary(), ids, headers, st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.sampled_from(["", "a.b", "ü"])
)
def test_messages_survive_the_wire(body, id, headers, redelivered, gap, topic):
    parcel = Parcel(body, id, headers, topic=topic, redelivered=redelivered)
    frame = wire.with_gap(wire.message(parcel), gap)
    parcel.gap = gap
    assert wire.read_message(frame) == parcel


def until_it_ends(channel, timeout=5):
    while True:
        channel.recv(timeout)


def test_a_plain_message_costs_two_bytes():
    assert wire.message(Parcel(b"body")) == b"\x02\x00body"
    assert len(wire.message(Parcel(b"", "0" * 32))) == 18


@given(st.sets(st.integers(1, 200)))
def test_acknowledgements_are_ranges(numbers):
    if numbers:
        ranges = wire.read_ack(wire.ack(numbers))
        assert [n for first, count in ranges for n in range(first, first + count)] == sorted(numbers)


@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error_or_a_frame(data):
    for read in (wire.read_message, wire.read_ack, wire.read_nack, wire.read_end):
        with contextlib.suppress(errors.ProtocolError):
            read(b"\x02" + data)
    for role in wire.ROLES:
        with contextlib.suppress(errors.ProtocolError):
            wire.read_hello(b"\x01" + data, role)


@pytest.mark.parametrize(
    "bad",
    [b"", b"\x07", b"\x02", b"\x02\xff", b"\x02\x04short", b"\x03", b"\x01\x01\x01short", b"\x01\x09\x01" + bytes(16)],
)
def test_garbage_costs_one_link(bad):
    with ipckit.receiver("unix://q") as receiver, ipckit.sender("unix://q") as good, ipckit.connect("unix://q") as evil:
        good.send(b"before", 5)
        evil.send(bad, 5)
        good.send(b"after", 5)
        assert [receiver.recv(5).value, receiver.recv(5).value] == [b"before", b"after"]
        with pytest.raises(errors.Timeout):
            receiver.recv(0.05)
        with pytest.raises(errors.PeerError):
            until_it_ends(evil)


def test_one_that_overruns_its_window_is_cut_off():
    with ipckit.receiver("unix://q?prefetch=100", ack="manual") as receiver, ipckit.connect("unix://q") as evil:
        evil.send_many([b"\x02\x00%d" % n for n in range(150)])
        got = [receiver.recv(5).value for _ in range(100)]
        assert got == [b"%d" % n for n in range(100)]
        with pytest.raises(errors.Timeout):
            receiver.recv(0.2)


def test_an_acknowledgement_of_what_was_not_sent_costs_the_link():
    with ipckit.sender("unix://q", listen=True) as sender, ipckit.connect("unix://q") as evil:
        evil.send(wire.hello(wire.Hello(wire.RECEIVER, window=5)))
        sender.send(b"1", 5)
        evil.send(wire.ack([1, 2, 3]))
        with pytest.raises(errors.PeerError):
            until_it_ends(evil)
        with ipckit.receiver("unix://q", listen=False, timeout=5) as good:
            assert good.recv(5).value == b"1"


def send_slowly(sender):
    for _ in range(100):
        sender.send(b"x", 1)
        time.sleep(0.02)


def test_two_of_a_kind_are_told():
    with (
        ipckit.sender("unix://q", listen=True),
        ipckit.sender("unix://q") as other,
        pytest.raises(errors.ProtocolError, match="sender where a receiver should be"),
    ):
        send_slowly(other)


def test_the_foreign_producer_of_the_docs():
    text = (Path(__file__).parents[2] / "docs/wire/queue.md").read_text()
    port = free_port()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0].replace("7000", str(port))
    with ipckit.receiver(f"tcp://127.0.0.1:{port}") as receiver:
        producer = threading.Thread(target=exec, args=(code, {}))
        producer.start()
        assert [receiver.recv(5).value for _ in range(60)] == [b"job %d" % n for n in range(60)]
        with pytest.raises(errors.Timeout):
            receiver.recv(0.2)  # acknowledges the last
        producer.join(5)
        assert not producer.is_alive()


class Proxy:
    """Forwards to a listener, and cuts all its connections when asked."""

    def __init__(self, target: int) -> None:
        self.target, self.pairs = target, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                one, _ = self.server.accept()
            except OSError:
                return
            other = socket.create_connection(("127.0.0.1", self.target))
            self.pairs += [one, other]
            for a, b in ((one, other), (other, one)):
                threading.Thread(target=self.forward, args=(a, b), daemon=True).start()

    def forward(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)

    def cut(self) -> None:
        pairs, self.pairs = self.pairs, []
        for each in pairs:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self.server.close()
        self.cut()


def test_broken_links_make_no_duplicates_and_no_losses():
    """The sender sends again what it cannot know about, and the receiver knows it again."""
    port = free_port()
    with ipckit.receiver(f"tcp://127.0.0.1:{port}") as receiver:
        proxy = Proxy(port)
        with ipckit.sender(f"tcp://127.0.0.1:{proxy.port}", timeout=5) as sender:
            count = 3000
            sending = threading.Thread(target=lambda: [sender.send(b"%d" % n, 20) for n in range(count)])
            sending.start()
            got = []
            while len(got) < count:
                got.append(int(receiver.recv(20).value))
                if len(got) % 500 == 250:
                    proxy.cut()
            sending.join(20)
            draining = threading.Thread(target=sender.drain, args=(20,))
            draining.start()
            while draining.is_alive():  # what is sent again after the last cut is acknowledged by a receiver that looks
                with pytest.raises(errors.Timeout):
                    receiver.recv(0.1)
            assert sender.stats()["unacknowledged"] == 0
            assert sorted(got) == list(range(count))
            assert sender.stats()["reconnects"] >= 3
        proxy.close()


def work(url: str, journal: str) -> None:
    with ipckit.receiver(url, listen=False, ack="manual") as receiver, open(journal, "ab", buffering=0) as done:
        for message in receiver:
            done.write(message.value + b"\n")
            message.ack()


@pytest.mark.timeout(120)
def test_receivers_killed_under_load(tmp_path):
    """Every message is worked on, whoever is killed; twice only where the kill came between the work and its acknowledgement."""
    count, kills = 6000, 8
    journals = [tmp_path / f"{number}.log" for number in range(kills + 2)]
    with ipckit.sender("unix://q", listen=True) as sender:
        workers = []

        def start() -> None:
            worker = _spawn.Process(target=work, args=("unix://q", str(journals[len(workers)])), daemon=True)
            worker.start()
            workers.append(worker)

        start()
        start()
        sending = threading.Thread(target=lambda: [sender.send(b"%d" % n) for n in range(count)])
        sending.start()
        for victim in range(kills):
            time.sleep(0.3)
            workers[victim].kill()
            start()
        sending.join(60)
        assert not sending.is_alive()
        sender.drain(30)
        done = Counter(int(line) for journal in journals if journal.exists() for line in journal.read_bytes().split())
        for worker in workers:
            worker.kill()
            worker.join()
            worker.close()
    assert set(done) == set(range(count))
    assert sum(done.values()) - count <= kills * 2


def test_an_idle_sender_still_redelivers():
    """Nobody calls it; the keeper's thread does what there is to do."""
    with ipckit.sender("unix://q", listen=True) as sender:
        with ipckit.receiver("unix://q", listen=False, ack="manual") as first:
            sender.send(b"x", 5)
            assert first.recv(5).redelivered == 0
        with ipckit.receiver("unix://q", listen=False) as second:
            assert second.recv(5).redelivered == 1


def test_prefetch_is_the_window():
    with (
        ipckit.sender("unix://q", listen=True) as sender,
        ipckit.receiver("unix://q?prefetch=3", listen=False) as receiver,
    ):
        for number in range(3):
            sender.send(b"%d" % number, 5)
        with pytest.raises(errors.Timeout):
            sender.send(b"too many", 0.1)
        assert receiver.recv(5).value == b"0"
        assert receiver.recv(5).value == b"1"
        sender.send(b"room again", 5)
    with pytest.raises(errors.BadOption, match="prefetch"):
        ipckit.receiver("unix://q?prefetch=0")


def test_a_batch_is_shared():
    with ipckit.sender("unix://q", listen=True) as sender:
        receivers = [ipckit.receiver("unix://q", listen=False, timeout=5) for _ in range(3)]
        deadline = time.monotonic() + 20
        while sender.stats()["receivers"] < 3:
            assert time.monotonic() < deadline
        sender.send_many([b"%d" % number for number in range(12)], 5)
        for receiver in receivers:
            with receiver:
                assert len([receiver.recv(5) for _ in range(4)]) == 4


@pytest.mark.parametrize("where", ["tcp", "grpc"])
def test_one_acknowledges_while_another_receives(where):
    """Whoever receives may send what the other waits to see off: then it wakes the other, and does not keep it for itself."""
    if where == "grpc":
        pytest.importorskip("grpc")

    def receive():
        with contextlib.suppress(errors.Closed):
            while True:
                messages.put(work.recv())

    def acknowledge():
        for _ in range(100):
            messages.get(timeout=30).ack(timeout=30)

    async def awaited():
        async with (
            await aio.receiver(f"{where}://127.0.0.1:0", ack="manual") as work,
            await aio.sender(work.url, timeout=10) as jobs,
        ):
            acks = []

            async def receive():
                while len(acks) < 100:
                    acks.append(asyncio.create_task((await work.recv(30)).ack(timeout=30)))

            receiving = asyncio.create_task(receive())
            for _ in range(100):
                await jobs.send(b"x", 10)
            await receiving
            idle = asyncio.create_task(work.recv(30))
            await asyncio.gather(*acks)
            await jobs.drain(30)
            await jobs.send(b"end", 10)
            assert (await idle).value == b"end"

    messages = queue.SimpleQueue()
    with ipckit.receiver(f"{where}://127.0.0.1:0", ack="manual") as work, ipckit.sender(work.url, timeout=10) as jobs:
        threads = [threading.Thread(target=receive), threading.Thread(target=acknowledge)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            jobs.send(b"x", 10)
        jobs.drain(30)
        threads[1].join()
        work.close()
        threads[0].join()
    asyncio.run(awaited())


def test_the_url_has_the_port_that_was_chosen():
    with ipckit.receiver("tcp://127.0.0.1:0") as receiver, ipckit.sender(receiver.url, timeout=5) as sender:
        assert receiver.url.host.port
        sender.send(b"x", 5)
        assert receiver.recv(5).value == b"x"


def test_who_loses_its_link_on_the_way_to_sleep_wakes_to_dial():
    """What it sleeps on was made before there was anything to wait for; and the keeper's epoll has forgotten the link as well."""
    from ipckit._linkcrowd import Crowd, Member
    from ipckit._linkdialer import Dialer
    from ipckit._spi import Want
    from ipckit._url import parse
    from ipckit.transports import unix

    url = parse("unix://x")
    ours, theirs = unix.TRANSPORT.pair(url, unix.TRANSPORT.options())

    def dial():
        if dialled:
            raise errors.NothingListening("nobody", url=url)
        dialled.append(True)
        return ours
        yield

    dialled = []
    crowd = Crowd(url, Dialer(url, dial), b"", Member, lambda member, error: None, ends=True)
    crowd.stir()
    assert crowd.next_frame() is None
    crowd.arm()
    wait = crowd.sleep(Want.SEND)
    assert not ready(wait)
    theirs.close()
    assert crowd.next_frame() is None  # the last try before the sleep
    assert not crowd.members
    assert ready(wait)
    assert crowd.restless
    crowd.close()


def ready(wait):
    poll = select.poll()
    for fd, events in wait.fds:
        poll.register(fd, events)
    return bool(poll.poll(0))
