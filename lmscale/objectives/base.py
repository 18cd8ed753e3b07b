"""What an objective is: a pure function from raw samples to the arrays of a micro batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""Named, typed and shaped as in lmscale.batch."""


@dataclass(frozen=True)
class Samples:
    """The raw samples of a micro batch, as lmscale.data cuts them from the corpus.

    Shapes: n samples, r raw tokens (lmscale.config.lengths).

    Attributes:
        tokens: int64 [n, r], token ids without special ones; behind a sample's length, 0.
        lengths: int64 [n], tokens of each sample, at least 1.
        document_ids: int64 [n, r], the number of each token's document, counted from 0 in each sample; None where
            documents are not to be told apart.
        keys: int64 [n, 4], (seed, source, epoch, number): what names a sample, and so the randomness that belongs to it,
            for any number of ranks and workers.
        first_lengths: int64 [n], tokens of segment A, which come first; segment B has the others. None but for bert.
        is_random_next: bool [n], whether segment B was taken from another document. None but for bert.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    document_ids: NDArray[np.int64] | None
    keys: NDArray[np.int64]
    first_lengths: NDArray[np.int64] | None = None
    is_random_next: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """What an objective needs to know of the tokenizer.

    Attributes:
        vocab_size: ids are below it.
        pad_id, bos_id, eos_id, mask_id, cls_id, sep_id: None where the tokenizer has none.
        sentinel_ids: of <extra_id_0>, <extra_id_1>, ...; as many as there are.
        special_ids: int64, sorted: every id that stands for no text.
        is_word_start: bool [vocab_size], whether a piece begins a word; None where nothing asks for words.
        full_stop_id: the piece that ends a sentence; None where nothing asks for it.
    """

    vocab_size: int
    pad_id: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    mask_id: int | None = None
    cls_id: int | None = None
    sep_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    special_ids: NDArray[np.int64] | None = None
    is_word_start: NDArray[np.bool_] | None = None
    full_stop_id: int | None = None


class Objective(Protocol):
    """A training objective. Its result depends on the samples and its own settings only."""

    def make_batch(self, samples: Samples) -> Arrays:
        """Make the arrays that the model reads and the loss compares."""
        ...
