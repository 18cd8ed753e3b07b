"""BART: the text itself from a noised copy.

Shapes: n samples, r raw tokens, w places of a noised text, k spans, s inputs, d targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmscale.batch import DECODER_DOCUMENT_IDS, DECODER_TOKENS, DOCUMENT_IDS, LABELS, LOSS_MASK, TOKENS
from lmscale.config.lengths import NUM_ENDS, SampleLengths
from lmscale.config.objective import BartConfig
from lmscale.data.draws import integers, streams, uniforms
from lmscale.data.samples import Samples
from lmscale.objectives.base import Arrays, Vocabulary, required
from lmscale.objectives.infilling import cover_spans, poisson_table, span_lengths
from lmscale.objectives.masking import Bools, Ints, choose, close_up, document_ids, shuffled, with_ends

PRESETS = {"bart_paper": (3.0, 0.0), "bart_released": (3.5, 0.1)}
"""span_lambda and random_share: of the paper, and of the command that trained the published models (fairseq #1899)."""

_SENTENCES, _ORDER, _LENGTHS, _WORDS, _IS_RANDOM, _RANDOM_TOKEN = range(300, 306)
_FILLED, _INSERTED, _IS_ROTATED, _ROTATION = 310, 320, 330, 331  # an insertion draws at three sites
_FIRST_RANDOM_ID = 1


class Bart:
    """Noise texts between <s> and </s>: permute sentences, mask, insert, rotate, in this order.

    Raises:
        DataError: if the tokenizer lacks what the objective needs.
    """

    def __init__(self, config: BartConfig, lengths: SampleLengths, vocabulary: Vocabulary):
        self._config, self._lengths, self._vocab_size = config, lengths, vocabulary.vocab_size
        needed = ["pad_id", "bos_id", "eos_id", "mask_id"]
        needed += ["full_stop_id"] if config.permuted_share > 0 else []
        needed += ["is_word_start"] if config.masking != "tokens" and config.masked_share > 0 else []
        values = dict(zip(needed, required(vocabulary, config.name, *needed), strict=True))
        self._pad, self._bos, self._eos, self._mask = (values[name] for name in needed[:4])
        self._full_stop: int | None = values.get("full_stop_id")
        self._is_word_start: Any = values.get("is_word_start")
        own = (config.span_lambda, config.random_share)
        span_lambda, self._random_share = PRESETS[config.preset] if config.preset else own
        self._table = poisson_table(span_lambda)

    def make_batch(self, samples: Samples) -> Arrays:
        """Noise the texts; the decoder has the whole text to predict.

        Sentences: see `permute_sentences`. Masking: see `_fill`. Insertion: see `_insert`. Rotation: a sample in
        rotated_share of them begins with a random one of its tokens and goes on behind its end. <s> and </s> stay
        where they are. A noised text that is too long for the encoder is cut.

        Labels are <s>, text, </s>; the decoder reads them with the last token moved to the front.

        Args:
            samples: texts of at most min(s, d) - 2 tokens.

        Returns:
            tokens, document_ids int64 [n, s]; decoder_tokens, decoder_document_ids, labels int64 [n, d]; loss_mask
            float32 [n, d].

        Source: Lewis et al. 2020, arXiv:1910.13461, sec. 2.2; data/denoising_dataset.py of fairseq, with every draw
        made by the sample's key.
        """
        text, sizes = self._noise(samples)
        encoder, decoder, ends = self._lengths.encoder, self._lengths.decoder, (self._bos, self._eos)
        sizes = np.minimum(sizes, encoder - NUM_ENDS)
        labels = with_ends(samples.tokens, samples.lengths, decoder, ends, self._pad)
        decoder_ids = document_ids(samples.lengths + NUM_ENDS, decoder)
        shifted = np.where(decoder_ids >= 0, np.roll(labels, 1, axis=1), self._pad)
        shifted[:, 0] = self._eos
        return {
            TOKENS.name: with_ends(text, sizes, encoder, ends, self._pad),
            DOCUMENT_IDS.name: document_ids(sizes + NUM_ENDS, encoder),
            DECODER_TOKENS.name: shifted,
            DECODER_DOCUMENT_IDS.name: decoder_ids,
            LABELS.name: labels,
            LOSS_MASK.name: (decoder_ids >= 0).astype(np.float32),
        }

    def _noise(self, samples: Samples) -> tuple[Ints, Ints]:
        """Return noised texts int64 [n, w] and their lengths."""
        config, keys = self._config, samples.keys
        text, sizes = samples.tokens, samples.lengths
        if self._full_stop is not None:
            text = permute_sentences(text, sizes, keys, self._full_stop, config.permuted_share)
        if config.masked_share > 0:
            text, sizes = self._fill(text, sizes, keys)
        if config.inserted_share > 0:
            counts = np.ceil((sizes + NUM_ENDS) * config.inserted_share).astype(np.int64)
            text, sizes = self._insert(text, sizes, counts, keys, _INSERTED)
        if config.rotated_share > 0:
            text = _rotate(text, sizes, keys, config.rotated_share)
        return text, sizes

    def _fill(self, text: Ints, sizes: Ints, keys: Ints) -> tuple[Ints, Ints]:
        """Replace spans of words.

        Of W words, ceil(W masked_share) are to be masked. With spans, lengths are drawn until they sum to that number,
        the last one cut to fit; each length above 0 becomes a span that begins at a random word, no two at the same
        one; each length of 0 becomes a mask that is inserted anywhere. Spans may run into one another, and stop at the
        end of the text, as in the original: 26.9 % of the words are masked at a share of 30 % and a mean length of 3.
        With masking of words or tokens, all lengths are 1; with tokens, each token is a word. Pieces before the first
        begin of a word are never masked.

        A span becomes one mask, a mask for each token, or nothing. With random_share a span has random tokens in the
        place of its masks, each drawn on its own. Of spans that run into one another, one mask is left for each begin
        that lies within no other span; where each token has a mask, the span begun last decides whether it is random.
        """
        is_text = np.arange(text.shape[1]) < sizes[:, None]
        is_start = is_text if self._config.masking == "tokens" else is_text & self._is_word_start[text]
        budgets = np.ceil(is_start.sum(axis=1) * self._config.masked_share).astype(np.int64)
        if self._config.masking == "spans":
            lengths, num_empty = span_lengths(streams(keys, _LENGTHS), budgets, self._table)
        else:
            lengths = (np.arange(int(budgets.max(initial=0))) < budgets[:, None]).astype(np.int64)
            num_empty = np.zeros_like(budgets)
        is_begin, is_inside = cover_spans(streams(keys, _WORDS), is_start, sizes, lengths)
        text, sizes = self._replace(text, is_text, is_begin, is_inside, keys)
        if num_empty.any():
            text, sizes = self._insert(text, sizes, num_empty, keys, _FILLED)
        return text, sizes

    def _replace(self, text: Ints, is_text: Bools, is_begin: Bools, is_inside: Bools, keys: Ints) -> tuple[Ints, Ints]:
        """Put masks for spans that begin and go on at these places, and close up."""
        is_mask = is_begin if self._config.replacement == "one" else is_begin | is_inside
        masks = self._masks(is_begin, is_mask, keys)
        dropped = {"one": is_inside, "each": np.zeros_like(is_text), "none": is_mask}[self._config.replacement]
        return close_up(np.where(is_mask, masks, text), is_text & ~dropped, text.shape[1], 0)

    def _masks(self, is_begin: Bools, is_mask: Bools, keys: Ints) -> Ints:
        """Draw what stands where a mask is: all of a span are masks or all are random tokens, each its own."""
        masks = np.full(is_mask.shape, self._mask)
        if self._random_share > 0 and self._config.replacement != "none":
            width = is_mask.shape[1]
            begins = np.maximum.accumulate(np.where(is_begin, np.arange(width), 0), axis=1)
            is_random = uniforms(streams(keys, _IS_RANDOM), width) < self._random_share
            is_random = np.take_along_axis(is_random, begins, axis=1) & is_mask
            masks[is_random] = self._random_tokens(keys, _RANDOM_TOKEN, width)[is_random]
        return masks

    def _random_tokens(self, keys: Ints, site: int, count: int) -> Ints:
        """Draw any tokens but the first of the vocabulary, as the original: int64 [n, count]."""
        return _FIRST_RANDOM_ID + integers(streams(keys, site), count, self._vocab_size - _FIRST_RANDOM_ID)

    def _insert(self, text: Ints, sizes: Ints, counts: Ints, keys: Ints, site: int) -> tuple[Ints, Ints]:
        """Insert counts[i] masks anywhere in text i; ceil(counts[i] random_share) of them are random tokens."""
        wide = sizes + counts
        places = np.arange(int(wide.max(initial=0)))
        is_place = places < wide[:, None]
        is_mask = choose(streams(keys, site), is_place, counts)
        longer = np.zeros(is_place.shape, np.int64)
        longer[is_place & ~is_mask] = text[np.arange(text.shape[1]) < sizes[:, None]]
        longer[is_mask] = self._mask
        if self._random_share > 0:
            num_random = np.ceil(counts * self._random_share).astype(np.int64)
            is_random = choose(streams(keys, site + 1), is_mask, num_random)
            longer[is_random] = self._random_tokens(keys, site + 2, len(places))[is_random]
        return longer, wide


def permute_sentences(text: Ints, sizes: Ints, keys: Ints, full_stop: int, share: float) -> Ints:
    """Let sentences change places.

    A sentence ends with a full stop that no other precedes; the last token of a text counts as one. Of S sentences,
    ceil(S share) are chosen, and permuted among their places, uniformly. What is behind the last end stays behind.

    Args:
        text: int64 [n, r].
        sizes: int64 [n].
        keys: int64 [n, 4].
        full_stop: id of the piece that ends a sentence.
        share: of the sentences.

    Returns:
        int64 [n, r].

    Source: permute_sentences in data/denoising_dataset.py of fairseq.
    """
    width = text.shape[1]
    places = np.arange(width)
    is_stop = ((text == full_stop) & (places < sizes[:, None])) | (places == sizes[:, None] - 1)
    is_end = is_stop.copy()
    is_end[:, 1:] &= ~is_stop[:, :-1]
    ends = np.cumsum(is_end, axis=1)
    counts = ends[:, -1]
    ranks = _ranks(keys, counts, share)
    rank = np.take_along_axis(ranks, ends - is_end, axis=1)
    # Sentences in their new order, the tokens of each in their old one.
    order = rank * width + places
    order.sort(axis=1)
    return np.take_along_axis(text, order % width, axis=1)


def _ranks(keys: Ints, counts: Ints, share: float) -> Ints:
    """Draw the new place of each sentence: int64 [n, k + 1]; those behind the last one stay."""
    most = int(counts.max(initial=0)) + 1
    numbers = np.arange(most)
    is_moved = choose(streams(keys, _SENTENCES), numbers < counts[:, None], np.ceil(counts * share).astype(np.int64))
    ranks = np.broadcast_to(numbers, is_moved.shape).copy()
    is_used = numbers < is_moved.sum(axis=1)[:, None]
    # The j-th of the shuffled sentences goes to the j-th of their places.
    moved = shuffled(streams(keys, _ORDER), is_moved)
    rows = np.nonzero(is_used)[0]
    ranks[rows, moved[is_used]] = np.nonzero(is_moved)[1]
    return ranks


def _rotate(text: Ints, sizes: Ints, keys: Ints, share: float) -> Ints:
    """Let a share of the texts begin with a random token; the cut can also be at the end, which changes nothing."""
    is_rotated = uniforms(streams(keys, _IS_ROTATED), 1)[:, 0] < share
    cuts = integers(streams(keys, _ROTATION), 1, (sizes + 1)[:, None])[:, 0] * is_rotated
    places = np.arange(text.shape[1])
    turned = (places + cuts[:, None]) % np.maximum(sizes, 1)[:, None]
    return np.take_along_axis(text, np.where(places < sizes[:, None], turned, places), axis=1)
