"""Publish/subscribe over links: the publisher has the name, subscribers connect and say once what they want.

Promises: everything that is published after `subscriber()` has returned reaches it, or is counted as dropped: `Message.gap` and
`stats()["dropped"]` there, `stats()["dropped"]` here. A slow, stopped or dead subscriber costs the others nothing; only
`on_full="block"` waits for one, while it lives. Subscribers of one group take turns; what one of them had when it died is gone.
docs/wire/queue.md has the frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._linkcrowd import OnlyLink
from ._linkdialer import Dialer
from ._linkpublisher import LinkPublisher
from ._linksubscriber import LinkSubscriber
from ._options import DEFAULT_LIMIT, LinkOptions, integer, option
from ._spi import Intake, Link, Publishing, PublishTerms, Steps, TopicTerms, Transport
from ._url import Url


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What topics over links add to the options of their transport."""

    backlog: int = option(1000, integer(1, 1 << 24), "messages that may wait for one subscriber (and 64 MiB at most)")


def publisher(
    transport: Transport[Any], url: Url, options: Any, own: Options, terms: PublishTerms
) -> Steps[Publishing]:
    listener = yield from transport.listen(url, options)
    limit = options.limit if isinstance(options, LinkOptions) else DEFAULT_LIMIT
    handed_over = transport.capabilities_of(url).handed_over
    return LinkPublisher(url, listener, terms, own.backlog, limit, handed_over)


def subscriber(transport: Transport[Any], url: Url, options: Any, own: Options, terms: TopicTerms) -> Steps[Intake]:
    link = yield from transport.connect(url, options)
    dialer = Dialer(url, lambda: transport.connect(url, options))
    return (yield from _subscribed(LinkSubscriber(url, dialer, link, terms)))


def publisher_over(
    url: Url, link: Link, options: Any, own: Options, terms: PublishTerms, handed_over: bool
) -> Steps[Publishing]:
    """To the one subscriber at the other end of this link."""
    limit = options.limit if isinstance(options, LinkOptions) else DEFAULT_LIMIT
    return LinkPublisher(url, OnlyLink(url, link), terms, own.backlog, limit, handed_over, link)
    yield  # nothing to wait for


def subscriber_over(url: Url, link: Link, terms: TopicTerms) -> Steps[Intake]:
    return (yield from _subscribed(LinkSubscriber(url, OnlyLink(url, link), link, terms)))


def _subscribed(subscribed: LinkSubscriber) -> Steps[Intake]:
    try:
        yield from subscribed.greeted()
    except BaseException:
        subscribed.close()
        raise
    return subscribed
