"""What a run found, as data: written by `--json`, read by `--compare`, printed by `report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import BadOption
from .machine import Machine
from .stats import Fan, Flow, Trips, ratio

FORMAT = 1


@dataclass(slots=True)
class Measured:
    """One contender.

    Attributes:
        name: "ipckit", the raw client's, the mechanism of the floor, or the reference's.
        trips: the pattern's first latency.
        hops: of a queue: from process to process.
        flows: by size in bytes, sent one by one; of topics: with one subscriber.
        batched: `send_many` and `recv_many`, at the first size.
        fans: of topics: for each number of subscribers and each size.
        failed: why there is nothing, or not all.
        absent: it is not installed, or this machine cannot do it: no failure of ours.
    """

    kind: Literal["ours", "raw", "floor", "reference"]
    name: str
    trips: Trips | None = None
    hops: Trips | None = None
    flows: dict[int, Flow] = field(default_factory=dict)
    batched: Flow | None = None
    fans: list[Fan] = field(default_factory=list)
    failed: str | None = None
    hint: str | None = None
    absent: bool = False

    def fan(self, subscribers: int, size: int) -> Fan | None:
        return next((fan for fan in self.fans if (fan.subscribers, fan.size) == (subscribers, size)), None)


@dataclass(slots=True)
class Row:
    """One line of the table: ours, and what it is compared with.

    `floors[0]` is what ratios are of; in a pattern without floors, references stand there.
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

    def hops_ratio(self, other: Measured | None) -> float | None:
        """Our message from process to process, in times the other's."""
        if other is None or other.hops is None or self.ours.hops is None:
            return None
        return ratio(self.ours.hops.runs, other.hops.runs)

    def batched_ratio(self, other: Measured | None) -> float | None:
        """Our messages per second in batches, in times the other's."""
        if other is None or other.batched is None or self.ours.batched is None:
            return None
        return ratio(self.ours.batched.runs, other.batched.runs)

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
