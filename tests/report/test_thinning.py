"""Long curves in few points."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lmscale.report.thinning import thin


def test_short_curves_stay_whole() -> None:
    assert thin([1.0, 2.0, 3.0], most=3) == [0, 1, 2]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=500), st.integers(6, 60))
def test_extremes_and_ends_stay(values: list[float], most: int) -> None:
    kept = thin(values, most)
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    assert max(values[index] for index in kept) == max(values)
    assert min(values[index] for index in kept) == min(values)
    assert len(kept) <= most + 2


def test_a_gap_stays() -> None:
    values = [1.0] * 1000
    values[400] = math.nan
    assert 400 in thin(values, 30)
