"""Publish/subscribe over links: placeholder until its writer lands it on this branch."""

from __future__ import annotations

from typing import Any

from ._spi import Intake, Publishing, PublishTerms, Steps, TopicTerms, Transport
from ._url import Url


def publisher(transport: Transport[Any], url: Url, options: Any, terms: PublishTerms) -> Steps[Publishing]: ...
def subscriber(transport: Transport[Any], url: Url, options: Any, terms: TopicTerms) -> Steps[Intake]: ...
