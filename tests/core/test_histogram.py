"""Durations by powers of two."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msharefs.histogram import BOUNDS, LatencyHistogram, quantile


def histogram(*durations: int) -> LatencyHistogram:
    made = LatencyHistogram()
    for duration in durations:
        made.note(duration)
    return made


def test_nothing_counted_has_no_buckets_and_no_quantile() -> None:
    assert histogram().buckets() == ()
    assert quantile((), 0.99) == 0


@pytest.mark.parametrize(
    ("duration", "bucket"), [(0, 0), (1023, 0), (1024, 1), (2047, 1), (2048, 2), (BOUNDS[-1] - 1, 24), (1 << 60, 25)]
)
def test_a_duration_falls_below_the_bound_of_its_bucket(duration: int, bucket: int) -> None:
    assert histogram(duration).buckets() == (*[0] * bucket, 1)


@given(st.lists(st.integers(1024, BOUNDS[-1] - 1), min_size=1), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_right_within_a_factor_of_two(durations: list[int], part: float) -> None:
    found = quantile(histogram(*durations).buckets(), part)
    true = sorted(durations)[max(0, -int(-part * len(durations) // 1) - 1)]
    assert true / 2 <= found <= true * 2


@given(st.lists(st.integers(0, 1 << 62)))
def test_everything_is_counted_once(durations: list[int]) -> None:
    made = histogram(*durations)
    assert sum(made.buckets()) == len(durations)
    assert made.total == sum(durations)


def test_times_within_a_bucket_count_as_spread_evenly() -> None:
    assert quantile(histogram(1100, 1200, 1300, 1400).buckets(), 0.5) == statistics.mean((1024, 2048))


def test_what_took_longest_is_told_by_its_lower_bound() -> None:
    assert quantile(histogram(1 << 62).buckets(), 0.5) == BOUNDS[-1]
