"""The rows of a task as micro batches: shuffled to train, in order to evaluate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lmscale.batch import LABELS, TOKENS
from lmscale.config.adapt import prompt_length
from lmscale.config.run import RunConfig
from lmscale.data.windows import epoch_order
from lmscale.feed.loader import Batch, iterate
from lmscale.feed.prompt import with_prompt
from lmscale.feed.sampler import HeldOutSampler, MicroBatchSampler, StepSamples
from lmscale.objectives.base import Arrays
from lmscale.plan.adaptation import head_of
from lmscale.tasks.base import Rows, Split
from lmscale.tasks.texts import Ints

_ROWS_AT_A_TIME = 1024


class RowDataset:
    """Sample numbers in, arrays out; see `feed.dataset.SampleDataset`. A trained prompt's places stand in front of each row.

    Args:
        rows: of the task.
        config: of the run.
        locate: sample numbers -> numbers of rows; negative ones stay.
    """

    def __init__(self, rows: Rows | Split, config: RunConfig, locate: Callable[[Ints], Ints]):
        self._rows, self._locate = rows, locate
        self._prompt_length, head = prompt_length(config.adapt), head_of(config)
        self._finds_places = head is not None and head.kind == "span"

    def arrays(self, indices: Ints, seq_length: int | None = None) -> Arrays:
        """Make the arrays of a batch."""
        arrays = self._rows.arrays(self._locate(indices))
        if not self._prompt_length:
            return arrays
        if self._finds_places:
            arrays[LABELS.name] = arrays[LABELS.name] + self._prompt_length
        return with_prompt(arrays, self._prompt_length)


def build_row_loader(
    config: RunConfig, split: Split, dp_rank: int, dp_size: int, steps: Iterable[StepSamples]
) -> Iterator[Batch]:
    """Iterate over the micro batches of one data-parallel rank, from a checkpoint to the end of training.

    Row i of the run is row i mod R of epoch i div R, in an order that differs from epoch to epoch: a pure function of
    (train.seed, i), for every dp_size and number of workers.
    """
    locate = functools.partial(shuffled_rows, seed=config.train.seed, size=split.num_rows)
    sampler = MicroBatchSampler(steps, config.batch.micro_batch_size, dp_rank, dp_size)
    return iterate(RowDataset(split, config, locate), sampler, config, config.data.num_workers)


def shuffled_rows(samples: Ints, seed: int, size: int) -> Ints:
    """Return the row that each sample of a run is, of `size` rows."""
    epoch, index = np.divmod(samples, size)
    return epoch_order(epoch, index, seed, size)


@dataclasses.dataclass(frozen=True)
class RowReader:
    """Reads rows in order, a share of them on each data-parallel rank, so that each is read once.

    Attributes:
        rows: of a split, or its candidates.
        config: of the run.
        dp_rank, dp_size: this rank's place.
    """

    rows: Rows | Split
    config: RunConfig
    dp_rank: int
    dp_size: int

    @property
    def sampler(self) -> HeldOutSampler:
        """Says which rows each micro batch holds."""
        return HeldOutSampler(self.rows.num_rows, self.config.batch.micro_batch_size, self.dp_rank, self.dp_size)

    @property
    def num_micro_batches(self) -> int:
        """Micro batches of each rank."""
        return len(self.sampler)

    def batches(self) -> Iterator[Batch]:
        """Iterate over them."""
        dataset = RowDataset(self.rows, self.config, lambda numbers: numbers)
        return iterate(dataset, self.sampler, self.config, num_workers=0)

    def numbers(self) -> Ints:
        """Return the number of each row that is read, -1 of fillers: int64 [micro batches, micro batch size]."""
        return np.array([numbers for numbers, _ in self.sampler], np.int64)


def count_row_tokens(split: Split, vocab_size: int) -> Ints:
    """Count the tokens that a model, or its encoder, reads in the rows of a split: int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    for first in range(0, split.num_rows, _ROWS_AT_A_TIME):
        numbers = np.arange(first, min(first + _ROWS_AT_A_TIME, split.num_rows))
        counts += np.bincount(split.arrays(numbers)[TOKENS.name].ravel(), minlength=vocab_size)[:vocab_size]
    return counts
