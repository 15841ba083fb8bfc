"""What calls of the envelope protocol ask of a server: shapes that it has words for, and `reply_to`.

`reply_to` is where a result goes in place of its caller: a target that is exposed here, which is given it as a message of its
type (`AddResult`), or a name that clients have subscribed to, to whom it is pushed. The caller that expects a reply hears
that it was delivered, or why it was not. A URL is no address: a server must not connect to where its clients point it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from .. import errors
from . import events
from ._servercore import ServerCall

if TYPE_CHECKING:
    from ._engine import Engine
    from ._exposed import Exposed
    from ._session import ServerConnection


def unfit(engine: Engine, call: ServerCall, exposed: Exposed) -> tuple[str, str] | None:
    """What the protocol cannot say, or was not asked to: a code, and why."""
    shape = exposed.method.shape
    if shape.streams_in:
        return "PROTOCOL", f"{call.method} takes a stream, which this protocol has no words for"
    if shape.streams_out and not call.stream:
        return "PROTOCOL", f"{call.method} answers with a stream: ask for it by expects_stream"
    if call.reply_to and call.stream:
        return "PROTOCOL", "reply_to takes a single reply"
    if call.reply_to and call.reply_to not in engine.services.contracts and not engine.subscribed(call.reply_to):
        return "UNKNOWN_TARGET", f"nobody is called {call.reply_to!r}, and nobody listens to it"
    return None


def deliver(engine: Engine, conn: ServerConnection, address: str, value: Any, body: bytes) -> bytes:
    """Take the result there. Returns what its caller is told. Raises UnknownTarget, UnknownMethod, TargetBusy."""
    if address in engine.services.contracts:
        name = type(value).__name__
        if engine.services.find(address, name) is None:
            raise errors.UnknownMethod(f"{address!r}, to which the reply goes, takes no {name}")
        call = ServerCall(events.Call(0, address, name, body), 0, time.monotonic())
        refusal = engine.start(conn, call, elsewhere=True)
        if refusal is not None:
            raise errors.TargetBusy(refusal.message)
    elif not engine.broadcast(address, value):
        raise errors.UnknownTarget(f"nobody is called {address!r}, and nobody listens to it")
    form: Any = msgspec.json if conn.core.dialect.format == "json" else msgspec.msgpack
    told: bytes = form.encode({"status": "delivered"})
    return told
