"""`ipckit.Info`: what every gRPC server of ours says about itself, and its pushes. Stock clients may ask it as well.

It is an ordinary service, with an ordinary contract: `/ipckit.Info/Targets`, `Describe`, `Descriptor`, `Pushes`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import msgspec

from ... import errors
from .._site import BUILT_IN, Site
from ..contract import Service, contract_of, rpc
from ..protobuf import Schema, schema_of


class Push(msgspec.Struct):
    """A message that was broadcast. `body` is MessagePack; the first of a stream has no type, and says that it has begun."""

    type: str
    body: bytes


class Info(Service):
    """The target `ipckit`."""

    def __init__(self, site: Site, schemas: Callable[[], dict[str, Schema]], foreign: Callable[[], list[str]]) -> None:
        self._site, self._schemas, self._foreign = site, schemas, foreign

    @rpc(idempotent=True, inline=True)
    def targets(self) -> dict[str, str]:
        """What is exposed, with the fingerprints of the contracts; a user-compiled servicer has none."""
        return {**dict.fromkeys(self._foreign(), ""), **self._site.fingerprints()}

    @rpc(idempotent=True, inline=True)
    def describe(self, target: str) -> dict[str, Any]:
        """The contract of a target. Raises UnknownTarget."""
        found = self._site.services.contracts.get(target)
        if found is None:
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}")
        return found.describe()

    @rpc(idempotent=True, inline=True)
    def descriptor(self, target: str) -> bytes:
        """Its protocol buffers: a serialized `google.protobuf.FileDescriptorProto`. Raises UnknownTarget."""
        found = self._schemas().get(target)
        if found is None:
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}")
        return found.file.SerializeToString()

    async def pushes(self, types: list[str]) -> AsyncIterator[Push]:
        """What is broadcast of these types, from now on, until the server shuts down."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(changed.set)

        subscriber = self._site.subscribe(types, wake)
        try:
            yield Push("", b"")
            while True:
                changed.clear()
                while subscriber.pushes:
                    push = subscriber.pushes.popleft()
                    yield Push(push.type, push.body)
                if subscriber.over:
                    return
                await changed.wait()
        finally:
            self._site.unsubscribe(subscriber)


INFO = contract_of(Info)
SCHEMA = schema_of(INFO, BUILT_IN)
