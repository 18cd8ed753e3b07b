"""A histogram of many values, small enough to be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Values counted in bins of one width.

    Attributes:
        edges: of the bins, one more than there are bins, growing.
        counts: values in each bin.
        minimum, maximum: of the values.
        total, sum_of_squares: of the values.
    """

    edges: Sequence[float]
    counts: Sequence[float]
    minimum: float
    maximum: float
    total: float
    sum_of_squares: float
