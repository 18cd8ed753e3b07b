"""Examples of inputs and targets, and samples that hold several of them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lmscale.config.lengths import SampleLengths
from lmscale.data.blocks import chain
from lmscale.data.part import Part
from lmscale.data.samples import Samples, gather

Ints = NDArray[np.int64]


class Examples:
    """Samples of one example, or of as many neighbours as fit; each example is in one sample of each epoch.

    An example is a document of two sequences, its input and its target. Both are cut so that their ends, which the
    objective puts behind them, still fit; an example that lacks one of the two is left out.

    Args:
        part: the documents.
        lengths: of the samples.
        packed: several in a sample.

    Raises:
        DataError: if documents are not pairs.

    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.4; packing: sec. 3.1.2, and pack_or_pad of mesh's dataset.py.
    """

    period: int | None = 1

    def __init__(self, part: Part, lengths: SampleLengths, packed: bool):
        part.check_pairs()
        self.corpus = part.corpus
        self._part, self._lengths, self._packed = part, lengths, packed
        self._halves  # noqa: B018 - what lacks text is refused when the run is checked, not when it reads

    @cached_property
    def _halves(self) -> tuple[Ints, Ints]:
        """Where inputs and targets begin in the corpus, and their tokens: int64 [examples, 2] both."""
        part = self._part
        bounds = part.corpus.document_sentences[part.first : part.behind + 1]
        offsets = part.corpus.sentence_offsets[bounds[0] : bounds[-1] + 1]
        sizes = np.diff(offsets).reshape(-1, 2)
        sizes[:, 1] -= part.has_ends
        starts = offsets[:-1].reshape(-1, 2)
        is_whole = (sizes > 0).all(axis=1)
        if not is_whole.any():
            raise part.without_text()
        room = (self._lengths.encoder - 1, self._lengths.decoder - 1)
        return starts[is_whole], np.minimum(sizes[is_whole], room)

    @cached_property
    def _bounds(self) -> Ints:
        """The first example of each sample, and the end: int64 [samples + 1]."""
        sizes = self._halves[1] + 1
        num_examples = len(sizes)
        if not self._packed:
            return np.arange(num_examples + 1)
        following = np.full(num_examples, num_examples)
        for half, room in enumerate((self._lengths.encoder, self._lengths.decoder)):
            ends = np.cumsum(sizes[:, half])
            fits = np.searchsorted(ends, ends - sizes[:, half] + room, side="right")
            following = np.minimum(following, fits)
        return np.append(chain(following), num_examples)

    def num_samples(self, epoch: int = 0) -> int:
        """Return the samples of an epoch, the same for each."""
        return len(self._bounds) - 1

    def read(self, keys: Ints) -> Samples:
        """Read samples: the input of the first example, its target, the input of the second, ...

        Args:
            keys: int64 [n, 4], as of `Samples`.
        """
        first, behind = self._bounds[keys[:, 3]], self._bounds[keys[:, 3] + 1]
        examples, rows = _ranges(first, behind)
        starts, sizes = (of_all[examples].ravel() for of_all in self._halves)
        inside, halves = _ranges(np.zeros_like(sizes), sizes)
        rows = rows[halves // 2]
        lengths = np.bincount(rows, minlength=len(keys))
        where = (rows, np.arange(len(rows)) - (np.cumsum(lengths) - lengths)[rows])
        shape = (len(keys), self._lengths.raw)
        places, numbers, is_target = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
        places[where] = starts[halves] + inside
        numbers[where] = examples[halves // 2] - first[rows]
        is_target[where] = halves % 2 == 1
        tokens = gather(self.corpus.tokens, places, lengths)
        return Samples(tokens, lengths, numbers, keys, is_target=is_target)


def _ranges(starts: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Join the ranges [start, end): the numbers in them, and which range each is of."""
    counts = ends - starts
    owners = np.repeat(np.arange(len(counts)), counts)
    return np.arange(len(owners)) + (starts - np.cumsum(counts) + counts)[owners], owners
