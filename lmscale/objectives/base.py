"""What an objective is: a pure function from raw samples to the arrays of a micro batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmscale.data.samples import Samples

Arrays = dict[str, NDArray[Any]]
"""Named, typed and shaped as in lmscale.batch."""


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

    @property
    def document_end_id(self) -> int | None:
        """The id that ends a document in a corpus: eos, or sep of a tokenizer without it."""
        return self.sep_id if self.eos_id is None else self.eos_id


class Objective(Protocol):
    """A training objective. Its result depends on the samples and its own settings only."""

    def make_batch(self, samples: Samples) -> Arrays:
        """Make the arrays that the model reads and the loss compares."""
        ...
