"""Windows of seq_length + 1 tokens over packed documents, their split and their order.

Nothing here is stored: a window is a slice of the memory map, and the order of an epoch is computed, not drawn up. So
there is no index or cache that could go stale when a corpus is built again. (megatron-core's GPTDataset keeps an index
under a key of path, size and seed, and reads a rebuilt corpus through the old one.)
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from lmscale.data.draws import mix
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.samples import Samples
from lmscale.errors import DataError

_ROUNDS = 6


def split_documents(num_documents: int, shares: tuple[float, ...]) -> list[tuple[int, int]]:
    """Divide documents 0 .. num_documents among parts, in order and without overlap.

    Part k is [round(N (s_0 + .. + s_(k-1))), round(N (s_0 + .. + s_k))).

    Args:
        num_documents: N.
        shares: fractions that sum to 1.

    Returns:
        For each part its first document, and the one behind its last.
    """
    sums = np.concatenate([[0.0], np.cumsum(shares)])
    bounds = np.rint(sums / sums[-1] * num_documents).astype(int).tolist()
    return list(itertools.pairwise(bounds))


class Windows:
    """Window i is tokens [start + i s, start + i s + s + 1) of a corpus: s inputs, and a label for each of them.

    Shapes: n windows asked for, s seq_length.

    Args:
        corpus: read as it is now; nothing is cached.
        documents: (first, behind last) of those that the windows run over; None takes all.
        seq_length: s.
        name: of the part, for messages.
        isolate: number the documents of each window.

    Raises:
        DataError: if the documents do not fill one window.
    """

    period: int | None = 1

    def __init__(
        self,
        corpus: IndexedCorpus,
        documents: tuple[int, int] | None,
        seq_length: int,
        name: str = "the corpus",
        isolate: bool = False,
    ):
        first, behind = documents or (0, corpus.num_documents)
        self.corpus, self.seq_length, self._isolates = corpus, seq_length, isolate
        self._start = int(corpus.document_offsets[first])
        num_tokens = int(corpus.document_offsets[behind]) - self._start
        self._size = max(0, num_tokens - 1) // seq_length
        if self._size == 0:
            raise DataError(
                f"{name} has {num_tokens} tokens in {behind - first} documents, "
                f"fewer than one window of data.seq_length + 1 = {seq_length + 1}",
                field=corpus.prefix,
                remedy="give more text, a shorter data.seq_length or another data.split",
            )

    def num_samples(self, epoch: int = 0) -> int:
        """Return the windows of an epoch, the same for each."""
        return self._size

    def read(self, keys: NDArray[np.int64]) -> Samples:
        """Read windows.

        Args:
            keys: int64 [n, 4], as of `Samples`.
        """
        indices = keys[:, 3]
        starts = self._start + indices * self.seq_length
        tokens = self.corpus.rows(starts, self.seq_length + 1).astype(np.int64)
        lengths = np.full(len(keys), self.seq_length + 1)
        return Samples(tokens, lengths, self.document_ids(indices) if self._isolates else None, keys)

    def document_ids(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each token's document, counted from 0 in each window.

        Args:
            indices: int64 [n], of windows.

        Returns:
            int64 [n, s + 1], which never falls along a window.
        """
        offsets, starts = self.corpus.document_offsets, self._start + indices * self.seq_length
        # The bounds that lie behind a window's first token, up to its last: few, so only these are looked up.
        first = np.searchsorted(offsets, starts, side="right")
        counts = np.searchsorted(offsets, starts + self.seq_length, side="right") - first
        rows = np.repeat(np.arange(len(indices)), counts)
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        columns = offsets[np.repeat(first, counts) + nth] - starts[rows]
        ids = np.zeros((len(indices), self.seq_length + 1), np.int64)
        # Empty documents share a bound, which counts once.
        ids[rows, columns] = 1
        return np.cumsum(ids, axis=1)


def epoch_order(
    epoch: NDArray[np.int64] | int, index: NDArray[np.int64], seed: int, size: int, source: int = 0
) -> NDArray[np.int64]:
    """Return where the samples of shuffled epochs are found: a bijection of [0, size) for each epoch.

    A Feistel network: with a = ceil(sqrt(size)), b = ceil(size / a), the sample is the pair (l, r) in [0, a) x [0, b);
    rounds turn it into l + hash(r) mod a and r + hash(l) mod b, and results from size on go through again. It is a
    pure function: it needs no table, however large the corpus.

    Args:
        epoch: int64 [n] or one for all.
        index: int64 [n], each in [0, size), the samples' places in their epoch.
        seed: of the run.
        size: samples of an epoch.
        source: number of the corpus, so that corpora are not shuffled alike.

    Returns:
        int64 [n], each in [0, size).

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", the generalized Feistel cipher.
    """
    width = math.isqrt(size - 1) + 1 if size > 1 else 1
    height = -(-size // width)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        key = mix(mix(mix(np.uint64(seed)) + np.uint64(source)) + np.asarray(epoch, np.uint64))
        keys = np.broadcast_to(key, index.shape)
        order = _permute(index.astype(np.uint64), keys, width, height)
        while (outside := order >= size).any():
            order[outside] = _permute(order[outside], keys[outside], width, height)
    return order.astype(np.int64)


def _permute(value: NDArray[np.uint64], keys: NDArray[np.uint64], width: int, height: int) -> NDArray[np.uint64]:
    a, b = np.uint64(width), np.uint64(height)
    left, right = value % a, value // a
    for number in range(0, _ROUNDS, 2):
        left = (left + mix(keys + right + np.uint64(number << 48)) % a) % a
        right = (right + mix(keys + left + np.uint64((number + 1) << 48)) % b) % b
    return right * a + left
