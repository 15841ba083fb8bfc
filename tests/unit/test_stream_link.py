"""StreamLink against a raw socket and against itself: frames, several at once, and peers of another make."""

import contextlib
import os
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .stream_links import LIMIT, GaveUp, background, both_ends, frame, gives_up, make, one_end  # noqa: F401 - fixtures

# -- frames --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 64, 4096, 4097, 65531, 65532, 65533, 300000, LIMIT])
def test_sizes(pair, size: int) -> None:
    left, right = pair
    payload = os.urandom(size)
    with background(lambda: left.send(payload)):
        assert right.recv(timeout=5) == payload
    with background(lambda: right.send(memoryview(payload))):
        assert left.recv() == payload
    assert left.counters() == right.counters() == (1, size, 1, size)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_split_of_the_bytes_yields_the_same_frames(data: st.DataObject) -> None:
    sizes = st.one_of(st.integers(0, 200), st.sampled_from([4096, 65530, 65532, 65533, 70000, 150000]))
    payloads = [bytes([i % 251]) * size for i, size in enumerate(data.draw(st.lists(sizes, max_size=12)))]
    stream = b"".join(map(frame, payloads))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    mine, theirs = socket.socketpair()
    link = make(mine.detach())
    received = []
    with theirs:
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            part = memoryview(stream)[start:end]
            while part:
                theirs.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    part = part[theirs.send(part) :]
                match data.draw(st.sampled_from(["try_recv", "recv", "recv_many", "recv_into"])):
                    case "try_recv":
                        if (got := link.try_recv()) is not None:
                            received.append(got)
                    case "recv":
                        with contextlib.suppress(GaveUp):
                            received.append(link.recv(timeout=0))
                    case "recv_many":
                        with contextlib.suppress(GaveUp):
                            received += link.recv_many(3, timeout=0)
                    case _:
                        buffer = bytearray(200000)
                        with contextlib.suppress(GaveUp):
                            received.append(bytes(buffer[: link.recv_into(buffer, timeout=0)]))
    with gives_up("ENDED", False):
        while True:
            received.append(link.recv())
    assert received == payloads
    link.close()


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=150, deadline=None)
def test_rubbish_ends_the_link_and_nothing_else(rubbish: bytes, goodbye: bool) -> None:
    mine, theirs = socket.socketpair()
    link = make(mine.detach(), limit=1000, goodbye=goodbye)
    with theirs:
        theirs.send(rubbish)
    with pytest.raises(GaveUp) as caught:
        assert all(len(payload) <= 1000 for payload in iter(link.recv, None))
    assert caught.value.reason in {"ENDED", "PROTOCOL", "GOODBYE"}
    with gives_up(caught.value.reason):
        link.recv()
    with gives_up(caught.value.reason):
        link.send(b"")
    link.close()


def test_a_hostile_prefix_costs_no_memory(raw) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    links = [raw[0]]
    before = resident()
    mine, theirs = socket.socketpair()
    links.append(make(mine.detach(), limit=512 << 20))
    theirs.send(struct.pack(">I", 512 << 20) + b"x" * 10)
    assert links[1].try_recv() is None
    raw[1].send(b"\xff\xff\xff\xfe")
    with gives_up("PROTOCOL", f"length prefix {0xFFFFFFFE} is above the limit of {LIMIT}"):
        raw[0].recv()
    assert resident() - before < 1 << 20
    theirs.close()
    with gives_up("ENDED", True):
        links[1].recv()
    links[1].close()


def test_above_the_limit_is_refused_and_harmless(pair) -> None:
    left, right = pair
    for send in (left.send, left.try_send, lambda payload: left.send_many([b"x", payload])):
        with gives_up("TOO_LARGE", (LIMIT + 1, LIMIT)):
            send(bytes(LIMIT + 1))
    left.send(b"fits")
    assert right.recv() == b"fits"
    assert right.try_recv() is None


def test_only_contiguous_buffers(pair) -> None:
    left, right = pair
    with pytest.raises(TypeError):
        left.send("text")
    with pytest.raises(BufferError):
        left.send(memoryview(b"abcdef")[::2])
    left.send(bytearray(b"array"))
    assert right.recv() == b"array"


# -- recv_into, and the many ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 200000])
def test_recv_into(pair, size: int) -> None:
    left, right = pair
    buffer = bytearray(size + 5)
    payload = os.urandom(size)
    with background(lambda: (left.send(payload), left.send(payload))):
        with gives_up("TOO_LARGE", (size, size - 1)):
            right.recv_into(memoryview(buffer)[: size - 1], timeout=5)
        assert right.recv_into(buffer, timeout=5) == size
        assert buffer[:size] == payload
        assert right.recv() == payload
    with pytest.raises((TypeError, BufferError)):
        right.recv_into(b"constant")


def test_recv_into_keeps_what_came_of_an_unfinished_frame(raw) -> None:
    link, theirs = raw
    payload = os.urandom(150000)
    theirs.send(frame(payload)[:100000])
    buffer = bytearray(200000)
    with gives_up("TIMED_OUT"):
        link.recv_into(buffer, timeout=0.01)
    buffer[:] = bytes(200000)
    with gives_up("TOO_LARGE", (150000, 10)):
        link.recv_into(bytearray(10), timeout=0)
    theirs.send(frame(payload)[100000:])
    assert link.recv_into(buffer) == 150000
    assert buffer[:150000] == payload


def test_many(pair) -> None:
    left, right = pair
    payloads = [os.urandom(size) for size in [*range(0, 6000, 11), 100000, 3, 200000, *range(900)]]
    received: list[bytes] = []
    with background(lambda: left.send_many(payloads)):
        while len(received) < len(payloads):
            some = right.recv_many(100, timeout=5)
            assert 1 <= len(some) <= 100
            received += some
    assert received == payloads
    assert left.counters()[:2] == (len(payloads), sum(map(len, payloads)))
    assert left.send_many([]) == 0


def test_send_many_tells_how_many_were_accepted(pair) -> None:
    left, right = pair
    payloads = [b"%06d" % i * 500 for i in range(5000)]
    accepted = left.send_many(payloads, timeout=0.05)
    assert 0 < accepted < len(payloads)
    with gives_up("TIMED_OUT"):
        while True:  # TCP finds a little more room now and then
            accepted += left.send_many(payloads[accepted:], timeout=0)
    assert left.counters()[0] == accepted
    received = []
    while len(received) < accepted:
        received += right.recv_many(1000, timeout=5)
        left.try_flush()
    assert received == payloads[:accepted]
    assert right.try_recv() is None


def test_recv_many_leaves_the_end_to_the_next_call(pair) -> None:
    left, right = pair
    left.send_many([b"1", b"2"])
    left.close()
    assert right.recv_many(10) == [b"1", b"2"]
    with gives_up("GOODBYE"):
        right.recv_many(10)
    with pytest.raises(ValueError, match="limit"):
        right.recv_many(0)


# -- peers of another make


def test_a_glance_takes_nothing(raw) -> None:
    link, peer = raw
    assert link.try_glance(5) is None
    peer.send(b"\0\0\0")
    assert link.try_glance(5) is None
    peer.send(b"\1xrest")
    assert link.try_glance(5) == link.try_glance(5) == b"\0\0\0\1x"
    assert link.try_recv() == b"x"
    peer.send(b"\xff\xff\xff\xff")
    assert link.try_glance(5) == b"rest\xff"  # a length above the limit: that is for who reads
    with gives_up("PROTOCOL"):
        link.try_recv()


@pytest.mark.parametrize("more", [b"", b"{", b"\xff\xff\xff\xff"])
def test_a_glance_at_a_length_above_the_limit_hears_what_follows_and_the_end(raw, more: bytes) -> None:
    link, peer = raw
    peer.send(b"\x7f\0\0\0")
    assert link.try_glance(5) is None
    peer.send(more)
    if more:
        assert link.try_glance(5) == b"\x7f\0\0\0" + more[:1]
    peer.close()
    for _ in range(2):
        with gives_up("PROTOCOL"):
            link.try_recv() if more else link.try_glance(5)


def test_a_stranger_whose_frame_is_too_large_can_be_told(raw) -> None:
    link, peer = raw
    link.reframe(0, 0)
    peer.send(b"\x7f\0\0\0{")
    for _ in range(2):
        with gives_up("PROTOCOL"):
            link.try_recv()
    assert link.try_send(b"too large")
    assert peer.recv(100) == b"\0\0\0\ttoo large"
    link.close()
    assert peer.recv(100) == b""


def test_a_glance_hears_the_end(raw) -> None:
    link, peer = raw
    peer.send(b"\xff\xff\xff\xff")
    with gives_up("GOODBYE"):
        link.try_glance(5)
    with pytest.raises(ValueError, match="64"):
        link.try_glance(65)


@pytest.mark.parametrize("sent", [b"", b"\0", b"\0\0\0\0", b"\0\1\0\0", b"\0\0\0\1"])
def test_a_glance_hears_an_end_that_comes_too_soon(raw, sent: bytes) -> None:
    link, peer = raw
    peer.send(sent)
    peer.shutdown(socket.SHUT_WR)
    with gives_up("ENDED"):
        link.try_glance(5)


@pytest.mark.parametrize("size", [3, 100, 5000, 300_000, LIMIT + 3])
def test_a_header_that_the_length_does_not_count(raw, size: int) -> None:
    link, peer = raw
    peer.setblocking(True)
    link.reframe(2, 3)
    body = os.urandom(size)
    sent = struct.pack(">I", size - 3) + body

    def send() -> None:
        link.send(body, 10)
        link.send_many([body], 10)

    with background(send):
        got = b""
        while len(got) < 2 * len(sent):
            got += peer.recv(1 << 16)
    assert got == 2 * sent
    said = os.urandom(size - 1)
    with background(lambda: peer.sendall(struct.pack(">I", size - 3) + said)):
        assert link.recv(10) == said
    with pytest.raises(ValueError, match="shorter than its header"):
        link.try_send(b"xx")
    link.close()
    assert peer.recv(10) == b""  # such a peer would take a goodbye for a length
