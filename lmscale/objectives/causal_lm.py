"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import DOCUMENT_IDS, IS_PREFIX, LABELS, LOSS_MASK, POSITIONS, TOKENS
from lmscale.data.draws import integers, streams
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays

_PREFIX = 500


class CausalLM:
    """Predict token t + 1 of a window from tokens 0 .. t.

    Args:
        prefix_lm: let the tokens of a prefix see each other, and predict what follows it only.
    """

    def __init__(self, prefix_lm: bool = False):
        self._prefix_lm = prefix_lm

    def make_batch(self, samples: Samples) -> Arrays:
        """Shift the windows by one.

        tokens[t] = window[t], labels[t] = window[t + 1], loss_mask[t] = 1. Where documents are told apart, positions
        count from each document's first token in the window, and loss_mask[t] = 0 where t + 1 belongs to another
        document than t: the document end is learned, the first token after it is not.

        With prefix_lm, the first p tokens of a window are its prefix, p uniform on 0 .. s - 1, and loss_mask[t] = 0 for
        t < p - 1: the first label that counts is the token behind the prefix.

        Shapes: n samples, s sequence.

        Args:
            samples: the windows; their keys are read with prefix_lm only.

        Returns:
            tokens, labels int64 [n, s]; loss_mask float32 [n, s]; with document_ids also document_ids, positions int64
            [n, s]; with prefix_lm also is_prefix int64 [n, s].

        Source: Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1; packing with
        and without borders: Brown et al. 2020, arXiv:2005.14165, appendix B; prefixes: Raffel et al. 2020,
        arXiv:1910.10683, sec. 3.2.1.
        """
        windows, ids = samples.tokens, samples.document_ids
        batch: Arrays = {TOKENS.name: windows[:, :-1], LABELS.name: windows[:, 1:]}
        if ids is None:
            batch[LOSS_MASK.name] = np.ones(batch[TOKENS.name].shape, np.float32)
        else:
            batch[DOCUMENT_IDS.name] = ids[:, :-1]
            batch[POSITIONS.name] = restarting_positions(ids[:, :-1])
            batch[LOSS_MASK.name] = (ids[:, 1:] == ids[:, :-1]).astype(np.float32)
        if self._prefix_lm:
            places = np.arange(windows.shape[1] - 1)
            sizes = integers(streams(samples.keys, _PREFIX), 1, len(places))
            batch[IS_PREFIX.name] = (places < sizes).astype(np.int64)
            batch[LOSS_MASK.name][places < sizes - 1] = 0.0
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
