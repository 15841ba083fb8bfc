"""The raw contenders of the queue on a broker's client library, in both shells: what a careful user writes by hand.

JetStream: publish, and its confirmation waited for; fetch(1); ack, which nats-py writes and does not wait for. Many: all
publishes confirmed together, fetch(n). Redis Streams: XADD, XREADGROUP of one, XACK, each answered before the next; many: one
pipeline, XREADGROUP of many, one XACK. Storage, replicas and syncing are the server's defaults, as for ours; ours
also has the server drop a message that is sent twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from .raw_brokers import place, redis_arguments
from .wires import AsyncWire, End, Wire, not_here

_GROUP = "g"
_LONG = 60.0  # seconds that one fetch may wait


# -- JetStream ----------------------------------------------------------------------------------------------------


@contextmanager
def nats(end: End) -> Iterator[Wire]:
    """nats-py, its loop run for each call: there is no synchronous client."""
    loop = asyncio.new_event_loop()
    run = loop.run_until_complete
    opened = anats(end)
    wire = run(opened.__aenter__())
    turn, send_many, recv_many = wire.turn, wire.send_many, wire.recv_many
    try:
        yield Wire(
            lambda data: run(wire.send(data)),
            lambda: run(wire.recv()),
            send_many and (lambda bodies: run(send_many(bodies))),
            recv_many and (lambda limit: run(recv_many(limit))),
            turn=turn and (lambda data: run(turn(data))),
        )
    finally:
        run(opened.__aexit__(None, None, None))
        loop.close()


@asynccontextmanager
async def anats(end: End) -> AsyncIterator[AsyncWire]:
    """nats-py."""
    import nats

    server, name = place(end.address)
    client: Any = await nats.connect(server, allow_reconnect=False)
    js = client.jetstream()
    try:
        if end.side == "echo":
            await js.add_stream(name=name, subjects=[name])
            subscription = await js.pull_subscribe(name, _GROUP)
            end.announce(end.address)
            yield AsyncWire(not_here, _fetching(subscription), recv_many=_fetching_many(subscription))
        else:
            own = place(end.loop)[1]
            await js.add_stream(name=own, subjects=[own])
            recv = _fetching(await js.pull_subscribe(own, _GROUP))

            async def turn(data: bytes) -> bytes:
                await js.publish(own, data)
                body: bytes = await recv()
                return body

            async def send_many(bodies: list[bytes]) -> None:
                await asyncio.gather(*[await js.publish_async(name, body) for body in bodies])

            yield AsyncWire(lambda data: js.publish(name, data), not_here, send_many, turn=turn)
    finally:
        await client.close()


def _fetching(subscription: Any) -> Any:
    async def recv() -> bytes:
        (message,) = await subscription.fetch(1, timeout=_LONG)
        await message.ack()
        body: bytes = message.data
        return body

    return recv


def _fetching_many(subscription: Any) -> Any:
    async def recv_many(limit: int) -> list[bytes]:
        # fetch(n) waits until it has n: no more than one send_many is asked for.
        messages = await subscription.fetch(min(limit, 64), timeout=_LONG)
        for message in messages:
            await message.ack()
        return [message.data for message in messages]

    return recv_many


# -- Redis Streams ------------------------------------------------------------------------------------------------


@contextmanager
def redis(end: End) -> Iterator[Wire]:
    """redis-py."""
    import redis

    arguments, *_ = redis_arguments(end)
    name = place(end.address)[1]
    with redis.Redis(**arguments) as client:
        if end.side == "echo":
            client.xgroup_create(name, _GROUP, mkstream=True)
            end.announce(end.address)

            def recv() -> bytes:
                return _one(client, name)

            def recv_many(limit: int) -> list[bytes]:
                entries = _entries(client.xreadgroup(_GROUP, "c", {name: ">"}, count=min(limit, 64), block=0))
                client.xack(name, _GROUP, *(number for number, _ in entries))
                return [fields[b"d"] for _, fields in entries]

            yield Wire(not_here, recv, recv_many=recv_many)
            return
        own = place(end.loop)[1]
        client.xgroup_create(own, _GROUP, mkstream=True)

        def turn(data: bytes) -> bytes:
            client.xadd(own, {"d": data})
            return _one(client, own)

        def send_many(bodies: list[bytes]) -> None:
            pipeline = client.pipeline(transaction=False)
            for body in bodies:
                pipeline.xadd(name, {"d": body})
            pipeline.execute()

        yield Wire(lambda data: client.xadd(name, {"d": data}), not_here, send_many, turn=turn)


def _entries(answer: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    entries: list[tuple[bytes, dict[bytes, bytes]]]
    entries = answer[0][1] if isinstance(answer, list) else next(iter(answer.values()))[0]
    return entries


def _one(client: Any, name: str) -> bytes:
    ((number, fields),) = _entries(client.xreadgroup(_GROUP, "c", {name: ">"}, count=1, block=0))
    client.xack(name, _GROUP, number)
    return fields[b"d"]


@asynccontextmanager
async def aredis(end: End) -> AsyncIterator[AsyncWire]:
    """redis.asyncio."""
    from redis.asyncio import Redis

    arguments, *_ = redis_arguments(end)
    name = place(end.address)[1]
    async with Redis(**arguments, socket_timeout=None) as client:

        async def one(stream: str) -> bytes:
            ((number, fields),) = _entries(await client.xreadgroup(_GROUP, "c", {stream: ">"}, count=1, block=0))
            await client.xack(stream, _GROUP, number)
            return fields[b"d"]

        if end.side == "echo":
            await client.xgroup_create(name, _GROUP, mkstream=True)
            end.announce(end.address)

            async def recv() -> bytes:
                return await one(name)

            async def recv_many(limit: int) -> list[bytes]:
                answer = await client.xreadgroup(_GROUP, "c", {name: ">"}, count=min(limit, 64), block=0)
                entries = _entries(answer)
                await client.xack(name, _GROUP, *(number for number, _ in entries))
                return [fields[b"d"] for _, fields in entries]

            yield AsyncWire(not_here, recv, recv_many=recv_many)
            return
        own = place(end.loop)[1]
        await client.xgroup_create(own, _GROUP, mkstream=True)

        async def turn(data: bytes) -> bytes:
            await client.xadd(own, {"d": data})
            return await one(own)

        async def send_many(bodies: list[bytes]) -> None:
            pipeline = client.pipeline(transaction=False)
            for body in bodies:
                pipeline.xadd(name, {"d": body})
            await pipeline.execute()

        async def send(data: bytes) -> None:
            await client.xadd(name, {"d": data})

        yield AsyncWire(send, not_here, send_many, turn=turn)


# -- what is left behind ------------------------------------------------------------------------------------------


def forget(server: str, name: str) -> None:
    """Remove the streams whose names begin so; a stream outlives everybody, and the server may be somebody's."""
    if server.startswith("nats"):
        asyncio.run(_forget_nats(server, name))
        return
    import redis

    with redis.Redis.from_url(server) as client:
        for pattern in (f"{name}*", f"ipckit:{{{name}*"):
            for key in client.scan_iter(pattern, count=1000):
                client.delete(key)


async def _forget_nats(server: str, name: str) -> None:
    import nats

    client: Any = await nats.connect(server, allow_reconnect=False)
    try:
        js = client.jetstream()
        for stream in await js.streams_info():
            if stream.config.name.startswith(name):
                await js.delete_stream(stream.config.name)
    finally:
        await client.close()
