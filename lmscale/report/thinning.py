"""Curves of a long run in as many points as a page can show, extremes kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_POINTS = 1200
"""Of a curve: more than the pixels that it is drawn over."""


def thin(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Choose which points of a curve to draw.

    The curve is cut into equal runs of points; of each, the lowest, the highest and, where there is one, a value that is
    not finite are kept, so that no spike and no gap is lost. The first and the last point stay.

    Returns:
        Their indices, in order; all of them where they are not too many.
    """
    if len(values) <= most:
        return list(range(len(values)))
    num_runs = max(1, most // 3)
    kept = {0, len(values) - 1}
    for number in range(num_runs):
        run = range(number * len(values) // num_runs, (number + 1) * len(values) // num_runs)
        finite = [index for index in run if math.isfinite(values[index])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(run):
            kept.add(next(index for index in run if not math.isfinite(values[index])))
    return sorted(kept)
