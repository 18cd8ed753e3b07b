"""T5: spans of the text from what is left of it, and its relatives.

Shapes: n samples, r raw tokens, s inputs, d targets, k spans.
"""

from __future__ import annotations

import numpy as np

from lmscale.batch import DECODER_DOCUMENT_IDS, DECODER_TOKENS, DOCUMENT_IDS, LABELS, LOSS_MASK, TOKENS
from lmscale.config.lengths import SampleLengths, noised_lengths
from lmscale.config.objective import T5Config
from lmscale.data.draws import integers, streams, uniforms
from lmscale.data.samples import Samples
from lmscale.errors import DataError
from lmscale.objectives.base import Arrays, Vocabulary, required, text_ids
from lmscale.objectives.masking import Bools, Ints, Streams, choose, close_up, document_ids, shuffled, with_ends

_NOISE, _KEPT, _IID, _FATE, _RANDOM_TOKEN, _PREFIX, _SHUFFLE = range(400, 407)
_SIGMAS = 3
"""Of the number of spans of iid noise: a tokenizer whose sentinels do not reach so far is refused."""

Pair = tuple[Ints, Ints, Ints, Ints]
"""Inputs, their lengths, targets, their lengths, without their ends."""


class T5:
    """Make inputs and targets of a text.

    Raises:
        DataError: if the tokenizer lacks what the objective needs.
    """

    def __init__(self, config: T5Config, lengths: SampleLengths, vocabulary: Vocabulary):
        self._config, self._lengths = config, lengths
        self._pad, self._eos = required(vocabulary, config.name, "pad_id", "eos_id")
        if config.noise in ("spans", "iid", "bert"):
            (sentinels,) = required(vocabulary, config.name, "sentinel_ids")
            self._sentinels = np.array(sentinels, np.int64)
        if config.noise in ("spans", "iid"):
            _check_sentinels(config, lengths.raw, len(self._sentinels))
        if config.noise == "bert" and config.random_share > 0:
            self._random_ids = text_ids(vocabulary, config.name)
        makers = {"spans": self._spans, "iid": self._iid, "bert": self._masked}
        self._make = {**makers, "prefix_lm": self._prefix, "deshuffle": self._deshuffled}[config.noise]

    def make_batch(self, samples: Samples) -> Arrays:
        """Noise the texts.

        spans: see `span_mask`. iid: each token is noise with probability `density`. In both, the inputs have one
        sentinel for each run of noise, the targets each run behind its sentinel; the k-th of a sample is <extra_id_k>.
        Texts that begin with noise or end without get no other treatment. (The original makes the targets by
        exchanging noise and text, which differs for iid only: there it shifts the sentinels of a text that begins with
        noise, and puts one more behind the last run.)
        bert: the targets are the text, the inputs a copy in which each token is noise with probability `density`: a
        random token that is text, with random_share, else <extra_id_0>.
        prefix_lm: the inputs are the first u tokens, the targets the others, u uniform on 1 .. L - 1.
        deshuffle: the inputs are the tokens in random order, the targets the text.

        Inputs and targets end with </s>. The decoder reads the targets behind a padding token, without their end.

        Args:
            samples: texts of at most r tokens.

        Returns:
            tokens, document_ids int64 [n, s]; decoder_tokens, decoder_document_ids, labels int64 [n, d]; loss_mask
            float32 [n, d].

        Source: Raffel et al. 2020, arXiv:1910.10683, sec. 3.1.4, 3.3; data/preprocessors.py of
        google-research/text-to-text-transfer-transformer.
        """
        inputs, input_sizes, targets, target_sizes = self._make(samples)
        encoder, decoder = self._lengths.encoder, self._lengths.decoder
        labels = with_ends(targets, target_sizes, decoder, (None, self._eos), self._pad)
        decoder_ids = document_ids(target_sizes + 1, decoder)
        return {
            TOKENS.name: with_ends(inputs, input_sizes, encoder, (None, self._eos), self._pad),
            DOCUMENT_IDS.name: document_ids(input_sizes + 1, encoder),
            DECODER_TOKENS.name: shifted_right(labels, decoder_ids, self._pad),
            DECODER_DOCUMENT_IDS.name: decoder_ids,
            LABELS.name: labels,
            LOSS_MASK.name: (decoder_ids >= 0).astype(np.float32),
        }

    def _spans(self, samples: Samples) -> Pair:
        mask = span_mask(
            samples.lengths, samples.keys, samples.tokens.shape[1], self._config.density, self._config.mean_span
        )
        return self._corrupted(samples, mask)

    def _iid(self, samples: Samples) -> Pair:
        return self._corrupted(samples, self._iid_mask(samples))

    def _corrupted(self, samples: Samples, is_noise: Bools) -> Pair:
        """Leave out noise that has no sentinel or no place in the targets any more, which only iid noise can make."""
        is_first = _run_begins(is_noise)
        spans = np.cumsum(is_first, axis=1)
        has_room = (spans <= len(self._sentinels)) & (np.cumsum(is_noise, axis=1) + spans < self._lengths.decoder)
        is_text = np.arange(is_noise.shape[1]) < samples.lengths[:, None]
        return corrupted(samples.tokens, is_text, is_noise & has_room, self._sentinels)

    def _masked(self, samples: Samples) -> Pair:
        text, keys = samples.tokens, samples.keys
        is_noise = self._iid_mask(samples)
        inputs = np.where(is_noise, self._sentinels[0], text)
        if self._config.random_share > 0:
            fates = uniforms(streams(keys, _FATE), text.shape[1])
            is_random = is_noise & (fates < self._config.random_share)
            drawn = integers(streams(keys, _RANDOM_TOKEN), text.shape[1], len(self._random_ids))
            inputs[is_random] = self._random_ids[drawn[is_random]]
        return inputs, samples.lengths, text, samples.lengths

    def _prefix(self, samples: Samples) -> Pair:
        text, sizes = samples.tokens, samples.lengths
        drawn = integers(streams(samples.keys, _PREFIX), 1, (sizes - 1)[:, None])[:, 0]
        prefixes = np.where(sizes > 1, 1 + drawn, 0)
        places = np.arange(text.shape[1])
        is_target = (places >= prefixes[:, None]) & (places < sizes[:, None])
        targets, target_sizes = close_up(text, is_target, text.shape[1], 0)
        return text, prefixes, targets, target_sizes

    def _deshuffled(self, samples: Samples) -> Pair:
        text, sizes = samples.tokens, samples.lengths
        is_text = np.arange(text.shape[1]) < sizes[:, None]
        order = shuffled(streams(samples.keys, _SHUFFLE), is_text)
        return np.take_along_axis(text, order, axis=1), sizes, text, sizes

    def _iid_mask(self, samples: Samples) -> Bools:
        width = samples.tokens.shape[1]
        is_noise: Bools = uniforms(streams(samples.keys, _IID), width) < self._config.density
        return is_noise & (np.arange(width) < samples.lengths[:, None])


def span_mask(lengths: Ints, keys: Ints, width: int, density: float, mean_span: float) -> Bools:
    """Draw which tokens are noise: spans of random length, a text that begins without and ends with one.

    Of L tokens, noise = min(max(round(L density), 1), L - 1) are noise, in spans = max(round(noise / mean_span), 1)
    spans. Noise, and what is none, are each cut into that many parts of at least one token, uniformly over all ways to
    cut; the parts alternate. A text of one token has no noise. Where there are fewer tokens that are no noise than
    spans, there are as many spans as these.

    Args:
        lengths: int64 [n], L.
        keys: int64 [n, 4].
        width: r.
        density: share of the noise.
        mean_span: mean length of the spans, in tokens.

    Returns:
        bool [n, r].

    Source: random_spans_noise_mask of google-research/text-to-text-transfer-transformer.
    """
    sizes = np.maximum(lengths, 2)
    noise = np.clip(np.rint(sizes * density).astype(np.int64), 1, sizes - 1)
    kept = sizes - noise
    spans = np.minimum(np.maximum(np.rint(noise / mean_span).astype(np.int64), 1), kept)
    noise_ends = _partition(streams(keys, _NOISE), noise, spans)
    kept_ends = _partition(streams(keys, _KEPT), kept, spans)
    begins = kept_ends + np.pad(noise_ends, ((0, 0), (1, 0)))[:, :-1]
    # Places behind a row's last span all stand at its end, where the end of that span overwrites their begins.
    changes = np.zeros((len(sizes), int(sizes.max()) + 1), np.int8)
    np.put_along_axis(changes, begins, 1, axis=1)
    np.put_along_axis(changes, kept_ends + noise_ends, -1, axis=1)
    is_noise = np.zeros((len(sizes), width), bool)
    columns = min(width, changes.shape[1])
    is_noise[:, :columns] = np.cumsum(changes, axis=1, dtype=np.int8)[:, :columns] > 0
    is_noise[lengths < 2] = False
    return is_noise


def _partition(stream: Streams, totals: Ints, parts: Ints) -> Ints:
    """Cut totals[i] things into parts[i] parts of at least one, uniformly; return where each part ends: [n, k].

    Ends behind a row's last part are its total.
    """
    is_cut = choose(stream, np.arange(int(totals.max())) < totals[:, None] - 1, parts - 1)
    num_parts = int(parts.max())
    ends = np.repeat(totals[:, None], num_parts, axis=1)
    ends[np.arange(num_parts) < parts[:, None] - 1] = np.nonzero(is_cut)[1] + 1
    return ends


def corrupted(text: Ints, is_text: Bools, is_noise: Bools, sentinels: Ints) -> Pair:
    """Split texts into what is left of them and the noise, with sentinels where they belong together.

    Args:
        text: int64 [n, r].
        is_text: bool [n, r], False for padding.
        is_noise: bool [n, r], within the text.
        sentinels: int64, for the first run of noise in a row, the second, ...

    Returns:
        Inputs int64 [n, r], each run replaced by its sentinel; targets int64 [n, 2 r], each run behind its sentinel.

    Raises:
        DataError: if a row has more runs of noise than there are sentinels.
    """
    is_first = _run_begins(is_noise)
    spans = np.cumsum(is_first, axis=1)
    most = int(spans.max(initial=0))
    if most > len(sentinels):
        raise DataError(
            f"has {len(sentinels)} sentinels, and a sample has {most} spans of noise",
            field="tokenizer",
            remedy="shorten data.seq_length, use longer spans or a lower objective.density",
        )
    marks = sentinels[np.maximum(spans - 1, 0)]
    num_rows, width = text.shape
    inputs, input_sizes = close_up(np.where(is_first, marks, text), is_text & (~is_noise | is_first), width, 0)
    marked = np.stack([marks, text], axis=2).reshape(num_rows, 2 * width)
    is_target = np.stack([is_first, is_noise], axis=2).reshape(num_rows, 2 * width)
    targets, target_sizes = close_up(marked, is_target, 2 * width, 0)
    return inputs, input_sizes, targets, target_sizes


def shifted_right(labels: Ints, decoder_ids: Ints, start_id: int) -> Ints:
    """Make what the decoder reads: at each place the label before, and start_id at the begin of each document.

    Args:
        labels: int64 [n, d].
        decoder_ids: int64 [n, d], numbers of the documents of a row, -1 for padding.
        start_id: also for padding.

    Returns:
        int64 [n, d].
    """
    tokens = np.full_like(labels, start_id)
    is_same = (decoder_ids[:, 1:] == decoder_ids[:, :-1]) & (decoder_ids[:, 1:] >= 0)
    np.copyto(tokens[:, 1:], labels[:, :-1], where=is_same)
    return tokens


def _run_begins(is_noise: Bools) -> Bools:
    is_first = is_noise.copy()
    is_first[:, 1:] &= ~is_noise[:, :-1]
    return is_first


def _check_sentinels(config: T5Config, raw: int, num_sentinels: int) -> None:
    """Refuse noise whose spans the sentinels cannot name: for iid, more than 3 sigma above their mean number."""
    if config.noise == "spans":
        spans = noised_lengths(raw, config.density, config.mean_span)[1] if raw > 1 else 0
    else:
        mean = raw * config.density * (1 - config.density)
        spans = min(int(mean + _SIGMAS * mean**0.5), (raw + 1) // 2)
    if spans > num_sentinels:
        raise DataError(
            f"has {num_sentinels} sentinels, and objective t5 makes up to {spans} spans of noise in {raw} tokens",
            field="tokenizer",
            remedy="shorten data.seq_length, use longer spans or a lower objective.density",
        )
