"""Examples of inputs and targets, and rows that hold several of them.

Shapes: m examples, n rows, s inputs and d targets of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmscale.batch import (
    DECODER_DOCUMENT_IDS,
    DECODER_POSITIONS,
    DECODER_TOKENS,
    DOCUMENT_IDS,
    LABELS,
    LOSS_MASK,
    PADDING_ID,
    POSITIONS,
    TOKENS,
)
from lmscale.config.lengths import SampleLengths
from lmscale.errors import DataError
from lmscale.objectives.base import Arrays, Vocabulary, required
from lmscale.objectives.masking import Ints
from lmscale.objectives.t5 import shifted_right

_NEEDED_BY = "t5"


@dataclass(frozen=True)
class Examples:
    """Pairs of inputs and targets, with their ends.

    Attributes:
        inputs: int64 [m, a], what is behind an example's length is not read.
        input_lengths: int64 [m].
        targets: int64 [m, b].
        target_lengths: int64 [m].
    """

    inputs: Ints
    input_lengths: Ints
    targets: Ints
    target_lengths: Ints


def text_to_text(
    texts: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]], lengths: SampleLengths, vocabulary: Vocabulary
) -> Examples:
    """Make examples of a task: prefix, input, end -> target, end.

    Args:
        texts: of each example the tokens of the task's prefix ("summarize: "), of the input and of the target, without
            ends.
        lengths: inputs are cut to the encoder's and targets to the decoder's, before their end is put behind them.
        vocabulary: of the tokenizer.

    Raises:
        DataError: if the tokenizer has no token for the end of a text.

    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.4 and appendix D.
    """
    (eos,) = required(vocabulary, _NEEDED_BY, "eos_id")
    inputs = [[*[*prefix, *text][: lengths.encoder - 1], eos] for prefix, text, _ in texts]
    targets = [[*target[: lengths.decoder - 1], eos] for _, _, target in texts]
    return Examples(*_rectangle(inputs), *_rectangle(targets))


def pack_examples(examples: Examples, lengths: SampleLengths, vocabulary: Vocabulary) -> Arrays:
    """Put examples into rows, one behind the other, in order: each into the current row, or a new one if it is full.

    The examples of a row are numbered 0, 1, ... in document_ids and decoder_document_ids, so that they do not see each
    other. Positions count from 0 in each; the decoder starts each with the padding token.

    Args:
        examples: each of at most s inputs and d targets.
        lengths: of the rows.
        vocabulary: of the tokenizer.

    Returns:
        tokens, positions, document_ids int64 [n, s]; decoder_tokens, decoder_positions, decoder_document_ids, labels
        int64 [n, d]; loss_mask float32 [n, d].

    Raises:
        DataError: if an example is longer than a row, or the tokenizer has no token for padding.

    Source: pack_or_pad in transformer/dataset.py of tensorflow/mesh.
    """
    (pad,) = required(vocabulary, _NEEDED_BY, "pad_id")
    rows = _rows(examples, lengths)
    tokens, positions, ids = _place(examples.inputs, examples.input_lengths, rows, lengths.encoder, pad)
    labels, label_positions, label_ids = _place(examples.targets, examples.target_lengths, rows, lengths.decoder, pad)
    return {
        TOKENS.name: tokens,
        POSITIONS.name: positions,
        DOCUMENT_IDS.name: ids,
        DECODER_TOKENS.name: shifted_right(labels, label_ids, pad),
        DECODER_POSITIONS.name: label_positions,
        DECODER_DOCUMENT_IDS.name: label_ids,
        LABELS.name: labels,
        LOSS_MASK.name: (label_ids >= 0).astype(np.float32),
    }


def _rectangle(lists: list[list[int]]) -> tuple[Ints, Ints]:
    sizes = np.array([len(tokens) for tokens in lists], np.int64)
    padded = np.zeros((len(lists), int(sizes.max(initial=0))), np.int64)
    if lists:
        padded[np.arange(padded.shape[1]) < sizes[:, None]] = np.concatenate([np.array(each) for each in lists])
    return padded, sizes


def _rows(examples: Examples, lengths: SampleLengths) -> Ints:
    """Give each example the number of its row: int64 [m], from 0 on, rising by at most one."""
    num_examples = len(examples.input_lengths)
    behind = np.full(num_examples, num_examples)  # the first example that does not fit into a row begun by this one
    for sizes, room, field in (
        (examples.input_lengths, lengths.encoder, "data.seq_length"),
        (examples.target_lengths, lengths.decoder, "data.decoder_seq_length"),
    ):
        if num_examples and sizes.max() > room:
            raise DataError(f"is shorter than an example of {sizes.max()} tokens", field=field, value=room)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        behind = np.minimum(behind, np.searchsorted(ends, ends[:-1] + room, side="right") - 1)
    begins = np.zeros(num_examples, np.int64)
    first = 0
    while first < num_examples:
        begins[first] = 1
        first = int(behind[first])
    return np.cumsum(begins) - 1


def _place(tokens: Ints, sizes: Ints, rows: Ints, width: int, pad: int) -> tuple[Ints, Ints, Ints]:
    """Copy examples to their rows; return tokens, positions and numbers of the examples, each int64 [n, width]."""
    num_rows = int(rows.max(initial=-1)) + 1
    first = np.searchsorted(rows, np.arange(num_rows))  # the first example of each row
    before = np.cumsum(sizes) - sizes
    offsets = before - before[first][rows]
    inside = np.arange(tokens.shape[1])
    is_token = inside < sizes[:, None]
    where = (np.repeat(rows, sizes), (offsets[:, None] + inside)[is_token])
    packed, positions, numbers = (np.full((num_rows, width), fill) for fill in (pad, 0, PADDING_ID))
    packed[where] = tokens[is_token]
    positions[where] = np.broadcast_to(inside, tokens.shape)[is_token]
    numbers[where] = np.repeat(np.arange(len(rows)) - first[rows], sizes)
    return packed, positions, numbers
