"""What is classified: each row of a split, or each word in it; or found: a place in each row."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import DOCUMENT_IDS, LABELS, LOSS_MASK, PADDING_ID, TARGETS, TOKEN_TYPES, TOKENS
from lmscale.config.task import TaskKind
from lmscale.tasks.base import Split
from lmscale.tasks.texts import Ints

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Units:
    """The units of a split, in order.

    Attributes:
        starts: int64 [n + 1], the first unit of each row.
        places: int64 [u], the place of each word in its row; None where a unit is a row.
        targets: int64 [u] classes, float32 [u] numbers, or int64 [u, 2] first and last places.
        words: the word that each unit is, or begins with.
        is_token: bool [n, s], where a row is no padding.
        digest: hash of all that a model reads of the rows, and of the places.
    """

    starts: Ints
    places: Ints | None
    targets: NDArray[Any]
    words: list[str]
    is_token: NDArray[np.bool_]
    digest: str

    @property
    def num_units(self) -> int:
        """Units of the split."""
        return int(self.starts[-1])

    def of_rows(self, rows: Ints) -> Ints:
        """Return the units of rows, in the order of the rows; negative numbers of rows have none."""
        rows = rows[rows >= 0]
        counts = self.starts[rows + 1] - self.starts[rows]
        firsts = self.starts[rows] - np.cumsum(counts) + counts
        return np.arange(int(counts.sum())) + np.repeat(firsts, counts)

    def predictions(self, outputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Put outputs [u, c] where `Task.metrics` reads them: [n, 1, c], or [n, s, c] of words; of places [u, 2, s] stay."""
        if outputs.ndim == 3:
            return outputs
        if self.places is None:
            return outputs[:, None]
        num_rows, width = self.is_token.shape
        whole = np.zeros((num_rows, width, outputs.shape[1]), np.float32)
        whole[np.repeat(np.arange(num_rows), np.diff(self.starts)), self.places] = outputs
        return whole


def read_units(split: Split, kind: TaskKind) -> Units:
    """Read the units of a split.

    Args:
        split: of a task with a head.
        kind: of the task. token_classification: a class is of a word, at the place of its first piece; extractive_qa: a
            row has a first and a last place; else a class or a number is of a row.
    """
    finds_places, labels_words = kind == "extractive_qa", kind == "token_classification"
    counts, places, targets, is_token = [], [], [], []
    digest = hashlib.sha256()
    for first in range(0, split.num_rows, _ROWS_AT_A_TIME):
        arrays = split.arrays(np.arange(first, min(first + _ROWS_AT_A_TIME, split.num_rows)))
        counted = arrays[LOSS_MASK.name] > 0
        labels = arrays[TARGETS.name if TARGETS.name in arrays else LABELS.name]
        counts.append(np.ones(len(labels), np.int64) if finds_places else counted.sum(axis=1))
        places.append(np.nonzero(counted)[1])
        targets.append(labels if finds_places else labels[counted])
        is_token.append(arrays[DOCUMENT_IDS.name] != PADDING_ID)
        for name in (TOKENS.name, DOCUMENT_IDS.name, TOKEN_TYPES.name):
            if name in arrays:
                digest.update(f"{name} {arrays[name].shape}\n".encode() + np.ascontiguousarray(arrays[name]).tobytes())
        digest.update(np.packbits(counted).tobytes())
    return Units(
        starts=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
        places=np.concatenate(places) if labels_words else None,
        targets=np.concatenate(targets),
        words=[] if finds_places else split.gold.words,
        is_token=np.concatenate(is_token),
        digest=digest.hexdigest(),
    )
