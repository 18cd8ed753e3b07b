"""Spans of words for text infilling, of Poisson length.

Shapes: n samples, r tokens, k spans.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lmscale.data.draws import uniforms
from lmscale.errors import ConfigError
from lmscale.objectives.masking import Bools, Ints, Streams, shuffled

_LEAST_LAMBDA = 0.1
_LEAST_PROBABILITY = 1e-7
_MOST_LENGTHS = 128


def poisson_table(mean: float) -> NDArray[np.float64]:
    """Sum the probabilities of the lengths 0, 1, ...: the last sum is 1.

    Lengths end behind the mean where one is less likely than 1e-7, and at 127; what is left out is shared by the
    others.

    Raises:
        ConfigError: if almost all lengths would be 0.

    Source: data/denoising_dataset.py of fairseq.
    """
    if mean < _LEAST_LAMBDA:
        raise ConfigError(f"must be at least {_LEAST_LAMBDA}", field="objective.span_lambda", value=mean)
    lengths = np.arange(_MOST_LENGTHS)
    logs = lengths * math.log(mean) - mean - np.array([math.lgamma(length + 1) for length in lengths.tolist()])
    is_rare = (logs < math.log(_LEAST_PROBABILITY)) & (lengths > mean)
    last = int(is_rare.argmax()) if is_rare.any() else _MOST_LENGTHS - 1
    sums = np.cumsum(np.exp(logs[: last + 1] - logs[: last + 1].max()))
    table: NDArray[np.float64] = sums / sums[-1]
    return table


def span_lengths(stream: Streams, budgets: Ints, table: NDArray[np.float64]) -> tuple[Ints, Ints]:
    """Draw lengths until they sum to the budget; the last one is cut to fit.

    Args:
        stream: uint64 [n].
        budgets: int64 [n].
        table: of `poisson_table`.

    Returns:
        int64 [n, k], the lengths above 0, in the order drawn, 0 behind them; int64 [n], how many were 0.
    """
    most = int(budgets.max(initial=0))
    mean = float((1 - table).sum())
    count = int(most / mean) + 16
    while True:
        drawn = np.searchsorted(table, uniforms(stream, count), side="right")
        sums = np.cumsum(drawn, axis=1)
        if (sums[:, -1] >= budgets).all():
            break
        count *= 2
    before = sums - drawn
    drawn = np.minimum(drawn, np.maximum(budgets[:, None] - before, 0))
    num_empty = ((drawn == 0) & (before < budgets[:, None])).sum(axis=1)
    is_span = drawn > 0
    counts = is_span.sum(axis=1)
    lengths = np.zeros((len(budgets), int(counts.max(initial=0))), np.int64)
    lengths[np.arange(lengths.shape[1]) < counts[:, None]] = drawn[is_span]
    return lengths, num_empty


def cover_spans(stream: Streams, is_start: Bools, sizes: Ints, lengths: Ints) -> tuple[Bools, Bools]:
    """Let spans begin at words drawn at random, no two at the same one, each `lengths` words long.

    Args:
        stream: uint64 [n].
        is_start: bool [n, r], where words begin.
        sizes: int64 [n], tokens of each text; a span does not go on behind it.
        lengths: int64 [n, k], in words; 0 is no span. No more spans in a row than words.

    Returns:
        bool [n, r] twice: where spans begin, and where one goes on behind its begin. A place can be both.
    """
    num_rows, width = is_start.shape
    num_words = is_start.sum(axis=1)
    most = int(num_words.max(initial=0))
    words = np.arange(most + 1)
    begins = np.repeat(sizes[:, None], most + 1, axis=1)  # of each word; behind the last one, the end of the text
    begins[words < num_words[:, None]] = np.nonzero(is_start)[1]
    chosen = shuffled(stream, words[:most] < num_words[:, None])[:, : lengths.shape[1]]
    is_span = lengths > 0
    first = np.take_along_axis(begins, chosen, axis=1)[is_span]
    ends = np.take_along_axis(begins, np.minimum(chosen + lengths, most), axis=1)[is_span]
    offsets = np.nonzero(is_span)[0] * (width + 2)
    changes = np.bincount(offsets + first + 1, minlength=num_rows * (width + 2))
    changes -= np.bincount(offsets + ends, minlength=num_rows * (width + 2))
    is_inside = np.cumsum(changes.reshape(num_rows, -1), axis=1)[:, :width] > 0
    is_begin = np.zeros(is_start.shape, bool)
    is_begin[np.nonzero(is_span)[0], first] = True
    return is_begin, is_inside
