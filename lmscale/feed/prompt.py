"""Places for a trained prompt in front of the rows of a batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import (
    DECODER_TOKENS,
    DOCUMENT_IDS,
    IS_PREFIX,
    LABELS,
    LOSS_MASK,
    MASKED_POSITIONS,
    POSITIONS,
    PROMPT_PLACES,
    TOKEN_TYPES,
    TOKENS,
)
from lmscale.objectives.base import Arrays

_NO_PLACE = -1


def with_prompt(arrays: Arrays, length: int, *, pad_id: int = 0) -> Arrays:
    """Put the places of a prompt in front of every row of a batch's arrays: of the encoder, where there are two stacks.

    There, tokens are `pad_id`, which nothing reads; prompt_places 0 .. k-1, and -1 behind them; token_types 0; is_prefix 1;
    document_ids those of the row's first token, which the prompt belongs to; labels and loss_mask 0, where there is one for
    each token. positions count the prompt's in, and masked_positions are moved behind it. Labels that are places
    themselves, as of a span, are left to who made them.

    Args:
        arrays: of a batch (lmscale.batch), rows [n, s].
        length: vectors of the prompt, k.
        pad_id: stands in the prompt's places.

    Returns:
        New arrays, with rows [n, k + s] of what the model, or its encoder, reads.
    """
    rows, size = arrays[TOKENS.name].shape
    made = dict(arrays)
    for name, value in ((TOKENS.name, pad_id), (TOKEN_TYPES.name, 0), (IS_PREFIX.name, 1)):
        if name in arrays:
            made[name] = _behind(np.full((rows, length), value), arrays[name])
    if DOCUMENT_IDS.name in arrays:
        ids = arrays[DOCUMENT_IDS.name]
        made[DOCUMENT_IDS.name] = _behind(np.repeat(ids[:, :1], length, axis=1), ids)
    if POSITIONS.name in arrays:
        counted = np.broadcast_to(np.arange(length), (rows, length))
        made[POSITIONS.name] = _behind(counted, arrays[POSITIONS.name] + length)
    if MASKED_POSITIONS.name in arrays:
        made[MASKED_POSITIONS.name] = arrays[MASKED_POSITIONS.name] + length
    for name in (LABELS.name, LOSS_MASK.name):
        if name in arrays and _has_one_for_each_token(arrays, name):
            made[name] = _behind(np.zeros((rows, length)), arrays[name])
    places = np.full((rows, length + size), _NO_PLACE, np.int64)
    places[:, :length] = np.arange(length)
    made[PROMPT_PLACES.name] = places
    return made


def _has_one_for_each_token(arrays: Arrays, name: str) -> bool:
    is_apart = DECODER_TOKENS.name in arrays or MASKED_POSITIONS.name in arrays
    return not is_apart and arrays[name].shape == arrays[TOKENS.name].shape


def _behind(front: NDArray[np.generic], array: NDArray[np.generic]) -> NDArray[np.generic]:
    return np.concatenate((front.astype(array.dtype), array), axis=1)
