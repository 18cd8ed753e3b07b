"""BERT: masked tokens of a pair of segments, and whether the second follows the first."""

from __future__ import annotations

import numpy as np

from lmscale.batch import DOCUMENT_IDS, IS_RANDOM_NEXT, TOKEN_TYPES
from lmscale.config.lengths import NUM_PAIR_ENDS, SampleLengths
from lmscale.config.objective import BertConfig
from lmscale.data.draws import streams
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays, Vocabulary, required
from lmscale.objectives.masking import Bools, Ints, Masking, choose, choose_groups, document_ids

NEXT_SENTENCE_IS_RANDOM = 1
"""The label of a pair whose segment B was taken from elsewhere, as google-research/bert has it."""
NEXT_SENTENCE_FOLLOWS = 0

KEPT_SHARE = 0.1
"""Of the tokens to predict, that the model reads as they are."""
RANDOM_SHARE = 0.1
"""Of these, that it reads as a random token."""

_CHOICE, _FATE, _RANDOM_TOKEN = 100, 101, 102
_EPOCH = 2  # column of a sample's key


class Bert:
    """Mask tokens of [CLS] A [SEP] B [SEP].

    Raises:
        DataError: if the tokenizer lacks what the objective needs.
    """

    def __init__(self, config: BertConfig, lengths: SampleLengths, vocabulary: Vocabulary):
        needed = ("pad_id", "mask_id", "cls_id", "sep_id") + (("is_word_start",) if config.whole_words else ())
        self._pad, mask, self._cls, self._sep, *words = required(vocabulary, config.name, *needed)
        self._is_word_start = words[0] if words else None
        self._config, self._lengths = config, lengths
        ids = np.arange(vocabulary.vocab_size)
        self._masking = Masking(mask, KEPT_SHARE, RANDOM_SHARE, ids, (_FATE, _RANDOM_TOKEN))

    def make_batch(self, samples: Samples) -> Arrays:
        """Join the pairs and mask them.

        Of a sample of L tokens, special ones counted in, min(max_predictions, max(1, round(L masked_share))) are
        predicted, a half rounded to the even number. [CLS] and [SEP] are never among them. Each is read as [MASK] with
        probability 0.8, as it is with 0.1, as a random token of the whole vocabulary with 0.1. With whole_words, words
        are taken in random order, and one that would exceed that number is passed over; a piece of B that continues a
        word at its very begin counts to the last word of A, as in the original.

        Args:
            samples: pairs of segments, at most s - 3 tokens together.

        Returns:
            tokens, token_types, document_ids int64 [n, s]; masked_positions, labels int64 [n, l]; loss_mask float32
            [n, l]; is_random_next int64 [n].

        Source: Devlin et al. 2019, arXiv:1810.04805, sec. 3.1; create_pretraining_data.py of google-research/bert.
        """
        if samples.first_lengths is None or samples.is_random_next is None:
            raise ValueError("bert reads samples that are pairs of segments")
        first, sizes = samples.first_lengths, samples.lengths + NUM_PAIR_ENDS
        tokens = self._join(samples.tokens, first, sizes)
        keys = self._mask_keys(samples.keys)
        batch = self._masking.apply(tokens, self._choose(tokens, first, sizes, keys), keys, self._lengths.labels)
        places = np.arange(self._lengths.encoder)
        is_second = (places >= first[:, None] + 2) & (places < sizes[:, None])
        batch[TOKEN_TYPES.name] = is_second.astype(np.int64)
        batch[DOCUMENT_IDS.name] = document_ids(sizes, self._lengths.encoder)
        is_random = samples.is_random_next
        batch[IS_RANDOM_NEXT.name] = np.where(is_random, NEXT_SENTENCE_IS_RANDOM, NEXT_SENTENCE_FOLLOWS)
        return batch

    def _join(self, text: Ints, first: Ints, sizes: Ints) -> Ints:
        """[n, r] -> [n, s]: [CLS] A [SEP] B [SEP], padded."""
        places = np.arange(self._lengths.encoder)
        behind_first = first[:, None] + 1
        origin = np.clip(places - 1 - (places > behind_first), 0, text.shape[1] - 1)
        tokens = np.take_along_axis(text, origin, axis=1)
        tokens[:, 0] = self._cls
        rows = np.arange(len(text))
        tokens[rows, first + 1] = self._sep
        tokens[rows, sizes - 1] = self._sep
        tokens[places >= sizes[:, None]] = self._pad
        return tokens

    def _choose(self, tokens: Ints, first: Ints, sizes: Ints, keys: Ints) -> Bools:
        """[n, s] -> bool [n, s]: the tokens to predict."""
        places = np.arange(tokens.shape[1])
        is_candidate = (places < sizes[:, None] - 1) & (places != first[:, None] + 1)
        is_candidate[:, 0] = False
        wanted = np.maximum(np.rint(sizes * self._config.masked_share).astype(np.int64), 1)
        budgets = np.minimum(wanted, self._lengths.labels)
        stream = streams(keys, _CHOICE)
        if self._is_word_start is None:
            return choose(stream, is_candidate, budgets)
        return choose_groups(stream, is_candidate, self._is_word_start[tokens], budgets)

    def _mask_keys(self, keys: Ints) -> Ints:
        """Let epochs repeat after `static_copies` of them."""
        copies = self._config.static_copies
        if copies == 0:
            return keys
        keys = keys.copy()
        keys[:, _EPOCH] %= copies
        return keys
