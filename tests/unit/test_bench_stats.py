"""Percentiles, ratios, and how figures read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipckit.bench import stats


def test_percentile_is_a_sample_at_the_nearest_rank():
    ordered = list(range(1, 101))
    assert stats.percentile(ordered, 0.5) == 50
    assert stats.percentile(ordered, 0.99) == 99
    assert stats.percentile(ordered, 1.0) == 100
    assert stats.percentile([7.0], 0.999) == 7.0


@given(st.lists(st.floats(1, 1e9), min_size=1), st.floats(0.01, 1))
def test_at_least_that_part_does_not_exceed_the_percentile(values, q):
    ordered = sorted(values)
    found = stats.percentile(ordered, q)
    assert found in values
    assert sum(value <= found for value in values) >= q * len(values) - 1e-6


def test_no_tail_without_the_samples_for_it():
    assert (stats.needed(0.99), stats.needed(0.999)) == (1_000, 10_000)
    few = stats.trips([[1.0] * 999])
    assert few.p50 == 1.0
    assert few.p99 is None
    enough = stats.trips([[1.0] * 5_000, [1.0] * 4_999])
    assert enough.p99 == 1.0
    assert enough.p999 is None
    assert stats.trips([[1.0] * 5_000, [1.0] * 5_000]).p999 == 1.0


def test_one_disturbed_run_does_not_move_the_median_but_shows_in_the_tail():
    found = stats.trips([[10.0] * 1_000, [11.0] * 1_000, [500.0] * 1_000])
    assert found.p50 == 11.0
    assert found.p99 == 500.0
    assert found.runs == (10.0, 11.0, 500.0)
    assert found.samples == 3_000


def test_a_ratio_is_of_neighbours():
    # The machine became three times slower after the first pair; in each pair ours took half.
    assert stats.ratio((10.0, 30.0, 30.0), (20.0, 60.0, 60.0)) == 0.5
    assert stats.ratio((), (1.0,)) is None


def test_what_was_lost_does_not_count_as_a_rate():
    found = stats.flow(64, [(1_000, 500, 1_000_000), (1_000, 400, 1_000_000), (1_000, 600, 1_000_000)])
    assert found.rate == 500_000
    assert found.lost == 0.5
    assert found.megabytes == pytest.approx(32.0)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (None, "–"),
        (0.4, "0.400 ns"),
        (270, "270 ns"),
        (999.4, "999 ns"),
        (999.9, "1.00 µs"),
        (9_410, "9.41 µs"),
        (135_000, "135 µs"),
        (1.2e6, "1.20 ms"),
        (3e9, "3.00 s"),
    ],
)
def test_durations_read_in_three_digits(nanoseconds, text):
    assert stats.duration(nanoseconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(740, "740"), (85_200, "85.2 k"), (999_900, "1.00 M"), (2_310_000, "2.31 M"), (12e9, "12.0 G")]
)
def test_rates_read_in_three_digits(value, text):
    assert stats.count(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0.27, "0.27×"), (12.34, "12.3×"), (340.2, "340×")])
def test_ratios(value, text):
    assert stats.times(value) == text


@pytest.mark.parametrize(("value", "text"), [(64, "64 B"), (1500, "1500 B"), (4096, "4 KiB"), (1 << 20, "1 MiB")])
def test_sizes(value, text):
    assert stats.size(value) == text
