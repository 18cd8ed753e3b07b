"""Rows of text to read and text to write.

Shapes: n rows, m examples, s places of a row, d places of the decoder's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lmscale.batch import (
    DECODER_DOCUMENT_IDS,
    DECODER_POSITIONS,
    DECODER_TOKENS,
    DOCUMENT_IDS,
    IS_PREFIX,
    LABELS,
    LOSS_MASK,
    PADDING_ID,
    POSITIONS,
    TOKENS,
)
from lmscale.tasks.base import Arrays
from lmscale.tasks.texts import Ints, Texts, joined, marked

Halves = Callable[[Ints], tuple[Texts, Texts]]
"""Of examples by number: gpt: their tokens, and 1 where one is to be written; t5 and bart: inputs and targets."""


@dataclass(frozen=True)
class Layout:
    """How rows of an architecture are made.

    Attributes:
        width: places of a row of gpt or the encoder.
        decoder_width: of the decoder; 0 for gpt.
        pad: id of padding.
        start: what the decoder reads first.
        packed: whether a row holds several examples.
        has_prefix: the model, gpt, sees all of an input at once (objective.prefix_lm).
    """

    width: int
    decoder_width: int
    pad: int
    start: int
    packed: bool
    has_prefix: bool = False

    def arrays(self, halves: tuple[Texts, Texts], bounds: Ints) -> Arrays:
        """Make the arrays of rows.

        Args:
            halves: of m examples, as of `Halves`.
            bounds: int64 [n + 1], the first example of each row, and the end.
        """
        return self._stacked(*halves, bounds) if self.decoder_width else self._chained(*halves, bounds)

    def _chained(self, tokens: Texts, is_target: Texts, bounds: Ints) -> Arrays:
        """gpt: each token from those before it, where it is to be written."""
        rows = _in_rows(tokens, bounds)
        placed = rows.padded(self.width + 1, self.pad)
        is_learned = rows.like(is_target.tokens).padded(self.width + 1, 0)
        made: Arrays = {
            TOKENS.name: placed[:, :-1],
            LABELS.name: placed[:, 1:],
            LOSS_MASK.name: is_learned[:, 1:].astype(np.float32),
        }
        if self.has_prefix:
            is_read = rows.like(_precedes_targets(is_target)).padded(self.width + 1, 0)
            made[IS_PREFIX.name] = is_read[:, :-1]
        if self.packed:
            ids, positions = _numbers(tokens, bounds)
            # The last token is read by nothing, but where it is not at the end of the row it is there.
            made[DOCUMENT_IDS.name] = ids.padded(self.width + 1, PADDING_ID)[:, :-1]
            made[POSITIONS.name] = positions.padded(self.width + 1, 0)[:, :-1]
        return made

    def _stacked(self, inputs: Texts, targets: Texts, bounds: Ints) -> Arrays:
        """t5 and bart: targets in the decoder, which reads each behind `start`."""
        ids, positions = _numbers(inputs, bounds)
        decoder_ids, decoder_positions = _numbers(targets, bounds)
        begins = decoder_positions.tokens == 0
        before = np.concatenate([[self.start], targets.tokens[:-1]]).astype(np.int64)[: len(begins)]
        shifted = decoder_ids.like(np.where(begins, self.start, before))
        decoder_numbers = decoder_ids.padded(self.decoder_width, PADDING_ID)
        made: Arrays = {
            TOKENS.name: _in_rows(inputs, bounds).padded(self.width, self.pad),
            DOCUMENT_IDS.name: ids.padded(self.width, PADDING_ID),
            DECODER_TOKENS.name: shifted.padded(self.decoder_width, self.pad),
            DECODER_DOCUMENT_IDS.name: decoder_numbers,
            LABELS.name: _in_rows(targets, bounds).padded(self.decoder_width, self.pad),
            LOSS_MASK.name: (decoder_numbers >= 0).astype(np.float32),
        }
        if self.packed:
            made[POSITIONS.name] = positions.padded(self.width, 0)
            made[DECODER_POSITIONS.name] = decoder_positions.padded(self.decoder_width, 0)
        return made


def _precedes_targets(is_target: Texts) -> Ints:
    """Return 1 for each token before the first of its example that is to be written, else 0."""
    so_far = np.cumsum(is_target.tokens)
    before = np.concatenate([[0], so_far])[is_target.offsets[:-1]]
    read: Ints = (so_far == before[is_target.owners()]).astype(np.int64)
    return read


def _in_rows(texts: Texts, bounds: Ints) -> Texts:
    """Let the examples of a row be one sequence."""
    return Texts(texts.tokens, texts.offsets[bounds])


def _numbers(texts: Texts, bounds: Ints) -> tuple[Texts, Texts]:
    """Count the examples of each row, and the tokens of each example, from 0."""
    first = np.repeat(bounds[:-1], np.diff(bounds))
    rows = _in_rows(texts, bounds)
    owners = texts.owners()
    return rows.like(owners - first[owners]), rows.like(texts.places())


class TextRows:
    """Rows of examples that fit.

    Args:
        layout: how they are made.
        halves: of examples by number.
        num_examples: there are.
        bounds: int64 [rows + 1], the first example of each row, and the end; left out, each has a row.
    """

    def __init__(self, layout: Layout, halves: Halves, num_examples: int, bounds: Ints | None = None):
        self._layout, self._halves = layout, halves
        self._bounds = np.arange(num_examples + 1) if bounds is None else bounds
        self.num_rows = len(self._bounds) - 1

    def make(self, indices: Ints) -> Arrays:
        """Make the arrays of rows; see `Rows.arrays`."""
        starts, counts = self._bounds[indices], self._bounds[indices + 1] - self._bounds[indices]
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        examples = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], counts)
        return self._layout.arrays(self._halves(examples), bounds)


def chained(inputs: Texts, targets: Texts, input_of: Ints, target_of: Ints) -> Halves:
    """Let examples be an input and a target in one sequence, for gpt; int64 [examples] say which of them."""

    def halves(examples: Ints) -> tuple[Texts, Texts]:
        parts = (inputs.take(input_of[examples]), targets.take(target_of[examples]))
        return joined(*parts), marked(*parts)

    return halves


def stacked(inputs: Texts, targets: Texts, input_of: Ints, target_of: Ints) -> Halves:
    """Let examples be an input and a target, for t5 and bart."""
    return lambda examples: (inputs.take(input_of[examples]), targets.take(target_of[examples]))


def pack(sizes: Sequence[Ints], rooms: Sequence[int]) -> Ints:
    """Put neighbours into a row as long as all their parts fit.

    Args:
        sizes: int64 [examples], of each part.
        rooms: places for each part.

    Returns:
        int64 [rows + 1], the first example of each row, and the end.
    """
    bounds = [0]
    left = list(rooms)
    for number, needed in enumerate(zip(*(part.tolist() for part in sizes), strict=True)):
        if number > bounds[-1] and any(need > room for need, room in zip(needed, left, strict=True)):
            bounds.append(number)
            left = list(rooms)
        left = [room - need for need, room in zip(needed, left, strict=True)]
    return np.array([*bounds, len(sizes[0])], np.int64)
