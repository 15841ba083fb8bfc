"""ipckit: every inter-process transport behind one interface, chosen by URL.

`ipckit.aio` has the same names, awaited.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import codecs, errors
from ._capabilities import Capabilities
from ._registry import capabilities, register, schemes
from ._spi import Peer
from ._url import Url
from .codecs import Codec
from .errors import IpcError

if TYPE_CHECKING:
    from .channel import Channel, ChannelStats
    from .message import Message
    from .opening import Listener, connect, listen, pair
    from .pubsub import Publisher, Subscriber, publisher, subscriber
    from .queue import Receiver, Sender, receiver, sender
    from .rpc import Package as _Package
    from .rpc.client import Client, client
    from .rpc.contract import Service
    from .rpc.server import Server, serve

    rpc: _Package

__version__ = "0.1.0"

__all__ = [
    "Capabilities",
    "Channel",
    "ChannelStats",
    "Client",
    "Codec",
    "IpcError",
    "Listener",
    "Message",
    "Peer",
    "Publisher",
    "Receiver",
    "Sender",
    "Server",
    "Service",
    "Subscriber",
    "Url",
    "capabilities",
    "client",
    "codecs",
    "connect",
    "errors",
    "listen",
    "pair",
    "publisher",
    "receiver",
    "register",
    "rpc",
    "schemes",
    "sender",
    "serve",
    "subscriber",
]

#: Where the names of the patterns are. Each module is imported when it is first asked for: no program uses them all.
_LATER = {
    **dict.fromkeys(("Channel", "ChannelStats"), "channel"),
    **dict.fromkeys(("Listener", "connect", "listen", "pair"), "opening"),
    "Message": "message",
    **dict.fromkeys(("Publisher", "Subscriber", "publisher", "subscriber"), "pubsub"),
    **dict.fromkeys(("Receiver", "Sender", "receiver", "sender"), "queue"),
    **dict.fromkeys(("Client", "Server", "Service", "client", "serve"), "rpc"),
    "rpc": "rpc",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LATER[name]}", __name__)
    # `rpc` is a package and a decorator: the package can be called.
    value = globals()[name] = module if name == _LATER[name] else getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
