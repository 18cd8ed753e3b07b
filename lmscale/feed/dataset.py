"""Sample numbers in, arrays out: what runs in a data loader's worker."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import LOSS_MASK
from lmscale.data.blend import Blend, Located
from lmscale.data.samples import Samples
from lmscale.errors import DataError
from lmscale.objectives.base import Arrays, Objective


class SampleDataset:
    """Reads samples and applies the objective, a batch at a time.

    Args:
        blend: the corpora.
        locate: sample numbers -> windows; `Blend.locate` to train, `in_order` to evaluate.
        objective: makes the arrays.
        vocab_size: token ids from this on are an error.
        isolate: number the documents of each window, so that the objective keeps them apart.
    """

    def __init__(
        self,
        blend: Blend,
        locate: Callable[[NDArray[np.int64]], Located],
        objective: Objective,
        vocab_size: int,
        isolate: bool,
    ):
        self._blend, self._locate, self._objective = blend, locate, objective
        self._vocab_size, self._isolate = vocab_size, isolate
        self.seq_length = blend.windows[0].seq_length

    def arrays(self, indices: NDArray[np.int64]) -> Arrays:
        """Make the arrays of a batch.

        Args:
            indices: int64 [n]; a row of a negative number is there to fill the batch, with loss_mask 0.

        Raises:
            DataError: if a token is not in the vocabulary.
        """
        located = self._locate(indices)
        windows = self._blend.read(located)
        self._check_vocabulary(located, windows)
        seeds = np.full_like(located.source, self._blend.seed)
        keys = np.stack([seeds, located.source, located.epoch, located.window], axis=1)
        lengths = np.full(len(windows), windows.shape[1])
        document_ids = self._blend.document_ids(located) if self._isolate else None
        arrays = self._objective.make_batch(Samples(windows, lengths, document_ids, keys))
        if indices.min() < 0:
            arrays[LOSS_MASK.name][indices < 0] = 0.0
        return arrays

    def _check_vocabulary(self, located: Located, windows: NDArray[np.int64]) -> None:
        # As unsigned numbers, negative ids are large too: one pass finds both.
        unsigned = windows.view(np.uint64)
        if unsigned.max() < self._vocab_size:
            return
        row = int(np.argmax(unsigned.max(axis=1)))
        raise DataError(
            f"its token {windows[row, np.argmax(unsigned[row])]} is outside model.vocab_size = {self._vocab_size}",
            field=self._blend.windows[located.source[row]].corpus.prefix,
            remedy="set model.vocab_size to the tokenizer's, or tokenize the corpus with the run's tokenizer",
        )


def in_order(indices: NDArray[np.int64]) -> Located:
    """Locate the windows of a single corpus by their numbers; a negative number stands for the first."""
    zeros = np.zeros_like(indices)
    return Located(zeros, zeros, np.maximum(indices, 0))
