"""RPC: one contract, served and called over every transport.

How the parts fit, from the ground up:

| file | what it is |
|---|---|
| `contract.py` | services to contracts: methods, shapes and codecs from annotations; descriptions and fingerprints |
| `compat.py` | which changes of a contract break its callers |
| `protobuf.py` `_protofile.py` `_protovalues.py` | a contract as protocol buffers: descriptors, text, messages |
| `_routing.py` `_board.py` `_micro.py` | calls through a broker: the client, the servers, stock NATS clients |
| `events.py` | what the two sides say to each other, apart from how it is written |
| `dialects.py` | frames to events and back: `Dialect`, and ours, `Native` |
| `envelope.py` `_seed.py` `_versioned.py` | the dialects of programs that are not ipckit's; how they are told apart |
| `protocol.py` `_clientcore.py` `_servercore.py` | the state machines, without I/O: streams, credits, deadlines |
| `failures.py` | exceptions to what travels, and back |
| `_place.py` | a URL, or a channel in its place |
| `_request.py` `_connection.py` `_calling.py` | one call, a client's connection, and what its two shells share |
| `_intercepting.py` | interceptors of both sides |
| `_proxy.py` | what stands for a contract at the client |
| `client.py` `_short.py` `_results.py` | the client for threads: calls, their short way, streams and pushes |
| `_aclient.py` `_aresults.py` | the client for tasks |
| `_exposed.py` `_limits.py` `_rate.py` | what a server exposes, and what it allows |
| `_reception.py` `_foreign.py` | who comes in, in which dialect; what the foreign ones ask for besides |
| `_engine.py` `_session.py` | the server: its watcher, and one client as it sees it |
| `_attend.py` `_serving.py` `_crew.py` | where handlers run: on the thread that receives, on a thread or a loop of their own |
| `server.py` `_aserver.py` | its two shells |
| `context.py` | `current()`: deadline, cancellation and metadata, for handlers |
| `_site.py` `_arrival.py` `_bridges.py` | where handlers run for a transport that has calls of its own |
| `grpc/` | calls over gRPC, by such a transport |
| `protobuf.py` `_protofile.py` `_protovalues.py` | contracts and values as protocol buffers |

A transport that has calls of its own (gRPC, NATS) names a module with four classes (`Transport.calls`), and shares contracts and
codecs with the rest; one that has links needs nothing. Another dialect is a class like `Native`.
The module itself is the decorator: `@ipckit.rpc`, `@ipckit.rpc(idempotent=True)`.
"""

from __future__ import annotations

import sys
import typing
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from ._limits import ServerOptions, ShutdownReport
from ._proxy import Remote, using
from ._results import Results, Subscription
from .client import Client, client
from .compat import check
from .context import CallContext, current
from .contract import Contract, Method, Service, Shape, contract_of, rpc
from .server import Server, serve

F = TypeVar("F", bound=typing.Callable[..., Any])

__all__ = [
    "CallContext",
    "Client",
    "Contract",
    "Method",
    "Remote",
    "Results",
    "Server",
    "ServerOptions",
    "Service",
    "Shape",
    "ShutdownReport",
    "Subscription",
    "check",
    "client",
    "contract_of",
    "current",
    "rpc",
    "serve",
    "using",
]


class Package(ModuleType):
    """`ipckit.rpc` is this package and the decorator at once. Editors and mypy know it by this class."""

    if TYPE_CHECKING:
        check = staticmethod(check)
        contract_of = staticmethod(contract_of)
        current = staticmethod(current)
        using = staticmethod(using)

    @overload
    def __call__(self, function: F, /) -> F: ...
    @overload
    def __call__(self, *, idempotent: bool = False, inline: bool | None = None) -> typing.Callable[[F], F]: ...
    def __call__(self, *args: Any, **named: Any) -> Any:
        return rpc(*args, **named)


sys.modules[__name__].__class__ = Package
