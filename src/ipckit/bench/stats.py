"""Percentiles that say when they cannot be given.

The tail of a distribution needs samples beyond it: a 99.9th percentile of a thousand samples is one sample, and of a hundred
it is an invention. So each percentile has a least number of samples (ten beyond it), below which it is None and printed
as "–".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log10
from math import floor as round_down

#: A percentile needs this many samples above it.
BEYOND = 10


def percentile(ordered: Sequence[float], q: float) -> float:
    """The smallest sample that at least `q` (0 to 1) of all samples do not exceed: nearest rank, nothing interpolated."""
    if not ordered:
        raise ValueError("no samples")
    return ordered[max(ceil(q * len(ordered) - 1e-9), 1) - 1]


def needed(q: float) -> int:
    """How many samples the percentile `q` asks for."""
    return ceil(BEYOND / (1 - q) - 1e-6)


def median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


@dataclass(frozen=True, slots=True)
class Trips:
    """Round trips, in nanoseconds.

    Attributes:
        p50: the median of the medians of the runs: one disturbed run does not move it.
        p99, p999: over the single round trips of all runs together; None with too few of them.
        runs: the median of each run, in order. Run i of one contender and run i of another followed each other.
        samples: single round trips timed.
    """

    p50: float
    p99: float | None
    p999: float | None
    least: float
    mean: float
    most: float
    samples: int
    runs: tuple[float, ...]


def trips(runs: Sequence[Sequence[float]], centres: Sequence[float] | None = None) -> Trips:
    """Summarise the single round trips of several runs; `centres` are the runs' medians where they were timed in batches."""
    every = sorted(value for run in runs for value in run)
    medians = tuple(centres) if centres is not None else tuple(median(run) for run in runs)
    return Trips(
        p50=median(medians),
        p99=percentile(every, 0.99) if len(every) >= needed(0.99) else None,
        p999=percentile(every, 0.999) if len(every) >= needed(0.999) else None,
        least=every[0],
        mean=sum(every) / len(every),
        most=every[-1],
        samples=len(every),
        runs=medians,
    )


@dataclass(frozen=True, slots=True)
class Flow:
    """Messages one way.

    Attributes:
        rate: messages that arrived, per second; the median of the runs.
        size: bytes of each.
        lost: the part that did not arrive (0 to 1), the median of the runs.
    """

    rate: float
    size: int
    lost: float
    runs: tuple[float, ...]

    @property
    def megabytes(self) -> float:
        """MB/s, of 10^6 bytes of payload."""
        return self.rate * self.size / 1e6


def flow(size: int, runs: Sequence[tuple[int, int, int]]) -> Flow:
    """From (sent, received, nanoseconds) of each run."""
    rates = tuple(received / nanoseconds * 1e9 for _, received, nanoseconds in runs)
    return Flow(median(rates), size, median(1 - received / sent for sent, received, _ in runs), rates)


@dataclass(frozen=True, slots=True)
class Fan:
    """What one message costs its publisher, and how many a second reach every subscriber.

    Attributes:
        size: bytes of each.
        cost: nanoseconds of one publish in a burst that nothing has to wait for; the median of the runs.
        cpu: nanoseconds of processor time of the whole publishing process for each message, its threads included.
        runs: the cost in each run.
        flow: as fast as it goes, until the last subscriber has the last; a message counts when each has it.
    """

    subscribers: int
    size: int
    cost: float
    cpu: float
    runs: tuple[float, ...]
    flow: Flow | None = None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """How many times theirs is ours: the median over the pairs of runs that followed each other.

    In pairs, because a machine that slows down between the first run and the last slows both of a pair.
    """
    pairs = [a / b for a, b in zip(ours, theirs, strict=False) if b > 0]
    return median(pairs) if pairs else None


# -- figures as people read them ---------------------------------------------------------------------------------


def duration(nanoseconds: float | None) -> str:
    """Three digits and a unit: `680 ns`, `9.41 µs`, `1.20 ms`."""
    if nanoseconds is None:
        return "–"
    for limit, unit in ((1e3, "ns"), (1e6, "µs"), (1e9, "ms")):
        if float(f"{nanoseconds:.3g}") < limit:
            return f"{digits(nanoseconds / limit * 1e3)} {unit}"
    return f"{digits(nanoseconds / 1e9)} s"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    rounded = float(f"{value:.3g}")
    if rounded <= 0:
        return "0"
    return f"{rounded:.{min(max(2 - round_down(log10(rounded)), 0), 3)}f}"


def count(value: float) -> str:
    """A rate: `2.31 M`, `85.2 k`, `740`."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if float(f"{value:.3g}") >= limit:
            return digits(value / limit) + unit
    return digits(value)


def times(value: float | None) -> str:
    """A ratio: `0.27×`, `1.08×`, `34×`."""
    if value is None:
        return "–"
    return f"{value:.2f}×" if value < 9.995 else f"{value:.1f}×" if value < 99.95 else f"{value:.0f}×"


def size(value: int) -> str:
    """Bytes: `64 B`, `4 KiB`, `1 MiB`."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << shift and not value & ((1 << shift) - 1):
            return f"{value >> shift} {unit}"
    return f"{value} B"
