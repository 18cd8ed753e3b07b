"""Random choices among the places of many rows at once, and what masked-token objectives share.

Shapes: n samples, w places of a row, l places for labels. Every choice is a function of the row's own stream: it does
not depend on the other rows, nor on w beyond the row's candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.batch import LABELS, LOSS_MASK, MASKED_POSITIONS, PADDING_ID, TOKENS
from lmscale.data.draws import hashes, integers, streams, uniforms
from lmscale.objectives.base import Arrays

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Streams = NDArray[np.uint64]

_PLACE_BITS = np.uint64(20)
_PLACE_MASK = np.uint64((1 << 20) - 1)
_NO_CANDIDATE = np.uint64(1 << 63)
_ONE = np.uint64(1)


def random_order(stream: Streams, is_candidate: Bools) -> NDArray[np.uint64]:
    """Give each candidate place a random number that no other place of its row has.

    The place is in the low bits, so that a sort of the numbers is also a shuffle of the places; those that are no
    candidates come last.

    Args:
        stream: uint64 [n].
        is_candidate: bool [n, w], w below 2^20.

    Returns:
        uint64 [n, w].
    """
    places = np.arange(is_candidate.shape[1], dtype=np.uint64)
    order = hashes(stream, is_candidate.shape[1])
    order >>= _ONE
    order &= ~_PLACE_MASK
    order |= places
    order |= np.where(is_candidate, np.uint64(0), _NO_CANDIDATE)
    return order


def shuffled(stream: Streams, is_candidate: Bools) -> Ints:
    """List the candidate places of each row in random order, the others behind them: int64 [n, w]."""
    order = random_order(stream, is_candidate)
    order.sort(axis=1)
    return (order & _PLACE_MASK).astype(np.int64)


def choose(stream: Streams, is_candidate: Bools, counts: Ints) -> Bools:
    """Choose counts[i] of row i's candidates, each set with the same probability; all of them where there are fewer.

    Args:
        stream: uint64 [n].
        is_candidate: bool [n, w].
        counts: int64 [n].

    Returns:
        bool [n, w].
    """
    order = random_order(stream, is_candidate)
    if order.shape[1] == 0:
        return is_candidate
    last = np.clip(counts, 1, order.shape[1])[:, None] - 1
    limit = np.take_along_axis(np.sort(order, axis=1), last, axis=1)
    chosen: Bools = (order <= limit) & is_candidate & (counts > 0)[:, None]
    return chosen


def choose_groups(stream: Streams, is_candidate: Bools, is_head: Bools, budgets: Ints) -> Bools:
    """Choose whole groups of candidates, in random order, as long as they fit the budget.

    A group is a head and the candidates behind it, up to the next head. The groups are walked in random order; one
    that would exceed what is left of the budget is passed over, smaller ones behind it still count.

    Args:
        stream: uint64 [n].
        is_candidate: bool [n, w]; the first one of a row is a head in any case.
        is_head: bool [n, w].
        budgets: int64 [n], most places to choose.

    Returns:
        bool [n, w].

    Source: create_masked_lm_predictions of google-research/bert.
    """
    num_rows, width = is_candidate.shape
    places = np.arange(width)
    is_head = is_head & is_candidate
    is_head[np.arange(num_rows), is_candidate.argmax(axis=1)] = is_candidate.any(axis=1)
    heads = np.maximum.accumulate(np.where(is_head, places, 0), axis=1)
    flat = (heads + np.arange(num_rows)[:, None] * width)[is_candidate]
    sizes = np.bincount(flat, minlength=num_rows * width).reshape(num_rows, width)
    order = shuffled(stream, is_head)
    taken = _walk(np.take_along_axis(sizes, order, axis=1), budgets)
    is_taken = np.zeros_like(is_candidate)
    np.put_along_axis(is_taken, order, taken, axis=1)
    chosen: Bools = np.take_along_axis(is_taken, heads, axis=1) & is_candidate
    return chosen


def _walk(sizes: Ints, budgets: Ints) -> Bools:
    """Take groups from left to right, passing over each that exceeds what is left of the budget.

    Each round takes all groups before the first one that does not fit, and drops all behind that are larger than what
    is left then. What is left shrinks in every round, so there are no more rounds than the largest group has places.
    """
    left = sizes.copy()
    places = np.arange(sizes.shape[1])
    while True:
        sums = np.cumsum(left, axis=1)
        is_over = (sums > budgets[:, None]) & (left > 0)
        if not is_over.any():
            return left > 0
        first = np.where(is_over.any(axis=1), is_over.argmax(axis=1), sizes.shape[1])
        before = np.where(places < first[:, None], left, 0).sum(axis=1)
        left[(places >= first[:, None]) & (left > (budgets - before)[:, None])] = 0


def close_up(values: NDArray[Any], is_kept: Bools, width: int, fill: int) -> tuple[NDArray[Any], Ints]:
    """Move what is kept of each row to its left end.

    Args:
        values: [n, w].
        is_kept: bool [n, w], at most `width` in a row.
        width: of the result.
        fill: behind what was kept.

    Returns:
        [n, width], and int64 [n], how many were kept.
    """
    counts = is_kept.sum(axis=1)
    closed = np.full((len(values), width), fill, values.dtype)
    closed[np.arange(width) < counts[:, None]] = values[is_kept]
    return closed, counts


def document_ids(lengths: Ints, width: int) -> Ints:
    """Give a row that holds one document 0 up to its length, and padding behind it: int64 [n, width]."""
    return np.where(np.arange(width) < lengths[:, None], 0, PADDING_ID)


def with_ends(text: Ints, lengths: Ints, width: int, ends: tuple[int | None, int], pad_id: int) -> Ints:
    """Put a special token before and one behind each text.

    Args:
        text: int64 [n, w]; what is behind a row's length is not read.
        lengths: int64 [n].
        width: of the result.
        ends: ids of the first token, None for no such token, and of the last.
        pad_id: behind the last.

    Returns:
        int64 [n, width].
    """
    first, last = ends
    begin = 0 if first is None else 1
    framed = np.full((len(text), width), pad_id, np.int64)
    columns = min(text.shape[1], width - begin)
    part = framed[:, begin : begin + columns]
    np.copyto(part, text[:, :columns], where=np.arange(columns) < lengths[:, None])
    if first is not None:
        framed[:, 0] = first
    framed[np.arange(len(text)), lengths + begin] = last
    return framed


@dataclass(frozen=True)
class Masking:
    """What the model reads in the place of a token that it is to predict.

    Attributes:
        mask_id: for most of them.
        kept_share: of these, read as they are.
        random_share: of these, read as a random token.
        random_ids: int64, what random tokens are drawn from, uniformly.
        sites: of the two draws.
    """

    mask_id: int
    kept_share: float
    random_share: float
    random_ids: Ints
    sites: tuple[int, int]

    def apply(self, tokens: Ints, is_masked: Bools, keys: Ints, num_labels: int) -> Arrays:
        """Mask tokens, each by a draw of its own, and say what is to be predicted.

        Args:
            tokens: int64 [n, s].
            is_masked: bool [n, s], at most l in a row.
            keys: int64 [n, 4].
            num_labels: l.

        Returns:
            tokens int64 [n, s]; masked_positions in rising order and labels, both int64 [n, l] with 0 in unused
            places; loss_mask float32 [n, l].
        """
        is_used = np.arange(num_labels) < is_masked.sum(axis=1)[:, None]
        positions, labels = (np.zeros(is_used.shape, np.int64) for _ in range(2))
        positions[is_used] = np.nonzero(is_masked)[1]
        labels[is_used] = tokens[is_masked]
        masked = tokens.copy()
        masked[is_masked] = self._read(labels, keys)[is_used]
        return {
            TOKENS.name: masked,
            MASKED_POSITIONS.name: positions,
            LABELS.name: labels,
            LOSS_MASK.name: is_used.astype(np.float32),
        }

    def _read(self, labels: Ints, keys: Ints) -> Ints:
        fate_site, random_site = self.sites
        fates = uniforms(streams(keys, fate_site), labels.shape[1])
        read = np.where(fates < self.kept_share, labels, self.mask_id)
        is_random = (fates >= self.kept_share) & (fates < self.kept_share + self.random_share)
        if is_random.any():
            drawn = integers(streams(keys, random_site), labels.shape[1], len(self.random_ids))
            read[is_random] = self.random_ids[drawn[is_random]]
        return read
