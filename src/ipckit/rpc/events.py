"""What the two sides of a connection say to each other, apart from how it is written.

A dialect turns frames into these and these into frames; the state machines (`protocol`) know nothing else. `id` is the
correlation id, chosen by the client, never used twice on a connection. A body is a value as the dialect's format has it: the
machines pass it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import msgspec

_NOTHING: Mapping[str, str] = {}

#: Bytes of stream items that may be on their way to one who has not consumed them.
WINDOW = 1 << 20


class Hello(msgspec.Struct, gc=False):
    """Both sides begin with it. `targets`: contract fingerprints by target: what a client wants, what a server has."""

    window: int = WINDOW
    targets: dict[str, str] = {}
    version: int = 1


class Call(msgspec.Struct, gc=False):
    """Client: begin. `id` 0 wants no answer. `method` is a method or a message type. `ttl`: seconds that it may take.

    Attributes:
        stream: the client expects a stream (True) or a single answer (False); None: whatever the contract says.
        oneway: the answer is that the call was accepted, not what came of it.
        reply_to: the result goes there: to this target, or to the subscribers of this name.
    """

    id: int
    target: str
    method: str
    body: bytes
    ttl: float | None = None
    metadata: Mapping[str, str] = _NOTHING
    stream: bool | None = None
    oneway: bool = False
    reply_to: str = ""


class Malformed(msgspec.Struct, gc=False):
    """Client: something that could not be read. It is answered, and costs nothing more."""

    id: int
    why: str


class Accepted(msgspec.Struct, gc=False):
    """Server: a call that is `oneway` has found its handler."""

    id: int


class Result(msgspec.Struct, gc=False):
    """Server: the call is done, and this is its result."""

    id: int
    body: bytes


class Failure(msgspec.Struct, gc=False):
    """Server: the call is over, without a result. `code` is one of `failures.CODES`."""

    id: int
    code: str
    message: str
    type: str = ""
    traceback: str | None = None
    retry_after: float | None = None


class Item(msgspec.Struct, gc=False):
    """Either: one more of a stream. `cost`: what it takes from the window."""

    id: int
    body: bytes
    cost: int = 0


class End(msgspec.Struct, gc=False):
    """Either: the stream is complete. From the server it ends the call."""

    id: int


class Credit(msgspec.Struct, gc=False):
    """Either: so many more bytes of items may come."""

    id: int
    count: int


class Cancel(msgspec.Struct, gc=False):
    """Client: no longer interested."""

    id: int


class Subscribe(msgspec.Struct, gc=False):
    """Client: push me messages of these types, from now on."""

    id: int
    types: list[str]


class Unsubscribe(msgspec.Struct, gc=False):
    """Client: no longer these; none given means all."""

    id: int
    types: list[str]


class Push(msgspec.Struct, gc=False):
    """Server: a message for subscribers of its type. `missed`: so many of the type were dropped before it, for want of room."""

    type: str
    body: bytes
    missed: int = 0


class Goodbye(msgspec.Struct, gc=False):
    """Server: no new calls; those under way are finished."""


class Heartbeat(msgspec.Struct, gc=False):
    """Client: are you there? Server: yes."""


class Discover(msgspec.Struct, gc=False):
    """Client: what is there? For dialects that have a question of their own for it."""

    id: int
    targets: bool = True
    types: bool = True


class Discovered(msgspec.Struct, gc=False):
    """Server: the names and the message types; None where they were not asked for."""

    id: int
    targets: list[str] | None
    types: list[str] | None


Event: TypeAlias = (
    Hello
    | Call
    | Malformed
    | Accepted
    | Result
    | Failure
    | Item
    | End
    | Credit
    | Cancel
    | Subscribe
    | Unsubscribe
    | Push
    | Goodbye
    | Heartbeat
    | Discover
    | Discovered
)
