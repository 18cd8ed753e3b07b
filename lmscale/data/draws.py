"""Random numbers as pure functions of keys: no generator, no state, the same for any order of calls.

A stream is named by integers (a sample's key, the site that draws); its numbers are hashes of the name and a counter,
so a whole micro batch draws at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_TO_UNIT = 2.0**-53


def mix(value: Any) -> Any:
    """Hash uint64 to uint64, element by element (splitmix64, Steele et al. 2014); arithmetic is modulo 2^64."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def streams(keys: NDArray[np.int64], site: int) -> NDArray[np.uint64]:
    """Name a stream for each row of keys.

    Args:
        keys: int64 [n, k]; rows that differ give independent streams.
        site: what the stream is drawn for; another number for each use of the same keys.

    Returns:
        uint64 [n].
    """
    with np.errstate(over="ignore"):
        name = np.full(len(keys), mix(np.uint64(site)), np.uint64)
        for column in keys.T.astype(np.uint64):
            name = mix(name + column)
    return name


def hashes(stream: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
    """Draw the first `count` hashes of each stream: uint64 [n] -> uint64 [n, count]."""
    with np.errstate(over="ignore"):
        counter = np.arange(count, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
        hashed: NDArray[np.uint64] = mix(stream[:, None] + counter)
    return hashed


def uniforms(stream: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Draw `count` numbers of each stream from [0, 1): uint64 [n] -> float64 [n, count]."""
    drawn: NDArray[np.float64] = (hashes(stream, count) >> np.uint64(11)).astype(np.float64) * _TO_UNIT
    return drawn


def integers(stream: NDArray[np.uint64], count: int, bound: Any) -> NDArray[np.int64]:
    """Draw `count` integers of each stream from [0, bound); bound is a number, or broadcasts against [n, count]."""
    drawn: NDArray[np.int64] = (uniforms(stream, count) * bound).astype(np.int64)
    return drawn
