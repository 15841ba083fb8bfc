"""`reply_to` of the envelope protocol: where a result goes in place of its caller.

An address is a target that is exposed here, which is given the result as a message of its type (`AddResult`), or a name that
clients have subscribed to, to whom it is pushed. The caller that expects a reply hears that it was delivered, or why it was not.
A URL is no address: a server must not connect to where its clients point it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec

from .. import errors
from . import events
from .protocol import ServerCall

if TYPE_CHECKING:
    from ._engine import Engine
    from ._session import ServerConnection


def known(engine: Engine, address: str) -> bool:
    return address in engine.services.contracts or engine.subscribed(address)


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
