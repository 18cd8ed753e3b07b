"""Pairs of segments, as BERT reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.draws import mix, streams, uniforms
from lmscale.data.part import Part
from lmscale.data.samples import Samples, gather
from lmscale.errors import DataError

_SITE_DOCUMENT, _SITE_FRONT_A, _SITE_FRONT_B = 101, 102, 103
_TRIES = 10
_LEAST_DOCUMENTS = 2
_KEPT_EPOCHS = 2
_DOCUMENTS_AT_ONCE = 1 << 17
"""Bounds the memory that cutting takes, at some 500 bytes each."""


@dataclass(frozen=True)
class _Epoch:
    """Where the pairs of an epoch are in the corpus, [pairs] each."""

    a_starts: NDArray[np.int64]
    a_lengths: NDArray[np.int64]
    b_starts: NDArray[np.int64]
    b_lengths: NDArray[np.int64]
    is_random: NDArray[np.bool_]


@dataclass(frozen=True)
class _Text:
    """The sentences of a part, numbered through.

    Attributes:
        starts: int64 [sentences], in the corpus.
        offsets: int64 [sentences + 1], the same counted in tokens of text, and the end.
        documents: int64 [documents + 1], the first sentence of each document that has one, and the end.
    """

    starts: NDArray[np.int64]
    offsets: NDArray[np.int64]
    documents: NDArray[np.int64]


class SentencePairs:
    """Segment A and segment B of whole sentences, of which B follows A in its document or is taken from another.

    In each document, with a target of r tokens, or with probability short_share one of 2 .. r for the whole document:
    take sentences up to the target or the end; A is the first 1 .. n - 1 of these n (of one, that one); with
    probability 1/2, and always if n = 1, B is taken from another document, from a random sentence on, until A and B
    reach the target, and the rest of the n sentences is given back; else B is that rest. A pair of more than r tokens
    loses one of the longer segment (of B at a tie), at its front or its end alike, until it fits.

    All documents are cut at once, each into its next pair. What is drawn depends on (seed, epoch, source, document)
    alone. Epochs differ in their number of pairs, so that an epoch is found only after all before it were cut.

    Args:
        part: the documents.
        raw: r, most tokens of a pair.
        short_share: of the documents.
        static_copies: epochs after which the same pairs come again, under the same keys; 0 never repeats them.
        seed: of the run.
        number: of the source, so that sources are not cut alike.

    Raises:
        DataError: if documents are not divided into sentences, hold no text, or are fewer than two.

    Source: Devlin et al. 2019, arXiv:1810.04805, appendix A.2; create_pretraining_data.py of its code. There the
    documents differ by draws from one generator, and a random B is drawn as here: 10 tries for another document.
    """

    def __init__(self, part: Part, raw: int, short_share: float, static_copies: int, seed: int, number: int):
        part.check_sentences("objective bert")
        self.corpus, self.raw = part.corpus, raw
        self._part, self._short_share = part, short_share
        self._seed, self._number = seed, number
        self.period = static_copies or None
        self._sizes: dict[int, int] = {}
        self._epochs: dict[int, _Epoch] = {}
        num_with_text = int((np.diff(part.text_offsets) > 0).sum())
        if num_with_text < _LEAST_DOCUMENTS:
            raise self._too_few(num_with_text)

    def _too_few(self, count: int) -> DataError:
        documents = "document" if count == 1 else "documents"
        return DataError(
            f"{self._part.name} has {count} {documents} with text, and a random segment B is taken from another",
            field=self.corpus.prefix,
            remedy="give two documents or more, or another data.split",
        )

    @cached_property
    def _text(self) -> _Text:
        found = self._part.sentences()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(found.ends - found.starts)])
        borders = np.flatnonzero(np.diff(found.documents)) + 1
        if len(borders) == 0:
            raise self._too_few(1)
        return _Text(found.starts, offsets, np.concatenate([[0], borders, [len(found.starts)]]))

    def num_samples(self, epoch: int = 0) -> int:
        """Return the pairs of an epoch, which is cut for that if it was not before."""
        epoch = self._copy_of(epoch)
        if epoch not in self._sizes:
            self._epoch(epoch)
        return self._sizes[epoch]

    def _copy_of(self, epoch: int) -> int:
        return epoch % self.period if self.period else epoch

    def read(self, keys: NDArray[np.int64]) -> Samples:
        """Read pairs.

        Args:
            keys: int64 [n, 4], as of `Samples`.
        """
        if self.period:
            keys = keys.copy()
            keys[:, 2] %= self.period
        rows = np.empty((4, len(keys)), np.int64)
        is_random = np.empty(len(keys), np.bool_)
        for epoch in np.unique(keys[:, 2]).tolist():
            chosen = keys[:, 2] == epoch
            cut, numbers = self._epoch(epoch), keys[chosen, 3]
            rows[:, chosen] = [of[numbers] for of in (cut.a_starts, cut.a_lengths, cut.b_starts, cut.b_lengths)]
            is_random[chosen] = cut.is_random[numbers]
        a_starts, a_lengths, b_starts = rows[:3, :, None]
        columns, lengths = np.arange(self.raw), rows[1] + rows[3]
        places = np.where(columns < a_lengths, a_starts + columns, b_starts + columns - a_lengths)
        return Samples(gather(self.corpus.tokens, places, lengths), lengths, None, keys, rows[1], is_random)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            while len(self._epochs) >= _KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = self._cut(epoch)
            self._sizes[epoch] = len(self._epochs[epoch].is_random)
        return self._epochs[epoch]

    def _cut(self, epoch: int) -> _Epoch:
        """Cut all documents into pairs, which come in the order of the documents."""
        num_documents = len(self._text.documents) - 1
        chunks = [
            self._cut_documents(epoch, np.arange(first, min(first + _DOCUMENTS_AT_ONCE, num_documents)))
            for first in range(0, num_documents, _DOCUMENTS_AT_ONCE)
        ]
        return _Epoch(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))

    def _cut_documents(self, epoch: int, documents: NDArray[np.int64]) -> tuple[NDArray[Any], ...]:
        """Cut some documents into pairs: the fields of `_Epoch`."""
        text = self._text
        same = [np.full(len(documents), value) for value in (self._seed, epoch, self._number)]
        names = streams(np.stack([*same, documents], axis=1), _SITE_DOCUMENT)
        drawn = uniforms(names, 2)
        is_short = drawn[:, 0] < self._short_share
        targets = np.where(is_short, _choose(drawn[:, 1], 2, self.raw), self.raw)
        rounds: list[tuple[NDArray[Any], ...]] = []
        at = text.documents[documents]
        while len(documents):
            # The streams of a document's pairs, the first of which is not that of its target.
            pair_names = mix(names + np.uint64(len(rounds) + 1))
            pairs = _next_pairs(text, documents, at, targets, pair_names)
            rounds.append((documents, pair_names, *pairs))
            _, a_behind, _, b_behind, is_random = pairs
            at = np.where(is_random, a_behind, b_behind)
            is_left = at < text.documents[documents + 1]
            documents, at = documents[is_left], at[is_left]
            targets, names = targets[is_left], names[is_left]
        document, *fields = (np.concatenate(parts) for parts in zip(*rounds, strict=True))
        order = np.argsort(document, kind="stable")
        return self._place(*(field[order] for field in fields))

    def _place(
        self,
        names: NDArray[np.uint64],
        a_first: NDArray[np.int64],
        a_behind: NDArray[np.int64],
        b_first: NDArray[np.int64],
        b_behind: NDArray[np.int64],
        is_random: NDArray[np.bool_],
    ) -> tuple[NDArray[Any], ...]:
        """Turn sentences, from the first to the one behind the last of each segment, into truncated tokens."""
        text = self._text
        a_size = text.offsets[a_behind] - text.offsets[a_first]
        b_size = text.offsets[b_behind] - text.offsets[b_first]
        a_lengths, b_lengths = truncated_lengths(a_size, b_size, self.raw)
        a_starts = text.starts[a_first] + count_heads(names, _SITE_FRONT_A, a_size - a_lengths)
        b_starts = text.starts[b_first] + count_heads(names, _SITE_FRONT_B, b_size - b_lengths)
        return a_starts, a_lengths, b_starts, b_lengths, is_random


_Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]


def _next_pairs(
    text: _Text,
    documents: NDArray[np.int64],
    at: NDArray[np.int64],
    targets: NDArray[np.int64],
    names: NDArray[np.uint64],
) -> _Pairs:
    """Cut the next pair of each document.

    Args:
        text: the sentences.
        documents: int64 [n].
        at: int64 [n], the first sentence of each that is left.
        targets: int64 [n], in tokens.
        names: uint64 [n], streams of these pairs.

    Returns:
        The first sentence of A and the one behind its last, the same of B, and whether B is random; [n] each.
    """
    drawn = uniforms(names, 3 + _TRIES)
    behind = np.minimum(_reach(text, at, targets), text.documents[documents + 1])
    size = behind - at
    a_behind = at + np.where(size == 1, 1, _choose(drawn[:, 0], 1, size - 1))
    is_random = (size == 1) | (drawn[:, 1] < 0.5)

    tried = (drawn[:, 3:] * (len(text.documents) - 1)).astype(np.int64)
    is_other = tried != documents[:, None]
    other = tried[np.arange(len(tried)), np.argmax(is_other, axis=1)]
    b_first = _choose(drawn[:, 2], text.documents[other], text.documents[other + 1] - 1)
    missing = targets - (text.offsets[a_behind] - text.offsets[at])
    b_behind = np.clip(_reach(text, b_first, missing), b_first + 1, text.documents[other + 1])
    return at, a_behind, np.where(is_random, b_first, a_behind), np.where(is_random, b_behind, behind), is_random


def _reach(text: _Text, first: NDArray[np.int64], num_tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Find the sentence behind the fewest from `first` on that have num_tokens."""
    return np.searchsorted(text.offsets, text.offsets[first] + num_tokens)


def _choose(
    drawn: NDArray[np.float64], first: NDArray[np.int64] | int, last: NDArray[np.int64] | int
) -> NDArray[np.int64]:
    """Turn numbers of [0, 1) into integers from first to last, both included."""
    return first + (drawn * (last - first + 1)).astype(np.int64)


def truncated_lengths(
    a: NDArray[np.int64], b: NDArray[np.int64], most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Say what is left of pairs of a and b tokens that lose one of the longer, of b at a tie, while above `most`.

    min(a, b) stays if it is at most half of `most`; else both end at half, a with the odd one.
    """
    shorter = np.minimum(a, b)
    long, half = most - shorter, np.array([(most + 1) // 2, most // 2])
    left_a = np.where(2 * shorter > most, half[0], np.where(a > b, long, a))
    left_b = np.where(2 * shorter > most, half[1], np.where(a > b, b, long))
    fits = a + b <= most
    return np.where(fits, a, left_a), np.where(fits, b, left_b)


def count_heads(names: NDArray[np.uint64], site: int, flips: NDArray[np.int64]) -> NDArray[np.int64]:
    """Flip fair coins and count heads: binomial numbers, from the bits of hashes.

    Args:
        names: uint64 [n], streams.
        site: what they are drawn for.
        flips: int64 [n], coins of each.

    Returns:
        int64 [n].
    """
    words = -(-flips // 64)
    rows = np.repeat(np.arange(len(flips)), words)
    nth = np.arange(len(rows)) - np.repeat(np.cumsum(words) - words, words)
    hashed = streams(np.stack([names[rows].view(np.int64), nth], axis=1), site)
    unused = np.maximum(64 - (flips[rows] - 64 * nth), 0).astype(np.uint64)
    heads = np.bitwise_count(hashed >> unused)
    return np.bincount(rows, heads, minlength=len(flips)).astype(np.int64)
