"""What a transport is made of: the names for those who write one. The contract is in `ipckit._spi`; read it first.

`docs/howto/add-a-transport.md` builds one, and `ipckit.testing.conformance` tells whether it keeps the contract.
"""

from ._capabilities import Capabilities
from ._options import LinkOptions, choice, duration, flag, integer, option, size, text
from ._spi import (
    Abandoning,
    Buffer,
    Claiming,
    Fused,
    Giving,
    Link,
    Listener,
    Peer,
    Pollable,
    Prioritised,
    Reframing,
    Steps,
    Transport,
    Wait,
    Want,
)
from ._url import Host, Url

__all__ = [
    "Abandoning",
    "Buffer",
    "Capabilities",
    "Claiming",
    "Fused",
    "Giving",
    "Host",
    "Link",
    "LinkOptions",
    "Listener",
    "Peer",
    "Pollable",
    "Prioritised",
    "Reframing",
    "Steps",
    "Transport",
    "Url",
    "Wait",
    "Want",
    "choice",
    "duration",
    "flag",
    "integer",
    "option",
    "size",
    "text",
]
