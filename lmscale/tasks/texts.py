"""Token sequences of different lengths, many at a time.

Shapes: n sequences, t tokens of all together, w places of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Texts:
    """n sequences, one behind the other.

    Attributes:
        tokens: int64 [t].
        offsets: int64 [n + 1], where each begins, and the end.
    """

    tokens: Ints
    offsets: Ints

    @staticmethod
    def of(sequences: Sequence[Sequence[int]]) -> Texts:
        """Join lists of ids."""
        sizes = np.array([len(sequence) for sequence in sequences], np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        tokens = np.fromiter((number for sequence in sequences for number in sequence), np.int64, int(offsets[-1]))
        return Texts(tokens, offsets)

    @staticmethod
    def constant(sequence: Sequence[int], count: int) -> Texts:
        """Repeat one sequence."""
        return Texts(np.tile(np.array(sequence, np.int64), count), np.arange(count + 1) * len(sequence))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> Ints:
        """Lengths, int64 [n]."""
        return np.diff(self.offsets)

    def like(self, values: NDArray[Any]) -> Texts:
        """Return other values of the same lengths: [t]."""
        return Texts(values.astype(np.int64), self.offsets)

    def owners(self) -> Ints:
        """Tell which sequence each token is of, int64 [t]."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def places(self) -> Ints:
        """Count the tokens of each sequence from 0, int64 [t]."""
        return np.arange(len(self.tokens)) - np.repeat(self.offsets[:-1], self.sizes)

    def part(self, starts: Ints, ends: Ints) -> Texts:
        """Take tokens [start, end) of each sequence, int64 [n] both."""
        return _gather(self.tokens, self.offsets[:-1] + starts, ends - starts)

    def take(self, indices: Ints) -> Texts:
        """Take sequences by number, int64 [m], in any order and any number of times."""
        return _gather(self.tokens, self.offsets[indices], self.offsets[indices + 1] - self.offsets[indices])

    def sequence(self, number: int) -> Ints:
        """Return one sequence."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def lists(self) -> list[list[int]]:
        """Return all as lists."""
        return [self.sequence(number).tolist() for number in range(len(self))]

    def padded(self, width: int, fill: int) -> Ints:
        """Place each in a row: int64 [n, width].

        Raises:
            ValueError: if one is longer than a row.
        """
        if len(self) and int(self.sizes.max()) > width:
            raise ValueError(f"a sequence of {int(self.sizes.max())} tokens does not fit into {width} places")
        rows = np.full((len(self), width), fill, np.int64)
        rows[np.arange(width) < self.sizes[:, None]] = self.tokens
        return rows


def joined(*parts: Texts) -> Texts:
    """Join the first sequences of all parts, the second ones, and so on: n sequences of k parts."""
    bases = np.cumsum([0] + [len(part.tokens) for part in parts[:-1]])
    starts = np.stack([part.offsets[:-1] + base for part, base in zip(parts, bases, strict=True)], axis=1)
    sizes = np.stack([part.sizes for part in parts], axis=1)
    tokens = np.concatenate([part.tokens for part in parts])
    gathered = _gather(tokens, starts.ravel(), sizes.ravel())
    return Texts(gathered.tokens, gathered.offsets[:: len(parts)])


def marked(*parts: Texts) -> Texts:
    """Do as `joined` does, with the number of its part in the place of each token."""
    return joined(*(part.like(np.full(len(part.tokens), number)) for number, part in enumerate(parts)))


def _gather(tokens: Ints, starts: Ints, sizes: Ints) -> Texts:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
    return Texts(tokens[places], offsets)
