"""What a run found, as data: written by `--json`, read by `--compare`, printed by `report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import BadOption
from .machine import Machine
from .stats import Flow, Trips, ratio

FORMAT = 1


@dataclass(slots=True)
class Measured:
    """One contender.

    Attributes:
        name: "ipckit", the raw client's, or the mechanism of the floor.
        flows: by size in bytes, sent one by one.
        batched: our `send_many` and `recv_many`, at the first size.
        failed: why there is nothing, or not all.
        absent: it is not installed, or this machine cannot do it: no failure of ours.
    """

    kind: Literal["ours", "raw", "floor"]
    name: str
    trips: Trips | None = None
    flows: dict[int, Flow] = field(default_factory=dict)
    batched: Flow | None = None
    failed: str | None = None
    hint: str | None = None
    absent: bool = False


@dataclass(slots=True)
class Row:
    """One line of the table: ours, and what it is compared with.

    `floors[0]` is what ratios are of.
    """

    pattern: str
    scheme: str
    options: str
    shell: Literal["sync", "aio"]
    ours: Measured
    raw: Measured | None = None
    floors: list[Measured] = field(default_factory=list)

    @property
    def label(self) -> str:
        return " ".join(part for part in (self.scheme, self.options, "· aio" if self.shell == "aio" else "") if part)

    @property
    def floor(self) -> Measured | None:
        return self.floors[0] if self.floors else None

    def contenders(self) -> Iterator[Measured]:
        yield self.ours
        if self.raw is not None:
            yield self.raw
        yield from self.floors

    def trips_ratio(self, other: Measured | None) -> float | None:
        """Our round trip, in times the other's."""
        if other is None or other.trips is None or self.ours.trips is None:
            return None
        return ratio(self.ours.trips.runs, other.trips.runs)

    def flow_ratio(self, other: Measured | None, size: int) -> float | None:
        """Our messages per second, in times the other's."""
        if other is None or size not in other.flows or size not in self.ours.flows:
            return None
        return ratio(self.ours.flows[size].runs, other.flows[size].runs)


@dataclass(slots=True)
class Conditions:
    """How the run was made."""

    started: str
    seconds: float
    quick: bool
    repeats: int
    cpus: tuple[int, int]
    sizes: tuple[int, ...]

    @property
    def one_cpu(self) -> bool:
        return self.cpus[0] == self.cpus[1]


@dataclass(slots=True)
class Results:
    """A whole run."""

    machine: Machine
    conditions: Conditions
    rows: list[Row]
    format: int = FORMAT

    def failures(self) -> list[tuple[Row, Measured]]:
        return [(row, each) for row in self.rows for each in row.contenders() if each.failed and not each.absent]

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


def load(path: Path) -> Results:
    """Read what `save` wrote. Raises BadOption for a file that is none of ours."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise BadOption(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise BadOption(f"{path} is no result of `ipckit bench --json`: {error}") from error
