"""Queues over links: placeholder until its writer lands it on this branch."""

from __future__ import annotations

from typing import Any

from ._spi import Intake, Outlet, QueueTerms, Steps, Transport
from ._url import Url


def sender(transport: Transport[Any], url: Url, options: Any, listen: bool) -> Steps[Outlet]: ...
def receiver(transport: Transport[Any], url: Url, options: Any, terms: QueueTerms, listen: bool) -> Steps[Intake]: ...
