"""The loss of a model that knows how frequent each token is and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lmscale.data.indexed import IndexedCorpus


def unigram_entropy(train: Path, valid: Path, vocab_size: int) -> float:
    """Compute the unigram model's loss, in nats per held-out token.

    p(v) = (count of v in the training tokens + 1) / (training tokens + vocabulary), and the result is the mean of
    -log p over the held-out tokens.

    Args:
        train: prefix of the corpus that is counted.
        valid: prefix of the corpus that is held out.
        vocab_size: ids that there are.
    """
    counts = np.bincount(IndexedCorpus(train).tokens, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[IndexedCorpus(valid).tokens].mean())
