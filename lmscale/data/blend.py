"""Which window each sample of a run is: weighted corpora, each through its own epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmscale.data.windows import Windows, epoch_order

_SHARE_BITS = 32
_Read = Callable[[Windows, NDArray[np.int64]], NDArray[np.int64]]


@dataclass(frozen=True)
class Located:
    """Where samples are found.

    Attributes:
        source: int64 [n], the corpus.
        epoch: int64 [n], of that corpus, from 0.
        window: int64 [n], in that corpus.
    """

    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    window: NDArray[np.int64]


class Blend:
    """Maps sample i = 0, 1, 2, ... of a run to a window: a pure function of (seed, i), without an end or a table.

    Of the first n samples, source k of K has n w_k, give or take half of ceil(log2 K): one half for two sources. It
    runs through all its windows before it repeats one, in an order that differs from epoch to epoch.

    How: of two sources, the first has round(i w) of the samples before i, and sample i where round((i + 1) w) is one
    more. More sources form a balanced tree of such pairs.

    Args:
        windows: of each source.
        weights: of each source, above 0, relative to their sum.
        seed: of the shuffling.
    """

    def __init__(self, windows: Sequence[Windows], weights: Sequence[float], seed: int):
        self.windows, self.seed = list(windows), seed
        self._weights = np.asarray(weights, np.float64)

    def locate(self, samples: NDArray[np.int64]) -> Located:
        """Say where samples are found.

        Args:
            samples: int64 [n], numbers of samples in the run, from 0.
        """
        source, count = np.zeros_like(samples), np.zeros_like(samples)
        self._assign(0, len(self.windows), np.arange(len(samples)), samples, source, count)
        epoch, window = np.zeros_like(samples), np.zeros_like(samples)
        for number in np.unique(source).tolist():
            rows, size = np.flatnonzero(source == number), len(self.windows[number])
            epoch[rows], index = np.divmod(count[rows], size)
            window[rows] = epoch_order(epoch[rows], index, self.seed, size, number)
        return Located(source, epoch, window)

    def _assign(
        self,
        first: int,
        behind: int,
        rows: NDArray[np.int64],
        samples: NDArray[np.int64],
        source: NDArray[np.int64],
        count: NDArray[np.int64],
    ) -> None:
        """Set `source`, and `count` (its samples before), of rows whose samples belong to sources first .. behind."""
        if behind - first == 1:
            source[rows], count[rows] = first, samples
            return
        middle = (first + behind) // 2
        share = self._weights[first:middle].sum() / self._weights[first:behind].sum()
        before, after = _round_share(samples, share), _round_share(samples + 1, share)
        is_left = after > before
        self._assign(first, middle, rows[is_left], before[is_left], source, count)
        self._assign(middle, behind, rows[~is_left], (samples - before)[~is_left], source, count)

    def read(self, located: Located) -> NDArray[np.int64]:
        """Read the tokens of located samples, int64 [n, s + 1]."""
        return self._gather(located, Windows.read)

    def document_ids(self, located: Located) -> NDArray[np.int64]:
        """Return the documents' numbers in the windows of located samples, int64 [n, s + 1]."""
        return self._gather(located, Windows.document_ids)

    def _gather(self, located: Located, read: _Read) -> NDArray[np.int64]:
        if len(self.windows) == 1:
            return read(self.windows[0], located.window)
        rows = np.empty((len(located.window), self.windows[0].seq_length + 1), np.int64)
        for number in np.unique(located.source):
            chosen = located.source == number
            rows[chosen] = read(self.windows[number], located.window[chosen])
        return rows


def _round_share(count: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """Compute floor(count x share + 1/2) in integers, with the share to 32 bits: floats lose samples past 2^53."""
    numerator = round(share * (1 << _SHARE_BITS))
    high, low = count >> _SHARE_BITS, count & ((1 << _SHARE_BITS) - 1)
    product = low.astype(np.uint64) * np.uint64(numerator) + np.uint64(1 << (_SHARE_BITS - 1))
    return high * numerator + (product >> np.uint64(_SHARE_BITS)).astype(np.int64)
