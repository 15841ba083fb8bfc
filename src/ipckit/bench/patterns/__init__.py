"""What `--pattern` takes: each module here is one, and ends with its `PATTERN`. A new one is a new file, and nothing else.

A pattern says which cases there are, which measurements are made of each, and which tables are printed below the first,
which every pattern has: one message at a time. Cases come from the transports' capabilities; a table only adds what they
cannot say, namely where to open each on this machine, and what to compare it with.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

from ... import _registry
from ..._url import parse
from ...errors import BadOption
from ..measure import Kind
from ..scenarios import Case
from ..scenarios import select as _select
from ..wires import Side

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..results import Results


_BLANK = Case(scheme="", url="")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One pattern of communication, as it is measured.

    Attributes:
        cases: in the order of the table.
        latency: of one message at a time; the first is the figure of bars, ratios and `--compare`.
        title: of that first figure, with the `{size}`.
        flow: as fast as it goes; of each of the sizes, and of the first in batches too.
        sizes: bytes, unless `--size` says otherwise.
        audiences: how many echoes, one after the other; latency is measured of the first.
        bursts: what a message costs its sender is measured as well.
        first: the side that has the name.
        tables: what is printed below.
        claimed: the published claims are about this.
        batched: many messages in one call are measured too, where there is one echo.
        blank: the case of a transport that no table knows.
    """

    name: str
    cases: Callable[[], Sequence[Case]]
    latency: tuple[Kind, ...]
    title: str
    flow: Kind = "stream"
    sizes: tuple[int, ...]
    audiences: tuple[int, ...] = (1,)
    bursts: bool = False
    first: Side = "echo"
    tables: Callable[[Results], Iterable[RenderableType]]
    claimed: bool = False
    batched: bool = True
    blank: Case = _BLANK

    @property
    def paced(self) -> bool:
        return self.flow == "stream"

    @property
    def batches(self) -> bool:
        """Many messages in one call are measured too; of a crowd, its size is the question."""
        return self.batched and len(self.audiences) == 1


def names() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> Pattern:
    """Raises BadOption for one that is not there."""
    if name not in names():
        raise BadOption(f"there is no pattern {name!r}", hint="known: " + ", ".join(names()))
    found: Pattern = import_module(f".{name}", __name__).PATTERN
    return found


def select(name: str, wanted: Sequence[str]) -> tuple[Case, ...]:
    """The cases of this pattern for what was asked for; see `scenarios.select`."""
    pattern = find(name)
    return _select(pattern.cases(), wanted, pattern.blank)


#: Placeholders filled in, for a URL that nobody opens.
_EXAMPLE = {"dir": "/dir", "name": "name", "port": "1", "redis": "redis://host", "nats": "nats://host"}


def declared(pattern: str, places: Iterable[Case], elsewhere: Mapping[str, str] | None = None) -> Iterator[Case]:
    """Of the transports that there are places for, those that declare the pattern.

    Args:
        places: cases that say where a scheme is opened.
        elsewhere: where this pattern needs another URL, by scheme.
    """
    for place in places:
        case = replace(place, url=(elsewhere or {}).get(place.scheme, place.url))
        url = parse(case.url.format(**_EXAMPLE))
        if pattern in _registry.find(url).capabilities_of(url).patterns:
            yield case
