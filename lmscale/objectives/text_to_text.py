"""Text to text: the target of an example from its input, with several examples in a row.

Shapes: n samples, r raw tokens, s inputs and d targets of a row, m examples of the fullest row.
"""

from __future__ import annotations

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
from lmscale.config.objective import TextToTextConfig
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays, Vocabulary, required
from lmscale.objectives.masking import Bools, Ints
from lmscale.objectives.t5 import shifted_right


class TextToText:
    """Part inputs and targets of examples, and end each.

    Raises:
        DataError: if the tokenizer has no token for padding or for the end of a text.
    """

    def __init__(self, config: TextToTextConfig, lengths: SampleLengths, vocabulary: Vocabulary):
        self._packed, self._lengths = config.packed, lengths
        self._pad, self._eos = required(vocabulary, config.name, "pad_id", "eos_id")

    def make_batch(self, samples: Samples) -> Arrays:
        """Place the examples of each sample one behind the other, inputs in one row and targets in another.

        The examples of a row are numbered 0, 1, ... in document_ids and decoder_document_ids, so that they do not see
        each other. Positions count from 0 in each; the decoder starts each with the padding token.

        Returns:
            tokens, document_ids int64 [n, s]; decoder_tokens, decoder_document_ids, labels int64 [n, d]; loss_mask
            float32 [n, d]; where examples are packed, positions int64 [n, s] and decoder_positions int64 [n, d].

        Source: Raffel et al. 2020, arXiv:1910.10683, sec. 2.4; pack_or_pad in transformer/dataset.py of tensorflow/mesh.
        """
        assert samples.is_target is not None
        is_token = np.arange(samples.tokens.shape[1]) < samples.lengths[:, None]
        tokens, positions, ids = self._place(samples, is_token & ~samples.is_target, self._lengths.encoder)
        labels, decoder_positions, decoder_ids = self._place(
            samples, is_token & samples.is_target, self._lengths.decoder
        )
        restarts = {POSITIONS.name: positions, DECODER_POSITIONS.name: decoder_positions}
        return {
            TOKENS.name: tokens,
            DOCUMENT_IDS.name: ids,
            DECODER_TOKENS.name: shifted_right(labels, decoder_ids, self._pad),
            DECODER_DOCUMENT_IDS.name: decoder_ids,
            LABELS.name: labels,
            LOSS_MASK.name: (decoder_ids >= 0).astype(np.float32),
            **(restarts if self._packed else {}),
        }

    def _place(self, samples: Samples, is_mine: Bools, width: int) -> tuple[Ints, Ints, Ints]:
        """Copy the chosen tokens to rows, an end behind each example: tokens, positions, numbers, int64 [n, width]."""
        assert samples.document_ids is not None
        num_rows = len(is_mine)
        rows, columns = np.nonzero(is_mine)
        examples = samples.document_ids[rows, columns]
        most = int(examples.max(initial=0)) + 1
        sizes = np.bincount(rows * most + examples, minlength=num_rows * most).reshape(num_rows, most)
        ends = np.cumsum(sizes + 1, axis=1) - 1
        starts = ends - sizes
        places = np.cumsum(is_mine, axis=1)[rows, columns] - 1 + examples
        placed, positions, numbers = (np.full((num_rows, width), fill) for fill in (self._pad, 0, PADDING_ID))
        placed[rows, places] = samples.tokens[rows, columns]
        positions[rows, places] = places - starts[rows, examples]
        numbers[rows, places] = examples
        ended, nth = np.nonzero(sizes)
        end = (ended, ends[ended, nth])
        placed[end], positions[end], numbers[end] = self._eos, sizes[ended, nth], nth
        return placed, positions, numbers
