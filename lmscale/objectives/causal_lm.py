"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import DOCUMENT_IDS, LABELS, LOSS_MASK, POSITIONS, TOKENS
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays


class CausalLM:
    """Predict token t + 1 of a window from tokens 0 .. t."""

    def make_batch(self, samples: Samples) -> Arrays:
        """Shift the windows by one.

        tokens[t] = window[t], labels[t] = window[t + 1], loss_mask[t] = 1. Where documents are told apart, positions
        count from each document's first token in the window, and loss_mask[t] = 0 where t + 1 belongs to another
        document than t: the document end is learned, the first token after it is not.

        Shapes: n samples, s sequence.

        Args:
            samples: the windows; their keys are not read, since nothing is drawn.

        Returns:
            tokens, labels int64 [n, s]; loss_mask float32 [n, s]; with document_ids also document_ids, positions int64
            [n, s].

        Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1; packing with
        and without borders: Brown et al. 2020, arXiv:2005.14165, appendix B.
        """
        windows, ids = samples.tokens, samples.document_ids
        batch: Arrays = {TOKENS.name: windows[:, :-1], LABELS.name: windows[:, 1:]}
        if ids is None:
            batch[LOSS_MASK.name] = np.ones(batch[TOKENS.name].shape, np.float32)
            return batch
        batch[DOCUMENT_IDS.name] = ids[:, :-1]
        batch[POSITIONS.name] = restarting_positions(ids[:, :-1])
        batch[LOSS_MASK.name] = (ids[:, 1:] == ids[:, :-1]).astype(np.float32)
        return batch


def restarting_positions(document_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the tokens of each document from 0.

    positions[t] = t - (first u with document_ids[u .. t] all equal).

    Args:
        document_ids: int64 [n, s], equal within a document, different on either side of a border.

    Returns:
        int64 [n, s].
    """
    places = np.arange(document_ids.shape[1])
    begins = np.zeros_like(document_ids)
    np.copyto(begins[:, 1:], places[1:], where=document_ids[:, 1:] != document_ids[:, :-1])
    return places - np.maximum.accumulate(begins, axis=1)
