"""How often each token stands in a run's training text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmscale.config.run import RunConfig
from lmscale.data.indexed import IndexedCorpus

_COUNTED_TOKENS = 10_000_000


def count_tokens(config: RunConfig) -> NDArray[np.int64]:
    """Count the tokens of the training corpora, of each the first ten million.

    Returns: int64 [model.vocab_size].
    """
    counts = np.zeros(config.model.vocab_size, np.int64)
    for source in config.data.train:
        counts += np.bincount(IndexedCorpus(source.prefix).tokens[:_COUNTED_TOKENS], minlength=len(counts))[
            : len(counts)
        ]
    return counts
