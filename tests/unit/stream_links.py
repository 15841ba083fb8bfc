"""Pairs of StreamLinks, and one with a raw socket at its other end: what the tests of the links start from."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ipckit import _native
from ipckit._spi import Peer, Wait

REASONS = ["CLOSED", "ENDED", "GOODBYE", "TIMED_OUT", "UNKNOWN", "TOO_LARGE", "PROTOCOL", "SYSTEM", "UNSUPPORTED"]
NAMES = {getattr(_native, name): name for name in REASONS}
LIMIT = 1 << 20


class GaveUp(Exception):
    def __init__(self, reason: int, operation: str, detail: object) -> None:
        super().__init__(NAMES[reason], operation, detail)
        self.reason, self.operation, self.detail = NAMES[reason], operation, detail


def refuse_fork() -> None:
    raise RuntimeError("forked")


def make(
    rfd: int, wfd: int | None = None, *, limit: int = LIMIT, spin: int = 0, goodbye: bool = True, on_fork: Any = None
):
    wfd = rfd if wfd is None else wfd
    return _native.StreamLink(rfd, wfd, GaveUp, on_fork or refuse_fork, limit, spin, goodbye, Wait, None, Peer(pid=1))


@contextlib.contextmanager
def gives_up(reason: str, detail: object = ...) -> Iterator[None]:
    with pytest.raises(GaveUp) as caught:
        yield
    assert caught.value.reason == reason
    if detail is not ...:
        assert caught.value.detail == detail


@pytest.fixture(name="pair", params=["unix", "tcp", "pipe"])
def both_ends(request: pytest.FixtureRequest):
    links = make_pair(request.param)
    yield links
    for link in links:
        link.close()


def make_pair(kind: str, **options: Any):
    if kind == "pipe":
        (r1, w1), (r2, w2) = os.pipe(), os.pipe()
        return make(r1, w2, **options), make(r2, w1, **options)
    if kind == "unix":
        left, right = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            left = socket.create_connection(server.getsockname())
            right, _ = server.accept()
    return make(left.detach(), **options), make(right.detach(), **options)


@pytest.fixture(name="raw")
def one_end():
    """A link, and the raw socket at its other end."""
    mine, theirs = socket.socketpair()
    link = make(mine.detach())
    with theirs:
        theirs.settimeout(5)
        yield link, theirs
        link.close()


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


def fill(link) -> int:
    """Send until nothing more is accepted; the number of frames, the last of which left a rest."""
    count = 0
    while link.try_send(b"y" * 60000):
        count += 1
    assert not link.try_flush()
    return count


@contextlib.contextmanager
def background(work: Any) -> Iterator[None]:
    trouble: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join(10)
        assert not thread.is_alive()
    if trouble:
        raise trouble[0]


def open_descriptors() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}
