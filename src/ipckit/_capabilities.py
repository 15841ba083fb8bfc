"""What a transport can do, as data.

A unified interface is worth having only if it does not pretend: each transport declares one frozen `Capabilities`,
`ipckit.capabilities(url)` answers with it, `require={"durable"}` checks it when an endpoint is opened, the conformance
suite takes its skips from it and nothing else, and `ipckit transports` prints it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from .errors import BadOption, Unsupported, likeliest

Pattern = Literal["channel", "queue", "pubsub", "rpc"]

#: How a survivor hears that its peer was killed while the connection was idle.
#: `at once`: end of file on a control socket, a pidfd, a missing goodbye; `lease`: after `death_bound` seconds without
#: a sign of life; `unreported`: not at all (a datagram has no connection that could end).
Death = Literal["at once", "lease", "unreported"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What one transport promises. Every bool can be asked for by `require=`."""

    # What can be opened, and how.
    patterns: frozenset[Pattern]
    listen: bool = True  # has names: listen/accept and connect
    pair: bool = False  # two connected ends in one call

    # What happens to messages.
    ordered: bool = True  # in the order sent
    reliable: bool = True  # what was accepted arrives, or an error is raised
    counted: bool = True  # what is lost of a topic is told, to the message: `Message.gap`, `stats()`
    handed_over: bool = True  # when send() returns, the kernel or the broker has it: a kill right then does not lose it
    durable: bool = False  # survives the processes at both ends
    priorities: int = 0  # number of levels; 0 has none
    zero_copy: bool = False  # loan() and borrow()
    max_message: int | None = None  # bytes; None: only the endpoint's `limit=`
    headers: bool = False  # ids and headers travel with the messages of queues and topics
    redelivery: bool = False  # what a receiver of a queue took and did not acknowledge is handed out again
    consumer_groups: bool = False
    replay: bool = False
    native_topics: bool = False
    locks: bool = False  # `ipckit.sync.Lock(url)`: leases with fencing tokens

    # Whom one talks to.
    cross_process: bool = True  # the two may be different processes
    cross_machine: bool = False
    broker: bool = False  # needs a server of its own
    encrypted: bool = False
    peer_credentials: bool = False  # pid and uid of the peer, from the kernel
    fileno: bool = False  # a descriptor that a selector can wait for
    death: Death = "at once"
    death_bound: float = 0.1  # seconds until a killed peer is reported

    # The rows of the comparison table that no program acts on.
    model: str = ""
    synchronisation: str = "no"
    data: str = "messages"
    decoupled: bool = False
    use_case: str = ""


def features() -> tuple[str, ...]:
    """The names that `require=` takes."""
    return tuple(field.name for field in fields(Capabilities) if field.type in ("bool", "int"))


def check(required: frozenset[str], capabilities: Capabilities, url: object) -> None:
    """Raise `Unsupported` unless all required features are there; `BadOption` for a feature that does not exist."""
    known = features()
    for name in sorted(required):
        if name not in known:
            raise BadOption(f"require={name!r} is no capability", url=url, hint=likeliest(name, known))
        if not getattr(capabilities, name):
            raise Unsupported(f"this transport is not {name!r}", url=url, hint="see `ipckit transports`")
