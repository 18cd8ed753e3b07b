"""Which samples a data-parallel rank reads, micro batch by micro batch: a pure function of the samples consumed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

StepSamples = tuple[int, int, int]
"""What a step reads: samples consumed before it, samples of its global batch, tokens of a sample."""
MicroBatch = tuple[list[int], int | None]
"""Sample numbers, and the length to cut them to; None leaves them whole."""


class MicroBatchSampler:
    """Yields the sample numbers of each micro batch of one data-parallel rank.

    A step that starts with C samples consumed takes B samples; its micro batch m on rank d is
        C + (m dp_size + d) micro_batch_size + [0, micro_batch_size)
    and the next step starts at C + B. So a step holds the same samples on every layout, and to resume is to start with
    the samples consumed so far.

    Args:
        steps: to the end of the run; walked each time anew. micro_batch_size x dp_size divides their batches.
        micro_batch_size: in samples.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
    """

    def __init__(self, steps: Iterable[StepSamples], micro_batch_size: int, dp_rank: int, dp_size: int):
        self._steps = steps
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size

    def __iter__(self) -> Iterator[MicroBatch]:
        size = self._micro_batch_size
        for consumed, batch_size, seq_length in self._steps:
            first = consumed + self._dp_rank * size
            for start in range(first, consumed + batch_size, size * self._dp_size):
                yield list(range(start, start + size)), seq_length


class HeldOutSampler:
    """Yields held-out windows in order, so that each counts once and every rank has as many micro batches.

    Micro batch m of rank d is the windows (m dp_size + d) micro_batch_size + [0, micro_batch_size); beyond the last
    window the number is -1, a row to be read and not counted.

    Args:
        num_windows: windows to read, from the first.
        micro_batch_size: in samples.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
    """

    def __init__(self, num_windows: int, micro_batch_size: int, dp_rank: int, dp_size: int):
        self._num_windows, self._micro_batch_size = num_windows, micro_batch_size
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __len__(self) -> int:
        return -(-self._num_windows // (self._micro_batch_size * self._dp_size))

    def __iter__(self) -> Iterator[MicroBatch]:
        for number in range(len(self)):
            start = (number * self._dp_size + self._dp_rank) * self._micro_batch_size
            indices = range(start, start + self._micro_batch_size)
            yield [index if index < self._num_windows else -1 for index in indices], None
