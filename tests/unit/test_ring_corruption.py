# ruff: noqa: PT017 - which of several errors comes is a matter of chance here
"""A peer that writes anything anywhere, at any time: its own link ends with a typed error, and nothing else happens."""

import contextlib
import mmap
import os
import random
import resource
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipckit import _native
from ipckit._spi import Peer, Wait

PAGE = os.sysconf("SC_PAGESIZE")
CAPACITY = 1 << 14
LIMIT = 1 << 16
RINGS = 256  # where the header's counters begin


class GaveUp(Exception):
    pass


def no_fork():
    raise AssertionError


class Pair:
    """Two links, and the raw memory between them."""

    def __init__(self, spin=-1):
        memory = _native.ring_create(CAPACITY)
        bells = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]
        copies = os.dup(memory), [os.dup(bell) for bell in bells]
        self.raw = mmap.mmap(memory, PAGE + 2 * CAPACITY)
        left, right = socket.socketpair()
        self.left = self._link(memory, bells, left.detach(), 0, spin)
        self.right = self._link(*copies, right.detach(), 1, spin)

    @staticmethod
    def _link(memory, bells, control, side, spin):
        return _native.RingLink(
            memory, tuple(bells), control, side, lambda *why: GaveUp(*why), no_fork, LIMIT, spin, Wait, None, Peer()
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left.close()
        self.right.close()
        self.raw.close()


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


#: What a call may end with when the memory lies.
TYPED = {_native.PROTOCOL, _native.TIMED_OUT, _native.UNKNOWN, _native.GOODBYE, _native.ENDED}


def use(link):
    """Every way in, none of which may crash or stay."""
    calls = [
        lambda: link.recv(0.001),
        link.try_recv,
        lambda: link.recv_many(10, 0),
        lambda: link.recv_into(bytearray(100), 0),
        lambda: link.send(b"x" * 100, 0.001),
        lambda: link.try_send(b"y" * 20_000),
        link.try_flush,
        lambda: link.send_many([b"z"] * 10, 0),
        lambda: link.arm(3),
    ]
    for call in calls:
        try:
            call()
        except GaveUp as gave_up:
            assert gave_up.args[0] in TYPED | {_native.TOO_LARGE}
    with contextlib.suppress(GaveUp):
        borrow = link.try_borrow()
        if borrow is not None:
            with borrow as view:
                bytes(view)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, PAGE + 2 * CAPACITY - 1), st.binary(min_size=1, max_size=64)), max_size=8),
    st.lists(st.binary(max_size=9000), max_size=5),
    st.booleans(),
)
def test_random_bytes_anywhere(writes, frames, header_only):
    with Pair(spin=0) as pair:
        for frame in frames:
            with contextlib.suppress(GaveUp):
                pair.left.send(frame, 0)
        for at, data in writes:
            if header_only:
                at = RINGS + at % 512
            data = data[: len(pair.raw) - at]
            pair.raw[at : at + len(data)] = data
        use(pair.right)
        use(pair.left)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**64 - 1), st.sampled_from(range(RINGS, RINGS + 512, 8)), st.binary(max_size=64))
def test_random_words_in_the_counters(word, at, record):
    with Pair(spin=0) as pair:
        pair.left.send(b"before", 0)
        pair.raw[PAGE : PAGE + len(record)] = record
        pair.raw[at : at + 8] = word.to_bytes(8, "little")
        use(pair.right)
        use(pair.left)


def spoil(raw, chance, count, stop):
    """`count` writes into live memory: mostly counters and record headers, where it hurts."""
    for _ in range(count):
        if stop.is_set():
            return
        where = chance.random()
        if where < 0.3:
            at, size = RINGS + 8 * chance.randrange(64), 8
        elif where < 0.4:
            at, size = RINGS + chance.randrange(512), 1
        elif where < 0.8:
            at, size = PAGE + 8 * chance.randrange(2 * CAPACITY // 8), 8
        else:
            at = PAGE + chance.randrange(2 * CAPACITY - 64)
            size = chance.randrange(1, 64)
        style = chance.random()
        if style < 0.4:
            data = chance.randbytes(size)
        elif style < 0.7:
            data = chance.choice([0, 1, 8, 100, CAPACITY, CAPACITY + 8, 2**32, 2**63, 2**64 - 8]).to_bytes(8, "little")
        else:
            data = (chance.randrange(200) | (0x69706300 | chance.randrange(6)) << 32).to_bytes(8, "little")
        raw[at : at + size] = (data * 8)[:size]


def traffic(link, seed, stop, outcomes):
    chance = random.Random(seed)
    try:
        while not stop.is_set():
            begin = time.monotonic()
            try:
                if chance.random() < 0.5:
                    link.send(bytes(chance.choice([0, 8, 100, 3000, 30_000])), 0.002)
                else:
                    link.recv(0.002)
            except GaveUp as gave_up:
                assert gave_up.args[0] in TYPED
                if gave_up.args[0] in (_native.PROTOCOL, _native.GOODBYE, _native.ENDED):
                    outcomes.append(gave_up.args[0])
                    return
            finally:
                assert time.monotonic() - begin < 10, "a call stayed far beyond its timeout"
    except BaseException as error:
        outcomes.append(error)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_ten_thousand_live_mutations():
    """The memory is spoiled while both sides send and receive. A link that has ended is replaced by a fresh one."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    outcomes = []
    done = 0
    before = None
    peak = 0
    while done < 10_000:
        with Pair(spin=chance.choice([0, 20_000])) as pair:
            stop = threading.Event()
            threads = [
                threading.Thread(target=traffic, args=(link, chance.random(), stop, outcomes))
                for link in (pair.left, pair.left, pair.right, pair.right)
            ]
            for thread in threads:
                thread.start()
            part = chance.randrange(20, 200)
            for _ in range(part):
                spoil(pair.raw, chance, 1, stop)
                time.sleep(0.00002)
                if not any(thread.is_alive() for thread in threads):
                    break
                done += 1
            stop.set()
            for thread in threads:
                thread.join(30)
                assert not thread.is_alive(), f"a call never returned (seed {seed})"
        wrong = [outcome for outcome in outcomes if not isinstance(outcome, int)]
        assert not wrong, f"{wrong[0]!r} (seed {seed})"
        if before is None and done > 500:
            before = resident()
        peak = max(peak, resident())
    assert before is not None
    assert peak - before < 1 << 20, f"memory grew by {peak - before} (seed {seed})"
    assert _native.PROTOCOL in outcomes, "the mutations hit nothing"


def test_a_false_size_costs_no_memory():
    """A header that promises the whole limit is believed, but nothing is touched before its bytes come."""
    limit = 1 << 30
    memory = _native.ring_create(CAPACITY)
    bells = [os.eventfd(0) for _ in range(4)]
    ends = socket.socketpair()
    raw = mmap.mmap(memory, PAGE + 2 * CAPACITY)
    link = _native.RingLink(
        memory, tuple(bells), ends[0].detach(), 1, lambda *why: GaveUp(*why), no_fork, limit, 0, Wait, None, Peer()
    )
    raw[PAGE : PAGE + 8] = (16 | 0x69706302 << 32).to_bytes(8, "little")
    raw[PAGE + 8 : PAGE + 16] = limit.to_bytes(8, "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    raw[RINGS : RINGS + 8] = (24).to_bytes(8, "little")
    assert link.try_recv() is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1024
    ends[1].close()
    with pytest.raises(GaveUp):
        link.recv(1)
    link.close()
    raw.close()
