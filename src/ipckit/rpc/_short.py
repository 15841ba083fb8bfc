"""The short way: a unary call that meets nobody else on its connection.

It writes its frame and reads the answer with the link's own blocking verbs, on the caller's thread, while it holds the turn:
nothing is made but the frame, and the state machine does not know of the call. Whatever else happens (another call's answer,
a failure, the deadline, the end of the connection) makes it a call of the state machine, before the turn is given back.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import errors
from ._calling import Live
from ._clientcore import ClientCall
from ._connection import BROKEN, RESTED
from ._request import CallOptions
from ._tracing import traced
from .contract import Method, unwritable
from .dialects import CALL, HEAD, MAGIC, RESULT, milliseconds

if TYPE_CHECKING:
    from .client import Client


def short_way(
    client: Client, target: str, method: Method, options: CallOptions, long: Callable[..., Any]
) -> Callable[..., Any]:
    """The function behind a typed method; `long` is the one for all other cases."""
    lines = client._lines
    name = f"{target}.{method.name}".encode()
    wire = method.wire("msgpack", named=False)
    encode, decode = wire.encode_args, wire.decode_result
    count, size, timeout = len(method.parameters), len(name), options.timeout
    ttl = milliseconds(timeout)
    pack, unpack, start, monotonic = HEAD.pack, HEAD.unpack_from, HEAD.size, time.monotonic

    def call(*args: Any, **named: Any) -> Any:
        conn = lines.conn
        now = monotonic()
        if named or len(args) != count or conn is None or conn.fused is None or traced() or now - conn.used > RESTED:
            return long(*args, **named)
        conn.used = now
        if not conn.turn.acquire(False):
            return long(*args, **named)
        id = conn.core.next_id()
        sent = late = False
        reply: bytes | None = None
        try:
            try:
                frame = pack(MAGIC, CALL, size, id, ttl) + name + encode(args)
                conn.fused.send(frame, timeout)
                sent = True
                reply = conn.fused.recv(timeout)
                _, kind, _, whose, _ = unpack(reply)
                if whose == id and kind == RESULT:
                    return decode(reply[start:])
            except errors.OutcomeUnknown:  # the rest goes out with the next call
                sent = late = True
            except errors.Timeout:
                late = True
            except (errors.SchemaError, errors.CodecError) as error:  # the answer was not what was declared
                error.url, error.operation = str(client.url), f"{target}.{method.name}"
                raise
            except BROKEN as error:
                client._broke(conn, error)
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                if isinstance(error, errors.IpcError):
                    raise
                raise unwritable(error, client.url, f"{target}.{method.name}") from error
            except struct.error as error:
                client._broke(conn, errors.ProtocolError(f"this is no frame of ours: {error}", url=client.url))
            except BaseException:  # Ctrl-C: the server is told that nobody waits any more
                if sent:
                    client._give_up(conn, _adopt(client, conn, id, None, None))
                raise
            known = _adopt(client, conn, id, reply, timeout) if sent else None
        finally:
            conn.turn.release()
            if conn.waiting:
                conn.hand_over()
        if late and known is None:
            raise errors.DeadlineExceeded(
                "the deadline passed before the call could be sent", url=client.url, operation=f"{target}.{method.name}"
            )
        if known is None:
            return long(*args)
        request = client._request(target, method, args, named, options)
        if late:
            request.deadline = time.monotonic()
        return client._resume(conn, known, request)

    return call


def _adopt(client: Client, conn: Live, id: int, reply: bytes | None, timeout: float | None) -> ClientCall:
    """Let the state machine know of the call, and of what came. Nobody else has received since it was sent."""
    with conn.mutex:
        call = conn.core.adopt(id, None if timeout is None else time.monotonic() + timeout)
        if conn.error is not None:
            conn.core.lost()
    if reply is not None:
        try:
            conn.heard([reply])
        except errors.ProtocolError as error:
            client._broke(conn, error)
    return call
