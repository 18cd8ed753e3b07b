"""What an objective is: a pure function from windows of tokens to the arrays of a micro batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""Named, typed and shaped as in lmscale.batch."""


@dataclass(frozen=True)
class Samples:
    """The raw samples of a micro batch.

    Shapes: n samples, s sequence.

    Attributes:
        windows: int64 [n, s + 1], token ids.
        document_ids: int64 [n, s + 1], the number of each token's document, counted from 0 in each window; None where
            documents are not to be told apart.
        keys: int64 [n, 3], (source, epoch, window): what names a sample, and so the randomness that belongs to it, for
            any number of ranks and workers.
    """

    windows: NDArray[np.int64]
    document_ids: NDArray[np.int64] | None
    keys: NDArray[np.int64]


class Objective(Protocol):
    """A training objective. Its result depends on the samples and its own settings only."""

    def make_batch(self, samples: Samples) -> Arrays:
        """Make the arrays that the model reads and the loss compares."""
        ...
