"""ipckit: every inter-process transport behind one interface, chosen by URL.

`ipckit.aio` has the same names, awaited.
"""

from . import codecs, errors
from ._capabilities import Capabilities
from ._registry import capabilities, register, schemes
from ._spi import Peer
from ._url import Url
from .channel import Channel, ChannelStats, Listener, connect, listen, pair
from .codecs import Codec
from .errors import IpcError
from .message import Message
from .pubsub import Publisher, Subscriber, publisher, subscriber
from .queue import Receiver, Sender, receiver, sender

__version__ = "0.1.0"

__all__ = [
    "Capabilities",
    "Channel",
    "ChannelStats",
    "Codec",
    "IpcError",
    "Listener",
    "Message",
    "Peer",
    "Publisher",
    "Receiver",
    "Sender",
    "Subscriber",
    "Url",
    "capabilities",
    "codecs",
    "connect",
    "errors",
    "listen",
    "pair",
    "publisher",
    "receiver",
    "register",
    "schemes",
    "sender",
    "subscriber",
]
