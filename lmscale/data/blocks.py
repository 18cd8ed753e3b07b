"""Samples that cover a corpus once in each epoch: blocks of equal length, and blocks of whole sentences."""

from __future__ import annotations

from array import array
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmscale.data.part import Part
from lmscale.data.samples import Samples, gather
from lmscale.errors import DataError

SentencePacking = Literal["full_sentences", "doc_sentences", "sentences"]

_LEAST = 2


class Blocks:
    """Block i is tokens [i r, (i + 1) r) of a part, wherever that cuts; the last block may be shorter.

    A last piece of a single token is left out. Within a block, tokens follow each other as in the corpus, with the
    documents' ends, or without them: then documents stand next to each other with nothing between.

    Args:
        part: the documents.
        raw: r, tokens of a block.
        keep_ends: whether the documents' ends are read. One that would come last in its block is not: the objective
            puts its own there.

    Raises:
        DataError: if there are fewer than two tokens.

    Source: Raffel et al. 2020, arXiv:1910.10683, and its code (reduce_concat_tokens, split_tokens), which leaves ends
    out; fairseq's break mode "none", which keeps them.
    """

    period: int | None = 1

    def __init__(self, part: Part, raw: int, keep_ends: bool):
        self.corpus, self.raw = part.corpus, raw
        self.part, self._keeps_ends = part, keep_ends
        self._num_tokens = int(self._offsets[-1])
        self._size = self._num_tokens // raw + (self._num_tokens % raw >= _LEAST)
        if self._size == 0 or self._num_tokens < _LEAST:
            raise DataError(
                f"{part.name} has {self._num_tokens} tokens in {part.num_documents} documents, fewer than {_LEAST}",
                field=self.corpus.prefix,
                remedy="give more text or another data.split",
            )

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """The first of the tokens that are read of each document, counted from 0, and the end: [documents + 1]."""
        part = self.part
        return part.offsets - part.offsets[0] if self._keeps_ends else part.text_offsets

    def num_samples(self, epoch: int = 0) -> int:
        """Return the blocks of an epoch, the same for each."""
        return self._size

    def read(self, keys: NDArray[np.int64]) -> Samples:
        """Read blocks.

        Args:
            keys: int64 [n, 4], as of `Samples`.
        """
        starts = keys[:, 3] * self.raw
        lengths = np.minimum(self.raw, self._num_tokens - starts)
        if self._keeps_ends:
            lengths -= self._ends_document(starts + lengths) & (lengths > 1)
            places = starts[:, None] + np.arange(self.raw) + self.part.offsets[0]
        else:
            places = self._places(starts)
        return Samples(gather(self.corpus.tokens, places, lengths), lengths, None, keys)

    def _ends_document(self, behind: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell whether the token in front of each place is a document's end."""
        found = self._offsets[np.searchsorted(self._offsets, behind)] == behind
        return found if self.part.has_ends else np.zeros_like(found)

    def _places(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Turn places in the text, [n], into places in the corpus of r tokens from there, [n, r].

        The shift from one to the other grows by the documents' ends on the way: it is looked up at the start, and
        summed over the borders in the block, which are few.
        """
        text, file = self._offsets, self.part.offsets
        first = np.searchsorted(text, starts, side="right") - 1
        counts = np.searchsorted(text, starts + self.raw - 1, side="right") - 1 - first
        rows = np.repeat(np.arange(len(starts)), counts)
        nth = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        documents = np.repeat(first, counts) + nth + 1
        shifts = np.zeros((len(starts), self.raw), np.int64)
        shifts[:, 0] = file[first] - text[first]
        growth = (file[documents] - text[documents]) - (file[documents - 1] - text[documents - 1])
        # Empty documents share a border: their growths add up.
        np.add.at(shifts, (rows, text[documents] - starts[rows]), growth)
        places: NDArray[np.int64] = starts[:, None] + np.arange(self.raw) + np.cumsum(shifts, axis=1)
        return places


class SentenceBlocks:
    """Blocks of as many whole sentences as fit, each sentence in one block in each epoch.

    A sentence longer than r tokens is cut into pieces of r; nothing is lost. (fairseq keeps it whole and leaves the
    excess to be cut off.) The document end that comes last in a block is not read, since the objective puts its own
    there, and has no share in r; between documents it stays, as their separator.

    Args:
        part: the documents.
        raw: r, most tokens of a block.
        packing: full_sentences: also across documents; doc_sentences: a block ends with its document; sentences: one
            sentence, or one piece of it, each.

    Raises:
        DataError: if documents are not divided into sentences, or hold no text.

    Source: Liu et al. 2019, arXiv:1907.11692, sec. 4.2; fairseq's break modes "complete", "complete_doc" and "eos".
    """

    period: int | None = 1

    def __init__(self, part: Part, raw: int, packing: SentencePacking):
        part.check_sentences(f"objective.packing: {packing}")
        self.corpus, self.raw = part.corpus, raw
        self.part, self._packing = part, packing

    @cached_property
    def _blocks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first token in the corpus and the length of each block, int64 [blocks] both."""
        starts, ends, documents = self._pieces()
        if self._packing == "sentences":
            return starts, ends - starts
        # Where the next block starts if one starts at a piece: as a whole, then followed from block to block.
        following = np.searchsorted(ends, starts + self.raw, side="right")
        if self._packing == "doc_sentences":
            following = np.minimum(following, np.searchsorted(documents, documents, side="right"))
        first = chain(following)
        last = np.append(first[1:], len(starts)) - 1
        return starts[first], ends[last] - starts[first]

    def _pieces(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Cut the sentences that are too long: starts, ends and documents, int64 [pieces] each."""
        found = self.part.sentences()
        counts = -(-(found.ends - found.starts) // self.raw)
        if counts.max() == 1:
            return found.starts, found.ends, found.documents
        sentence = np.repeat(np.arange(len(counts)), counts)
        nth = np.arange(len(sentence)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = found.starts[sentence] + nth * self.raw
        return starts, np.minimum(starts + self.raw, found.ends[sentence]), found.documents[sentence]

    def num_samples(self, epoch: int = 0) -> int:
        """Return the blocks of an epoch, the same for each."""
        return len(self._blocks[0])

    def read(self, keys: NDArray[np.int64]) -> Samples:
        """Read blocks.

        Args:
            keys: int64 [n, 4], as of `Samples`.
        """
        starts, lengths = (of_all[keys[:, 3]] for of_all in self._blocks)
        places = starts[:, None] + np.arange(self.raw)
        return Samples(gather(self.corpus.tokens, places, lengths), lengths, None, keys)


def chain(following: NDArray[np.int64]) -> NDArray[np.int64]:
    """Follow 0 -> following[0] -> ... to the end, and list where that came by.

    Args:
        following: int64 [n], each above its own place; n and above is the end.
    """
    # A memoryview gives its elements some times as fast as an array.
    steps, places = following.data, array("q")
    place, end = 0, len(following)
    while place < end:
        places.append(place)
        place = steps[place]
    return np.frombuffer(places, np.int64)
