"""RoBERTa: masked tokens, drawn anew in each epoch."""

from __future__ import annotations

import numpy as np

from lmscale.batch import DOCUMENT_IDS
from lmscale.config.lengths import NUM_ENDS, SampleLengths
from lmscale.config.objective import RobertaConfig
from lmscale.data.draws import streams, uniforms
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays, Vocabulary, required, text_ids
from lmscale.objectives.masking import Bools, Ints, Masking, choose, choose_groups, document_ids, with_ends

_COUNT, _CHOICE, _FATE, _RANDOM_TOKEN = 200, 201, 202, 203


class Roberta:
    """Mask tokens of <s> text </s>.

    Raises:
        DataError: if the tokenizer lacks what the objective needs.
    """

    def __init__(self, config: RobertaConfig, lengths: SampleLengths, vocabulary: Vocabulary):
        needed = ("pad_id", "mask_id", "bos_id", "eos_id") + (("is_word_start",) if config.whole_words else ())
        self._pad, mask, self._bos, self._eos, *words = required(vocabulary, config.name, *needed)
        self._is_word_start = words[0] if words else None
        self._config, self._lengths = config, lengths
        random_ids = text_ids(vocabulary, config.name) if config.random_share > 0 else np.zeros(0, np.int64)
        self._masking = Masking(mask, config.kept_share, config.random_share, random_ids, (_FATE, _RANDOM_TOKEN))

    def make_batch(self, samples: Samples) -> Arrays:
        """Put the texts between their ends and mask them.

        Of a sample of L tokens, its two ends counted in, floor(L masked_share + u) are predicted, u uniform on [0, 1)
        for each sample, so that the share is met in the mean. The ends can be among them. kept_share of them are read
        as they are, random_share as a random token that is not a special one, the others as <mask>.

        With whole_words, words are taken in random order up to that number of tokens, and one that would exceed it is
        passed over. (fairseq takes that share of the words, however long they are; here the places for labels are
        fixed.)

        Args:
            samples: texts of at most s - 2 tokens.

        Returns:
            tokens, document_ids int64 [n, s]; masked_positions, labels int64 [n, l]; loss_mask float32 [n, l].

        Source: Liu et al. 2019, arXiv:1907.11692, sec. 4.1; data/mask_tokens_dataset.py of fairseq.
        """
        width, sizes = self._lengths.encoder, samples.lengths + NUM_ENDS
        tokens = with_ends(samples.tokens, samples.lengths, width, (self._bos, self._eos), self._pad)
        is_masked = self._choose(tokens, sizes, samples.keys)
        batch = self._masking.apply(tokens, is_masked, samples.keys, self._lengths.labels)
        batch[DOCUMENT_IDS.name] = document_ids(sizes, width)
        return batch

    def _choose(self, tokens: Ints, sizes: Ints, keys: Ints) -> Bools:
        """[n, s] -> bool [n, s]: the tokens to predict."""
        rounding = uniforms(streams(keys, _COUNT), 1)[:, 0]
        wanted = np.floor(sizes * self._config.masked_share + rounding).astype(np.int64)
        budgets = np.minimum(wanted, self._lengths.labels)
        places, stream = np.arange(tokens.shape[1]), streams(keys, _CHOICE)
        is_candidate = places < sizes[:, None]
        if self._is_word_start is None:
            return choose(stream, is_candidate, budgets)
        # The ends are words of their own, and a text that was cut within a word begins with one.
        is_head = self._is_word_start[tokens] | (places <= 1) | (places == sizes[:, None] - 1)
        return choose_groups(stream, is_candidate, is_head, budgets)
