"""What an objective is: a pure function from raw samples to the arrays of a micro batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmscale.data.samples import Samples
from lmscale.errors import DataError

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


_MEANINGS = {
    "pad_id": "token for padding",
    "bos_id": "token for the begin of a text",
    "eos_id": "token for the end of a text",
    "mask_id": "mask token",
    "cls_id": "cls token",
    "sep_id": "sep token",
    "sentinel_ids": "sentinels <extra_id_0>, <extra_id_1>, ...",
    "special_ids": "list of special ids",
    "is_word_start": "mark of which pieces begin a word",
    "full_stop_id": "piece that is objective.full_stop",
}


def required(vocabulary: Vocabulary, objective: str, *names: str) -> tuple[Any, ...]:
    """Take values from a vocabulary that an objective cannot do without.

    Args:
        vocabulary: of the run's tokenizer.
        objective: its name, for the message.
        names: attributes of Vocabulary.

    Returns:
        The values, in the order of the names.

    Raises:
        DataError: if one is missing; it names all that are.
    """
    values = tuple(getattr(vocabulary, name) for name in names)
    missing = [
        _MEANINGS[name]
        for name, value in zip(names, values, strict=True)
        if value is None or (isinstance(value, tuple) and not value)
    ]
    if missing:
        raise DataError(
            f"has no {' and no '.join(missing)}, which objective {objective} needs",
            field="tokenizer",
            remedy="take a tokenizer that has, such as one of lmscale tokenizer train",
        )
    return values


def text_ids(vocabulary: Vocabulary, objective: str) -> NDArray[np.int64]:
    """List the ids that stand for text: random tokens are drawn from them.

    Raises:
        DataError: if the vocabulary does not tell them apart, or there is none.
    """
    (special,) = required(vocabulary, objective, "special_ids")
    ids = np.setdiff1d(np.arange(vocabulary.vocab_size), special)
    if len(ids) == 0:
        raise DataError(
            f"has special tokens only, and objective {objective} draws random ones that are text", field="tokenizer"
        )
    return ids


class Objective(Protocol):
    """A training objective. Its result depends on the samples and its own settings only."""

    def make_batch(self, samples: Samples) -> Arrays:
        """Make the arrays that the model reads and the loss compares."""
        ...
