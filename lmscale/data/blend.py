"""Where each sample of a run is: weighted sources, each through its own epochs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.samples import Samples
from lmscale.data.source import Source
from lmscale.data.windows import epoch_order

_SHARE_BITS = 32


@dataclass(frozen=True)
class Located:
    """Where samples are found.

    Attributes:
        source: int64 [n], the source.
        epoch: int64 [n], of that source, from 0.
        number: int64 [n], in that epoch.
    """

    source: NDArray[np.int64]
    epoch: NDArray[np.int64]
    number: NDArray[np.int64]


class Blend:
    """Maps sample i = 0, 1, 2, ... of a run to a sample of a source: a pure function of (seed, i), without an end.

    Of the first n samples, source k of K has n w_k, give or take half of ceil(log2 K): one half for two sources. It
    runs through all samples of an epoch before it comes to the next, in an order that differs from epoch to epoch.

    How: of two sources, the first has round(i w) of the samples before i, and sample i where round((i + 1) w) is one
    more. More sources form a balanced tree of such pairs.

    Args:
        sources: each cuts a corpus.
        weights: of each source, above 0, relative to their sum.
        seed: of the shuffling.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], seed: int):
        self.sources, self.seed = list(sources), seed
        self._weights = np.asarray(weights, np.float64)
        self._epochs = [_Epochs(source) for source in sources]

    def locate(self, samples: NDArray[np.int64]) -> Located:
        """Say where samples are found.

        Args:
            samples: int64 [n], numbers of samples in the run, from 0.
        """
        source, count = np.zeros_like(samples), np.zeros_like(samples)
        self._assign(0, len(self.sources), np.arange(len(samples)), samples, source, count)
        epoch, number = np.zeros_like(samples), np.zeros_like(samples)
        for each in np.unique(source).tolist():
            rows = np.flatnonzero(source == each)
            epoch[rows], index = self._epochs[each].find(count[rows])
            number[rows] = self._shuffle(each, epoch[rows], index)
        return Located(source, epoch, number)

    def _shuffle(self, each: int, epoch: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
        source = self.sources[each]
        if source.period == 1:
            return epoch_order(epoch, index, self.seed, source.num_samples(), each)
        number = np.empty_like(index)
        for one in np.unique(epoch).tolist():
            rows = epoch == one
            number[rows] = epoch_order(one, index[rows], self.seed, source.num_samples(one), each)
        return number

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

    def read(self, located: Located) -> Samples:
        """Read located samples."""
        seeds = np.full_like(located.source, self.seed)
        keys = np.stack([seeds, located.source, located.epoch, located.number], axis=1)
        numbers: list[int] = np.unique(located.source).tolist()
        if len(numbers) == 1:
            return self.sources[numbers[0]].read(keys)
        chosen = [np.flatnonzero(located.source == number) for number in numbers]
        parts = [self.sources[number].read(keys[rows]) for number, rows in zip(numbers, chosen, strict=True)]
        return _merge(parts, np.argsort(np.concatenate(chosen)))


class _Epochs:
    """The epochs of a source, laid end to end; grows as far as it is asked."""

    def __init__(self, source: Source):
        self._source = source
        self._starts = [0]

    def find(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Say in which epoch the source's sample of each count is, and which one of it: int64 [n] -> [n], [n]."""
        period = self._source.period
        last = int(counts.max())
        while len(self._starts) <= period if period else self._starts[-1] <= last:
            self._starts.append(self._starts[-1] + self._source.num_samples(len(self._starts) - 1))
        starts = np.array(self._starts)
        cycle, rest = np.divmod(counts, starts[-1]) if period else (np.zeros_like(counts), counts)
        epoch = np.searchsorted(starts, rest, side="right") - 1
        return cycle * (period or 0) + epoch, rest - starts[epoch]


def _merge(parts: list[Samples], order: NDArray[np.int64]) -> Samples:
    """Join samples of several sources of one kind, and bring them into an order."""
    fields: dict[str, Any] = {
        field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(Samples)
    }
    for name, rows in fields.items():
        fields[name] = None if rows[0] is None else np.concatenate(rows)[order]
    return Samples(**fields)


def _round_share(count: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """Compute floor(count x share + 1/2) in integers, with the share to 32 bits: floats lose samples past 2^53."""
    numerator = round(share * (1 << _SHARE_BITS))
    high, low = count >> _SHARE_BITS, count & ((1 << _SHARE_BITS) - 1)
    product = low.astype(np.uint64) * np.uint64(numerator) + np.uint64(1 << (_SHARE_BITS - 1))
    return high * numerator + (product >> np.uint64(_SHARE_BITS)).astype(np.int64)
