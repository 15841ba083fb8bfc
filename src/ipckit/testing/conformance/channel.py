"""`ChannelContract`: all that a Channel promises, on whatever transport."""

from ._base import broker, free_port
from ._ending import EndingContracts
from ._messages import MessageContracts
from ._naming import NamingContracts
from ._waiting import WaitingContracts

__all__ = ["ChannelContract", "broker", "free_port"]


class ChannelContract(MessageContracts, WaitingContracts, EndingContracts, NamingContracts):
    """Subclass it, and give it a fixture `url` that returns a fresh, unused address for each test."""
