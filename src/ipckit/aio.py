"""The names of `ipckit`, awaited.

async with await ipckit.aio.connect("shm://frames") as channel:
    await channel.send(b"hello")
    print(await channel.recv(timeout=1))
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import rpc
from ._registry import capabilities
from .channel import AsyncChannel as Channel
from .message import AsyncMessage as Message
from .opening import AsyncListener as Listener
from .opening import aconnect as connect
from .opening import alisten as listen
from .opening import apair as pair
from .pubsub import AsyncPublisher as Publisher
from .pubsub import AsyncSubscriber as Subscriber
from .pubsub import apublisher as publisher
from .pubsub import asubscriber as subscriber
from .queue import AsyncReceiver as Receiver
from .queue import AsyncSender as Sender
from .queue import areceiver as receiver
from .queue import asender as sender
from .rpc._aclient import AsyncClient as Client
from .rpc._aclient import aclient as client
from .rpc._aserver import AsyncServer as Server
from .rpc._aserver import aserve as serve
from .rpc.contract import Service

if TYPE_CHECKING:
    from .sync.crowd_tasks import Barrier, BoundedSemaphore, Condition, Event, RWLock, Semaphore
    from .sync.lock_tasks import Lock, RLock
    from .sync.memory_tasks import Latest, Segment

__all__ = [
    "Barrier",
    "BoundedSemaphore",
    "Channel",
    "Client",
    "Condition",
    "Event",
    "Latest",
    "Listener",
    "Lock",
    "Message",
    "Publisher",
    "RLock",
    "RWLock",
    "Receiver",
    "Segment",
    "Semaphore",
    "Sender",
    "Server",
    "Service",
    "Subscriber",
    "capabilities",
    "client",
    "connect",
    "listen",
    "pair",
    "publisher",
    "receiver",
    "rpc",
    "sender",
    "serve",
    "subscriber",
]

#: What is imported when it is first asked for, and from where.
_LATER = {
    **dict.fromkeys(("Lock", "RLock"), ".sync.lock_tasks"),
    **dict.fromkeys(("Barrier", "BoundedSemaphore", "Condition", "Event", "RWLock", "Semaphore"), ".sync.crowd_tasks"),
    **dict.fromkeys(("Latest", "Segment"), ".sync.memory_tasks"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name], __package__), name)
    return value
