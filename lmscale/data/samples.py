"""What goes from the corpus to the objective: cut, not yet noised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.shards import ShardedTokens


@dataclass(frozen=True)
class Samples:
    """The raw samples of a micro batch, as they were cut from the corpus.

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
        is_target: bool [n, r], whether a token belongs to the target of its example, whose number document_ids has. None
            but for text_to_text.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    document_ids: NDArray[np.int64] | None
    keys: NDArray[np.int64]
    first_lengths: NDArray[np.int64] | None = None
    is_random_next: NDArray[np.bool_] | None = None
    is_target: NDArray[np.bool_] | None = None

    def cut(self, size: int) -> Samples:
        """Return the first `size` tokens of each sample, its keys unchanged; of windows, which have no segments."""
        ids = None if self.document_ids is None else self.document_ids[:, :size]
        return replace(self, tokens=self.tokens[:, :size], lengths=np.minimum(self.lengths, size), document_ids=ids)


def gather(
    tokens: NDArray[np.integer[Any]] | ShardedTokens, places: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Read the tokens of samples.

    Args:
        tokens: flat.
        places: int64 [n, r], where each token is; behind a sample's length, anywhere.
        lengths: int64 [n].

    Returns:
        int64 [n, r], 0 behind each sample's length.
    """
    is_token = np.arange(places.shape[1]) < lengths[:, None]
    read: NDArray[np.int64] = tokens[np.where(is_token, places, 0)].astype(np.int64)
    return np.where(is_token, read, 0)
