"""gRPC that is real gRPC: the calls of grpc://, grpcs:// and grpc+unix://.

A contract becomes protocol buffers (`protobuf`), a target `shop` of the class `Shop` the service `shop.Shop`, and its method
`get_price` the procedure `/shop.Shop/GetPrice`; so that a stock client in any language calls it, from the file that
`ipckit contract export --proto` writes or by server reflection, and so that ours calls a stock server with the same file.

| file | what it is |
|---|---|
| `_status.py` | failures to gRPC's codes with details, and back |
| `_info.py` | the service `ipckit.Info` that every server of ours has: contracts, and pushes |
| `_hall.py` | which handler a path leads to: ours, user-compiled servicers, reflection, health |
| `_door.py` | what the two servers share: the port or name, headers |
| `_server.py` `_pool.py` `_aserver.py` | grpcio's server and its threads, and grpc.aio's on the caller's loop |
| `_routes.py` | what the two clients share: procedures, what an error means, how contracts are compared |
| `_client.py` `_results.py` `_aclient.py` | a grpcio channel, and a grpc.aio one on the caller's loop |

docs/howto/grpc.md shows it, ADR 19 weighs it.
"""

from __future__ import annotations

from ...transports import _grpc_home as _first  # before grpc: it says how gRPC is to behave when the process forks
from ._aclient import AsyncClient
from ._aserver import AsyncServer
from ._client import Client
from ._server import Server

__all__ = ["AsyncClient", "AsyncServer", "Client", "Server"]
del _first
