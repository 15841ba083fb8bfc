"""`Wire.turn` for a contender that knows nothing of it: both ends of a second place, opened in the driving process.

One thread then sends a message and receives it, so that no other process has to be woken. Some ends can only be opened while
the other is (a FIFO, a handshake), so the receiving one is opened by a thread of its own, which then ends.
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from .wires import AsyncOpener, AsyncWire, End, Opener, Wire

_OPEN = 15.0  # seconds


def turning(opener: Opener) -> Opener:
    """The opener, with a `turn` on its driving side."""

    @contextmanager
    def opened(end: End) -> Iterator[Wire]:
        with opener(end) as wire, ExitStack() as inner, ExitStack() as outer, ThreadPoolExecutor(1) as opening:
            if end.side == "echo":
                yield wire
                return
            told: queue.SimpleQueue[str] = queue.SimpleQueue()
            echo = End("echo", end.loop, told.put, (), end.options)
            inward = opening.submit(lambda: inner.enter_context(opener(echo)))
            inward.add_done_callback(lambda _: told.put(""))  # if it failed, or has no address to tell
            address = told.get(timeout=_OPEN)
            if not address and inward.done():
                inward.result()
            out = outer.enter_context(opener(replace(end, address=address or end.loop)))
            send, recv = out.send, inward.result(_OPEN).recv

            def turn(data: bytes) -> bytes:
                send(data)
                return recv()

            yield replace(wire, turn=turn)

    opened.__doc__ = opener.__doc__
    return opened


def aturning(opener: AsyncOpener) -> AsyncOpener:
    """`turning`, awaited."""

    @asynccontextmanager
    async def opened(end: End) -> AsyncIterator[AsyncWire]:
        async with opener(end) as wire, AsyncExitStack() as stack:
            if end.side == "echo":
                yield wire
                return
            told: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            echo = opener(End("echo", end.loop, told.set_result, (), end.options))
            # Some take only when they are connected, so both are opened at once. Each is left where it was entered.
            opening = asyncio.ensure_future(echo.__aenter__())
            waiting: set[asyncio.Future[Any]] = {told, opening}
            await asyncio.wait(waiting, timeout=_OPEN, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
            stack.push_async_exit(echo)
            out = await stack.enter_async_context(opener(replace(end, address=told.result() or end.loop)))
            send, recv = out.send, (await opening).recv

            async def turn(data: bytes) -> bytes:
                await send(data)
                return await recv()

            yield replace(wire, turn=turn)

    opened.__doc__ = opener.__doc__
    return opened
