"""Sample numbers in, arrays out: what runs in a data loader's worker."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import IS_RANDOM_NEXT, LOSS_MASK
from lmscale.data.blend import Blend, Located
from lmscale.errors import DataError
from lmscale.feed.prompt import with_prompt
from lmscale.objectives.base import Arrays, Objective

_NO_PAIR = -1


class SampleDataset:
    """Reads samples and applies the objective, a batch at a time.

    Args:
        blend: the sources.
        locate: sample numbers -> samples of the sources; `Blend.locate` to train, `in_order` to evaluate.
        objective: makes the arrays.
        vocab_size: token ids from this on are an error.
        prompt_length: vectors of a trained prompt before each sample.
    """

    def __init__(
        self,
        blend: Blend,
        locate: Callable[[NDArray[np.int64]], Located],
        objective: Objective,
        vocab_size: int,
        prompt_length: int = 0,
    ):
        self._blend, self._locate, self._objective = blend, locate, objective
        self._vocab_size, self._prompt_length = vocab_size, prompt_length

    def arrays(self, indices: NDArray[np.int64], seq_length: int | None = None) -> Arrays:
        """Make the arrays of a batch.

        Args:
            indices: int64 [n]; a row of a negative number is there to fill the batch, with loss_mask 0 and, where
                there is one, is_random_next -1.
            seq_length: s of the step: a causal_lm window is cut to its first s + 1 tokens, the prompt's places counted in;
                None leaves samples whole.

        Raises:
            DataError: if a token is not in the vocabulary.
        """
        located = self._locate(indices)
        samples = self._blend.read(located)
        if seq_length is not None:
            samples = samples.cut(seq_length - self._prompt_length + 1)
        self._check_vocabulary(located, samples.tokens)
        arrays = self._objective.make_batch(samples)
        for name, filler in ((LOSS_MASK.name, 0.0), (IS_RANDOM_NEXT.name, _NO_PAIR)):
            if name in arrays and indices.min() < 0:
                arrays[name][indices < 0] = filler
        return with_prompt(arrays, self._prompt_length) if self._prompt_length else arrays

    def _check_vocabulary(self, located: Located, tokens: NDArray[np.int64]) -> None:
        # As unsigned numbers, negative ids are large too: one pass finds both.
        unsigned = tokens.view(np.uint64)
        if unsigned.max() < self._vocab_size:
            return
        row = int(np.argmax(unsigned.max(axis=1)))
        raise DataError(
            f"its token {tokens[row, np.argmax(unsigned[row])]} is outside model.vocab_size = {self._vocab_size}",
            field=self._blend.sources[located.source[row]].corpus.prefix,
            remedy="set model.vocab_size to the tokenizer's, or tokenize the corpus with the run's tokenizer",
        )


def in_order(indices: NDArray[np.int64]) -> Located:
    """Locate the samples of epoch 0 of a single source by their numbers; a negative number stands for the first."""
    zeros = np.zeros_like(indices)
    return Located(zeros, zeros, np.maximum(indices, 0))
