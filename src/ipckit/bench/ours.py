"""ipckit as a contender: a Channel, opened by its URL, in either shell."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from urllib.parse import parse_qsl

from .. import aio, opening
from .._url import Url, parse
from .wires import QUIET, AsyncWire, End, Handed, Wire

_OPEN = 10.0  # seconds


def target(end: End) -> Url:
    """What to connect to: the announced address, with the options of this side where they differ."""
    url = parse(end.address)
    return replace(url, options=tuple(parse_qsl(end.options, strict_parsing=True))) if end.options else url


@contextmanager
def sync(end: End) -> Iterator[Wire]:
    """One end of a Channel."""
    if end.side == "echo":
        with opening.listen(end.address, timeout=_OPEN) as listener:
            end.announce(listener.url.reveal())
            ch = listener.accept(timeout=_OPEN)
    else:
        ch = opening.connect(target(end), timeout=_OPEN)
    with ch:
        yield Wire(ch.send, ch.recv, ch.send_many, ch.recv_many, recv_soon=partial(ch.recv, QUIET))


@contextmanager
def pipe_ends(address: str) -> Iterator[tuple[Handed, Handed]]:
    """Both ends of an anonymous pipe, for two children."""
    left, right = opening.pair(address)
    with left, right:
        yield left.native.hand_over(), right.native.hand_over()


@contextmanager
def inherited(end: End) -> Iterator[Wire]:
    """One of those ends."""
    if end.side == "echo":
        end.announce("")
    with opening.connect(end.address, timeout=_OPEN) as ch:
        yield Wire(ch.send, ch.recv, ch.send_many, ch.recv_many)


@asynccontextmanager
async def awaited(end: End) -> AsyncIterator[AsyncWire]:
    """One end of an AsyncChannel."""
    if end.side == "echo":
        listener: aio.Listener[bytes] = await aio.listen(end.address, timeout=_OPEN)
        async with listener:
            end.announce(listener.url.reveal())
            ch = await listener.accept(timeout=_OPEN)
    else:
        ch = await aio.connect(target(end), timeout=_OPEN)
    async with ch:
        yield AsyncWire(ch.send, ch.recv, ch.send_many, ch.recv_many)
