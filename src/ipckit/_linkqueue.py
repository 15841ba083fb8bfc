"""Queues over links: what gives every connection-oriented transport a work queue. docs/wire/queue.md has the frames.

    many senders, one receiver that listens      the receiver takes from them in turn
    one sender that listens, many receivers      each message to one of them that has room in its window

Promises: a message is forgotten by its sender only when a receiver has acknowledged it. A receiver that is killed, or closes,
with messages in its hands costs nothing: they go to another, or to the next that connects. A side that connects does so again
when the listener comes back, and sends again what was not acknowledged; a receiver that had it already drops it.

Nobody outlives the sender: what it has sent and no receiver has taken is gone with it. `send` returns when the message has left
this process; `Sender.drain` when all were acknowledged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._linkcrowd import OnlyLink
from ._linkdialer import Dialer
from ._linkintake import LinkIntake
from ._linkoutlet import LinkOutlet
from ._linkwire import MAX_WINDOW
from ._options import integer, option
from ._spi import Intake, Link, Outlet, QueueTerms, Steps, Transport
from ._url import Url

#: Messages that a receiver takes before it has acknowledged the first. What one has, those it competes with do not get.
_COMPETING, _ALONE = 16, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What queues over links add to the options of their transport."""

    prefetch: int | None = option(
        None,
        integer(1, MAX_WINDOW),
        "messages a receiver takes ahead, unacknowledged (16 if it connects, 1024 if it listens)",
    )


def sender(transport: Transport[Any], url: Url, options: Any, own: Options, listen: bool) -> Steps[Outlet]:
    if listen:
        return LinkOutlet(url, (yield from transport.listen(url, options)), None)
    link = yield from transport.connect(url, options)
    return LinkOutlet(url, Dialer(url, lambda: transport.connect(url, options)), link)


def receiver(
    transport: Transport[Any], url: Url, options: Any, own: Options, terms: QueueTerms, listen: bool
) -> Steps[Intake]:
    if listen:
        listener = yield from transport.listen(url, options)
        return LinkIntake(url, listener, None, own.prefetch or _ALONE)
    link = yield from transport.connect(url, options)
    return LinkIntake(url, Dialer(url, lambda: transport.connect(url, options)), link, own.prefetch or _COMPETING)


def sender_over(url: Url, link: Link) -> Steps[Outlet]:
    """To the one receiver at the other end of this link."""
    return LinkOutlet(url, OnlyLink(url, link), link)
    yield  # nothing to wait for


def receiver_over(url: Url, link: Link, own: Options) -> Steps[Intake]:
    return LinkIntake(url, OnlyLink(url, link), link, own.prefetch or _ALONE)
    yield  # nothing to wait for
