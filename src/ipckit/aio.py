"""The names of `ipckit`, awaited.

async with await ipckit.aio.connect("shm://frames") as channel:
    await channel.send(b"hello")
    print(await channel.recv(timeout=1))
"""

from ._registry import capabilities
from .channel import AsyncChannel as Channel
from .channel import AsyncListener as Listener
from .channel import aconnect as connect
from .channel import alisten as listen
from .channel import apair as pair

__all__ = ["Channel", "Listener", "capabilities", "connect", "listen", "pair"]
