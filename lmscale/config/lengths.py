"""How many tokens a sample takes from the corpus, and how many the model sees of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lmscale.config.data import DataConfig
from lmscale.config.objective import (
    BertConfig,
    CausalLMConfig,
    ObjectiveConfig,
    RobertaConfig,
    T5Config,
    TextToTextConfig,
    max_predictions,
)
from lmscale.errors import ConfigError

NUM_ENDS = 2
"""Special tokens around the text of a sample of RoBERTa and BART."""
NUM_PAIR_ENDS = 3
"""Special tokens of a pair of segments: one before, one behind each."""
_LEAST_HALF = 2
NUM_SENTINELS = 100
"""Sentinels of a tokenizer, and so the most spans in a sample of t5."""


@dataclass(frozen=True)
class SampleLengths:
    """Lengths of a run's samples, in tokens.

    Attributes:
        raw: most tokens that a sample takes from the corpus; a causal_lm window takes exactly these, the last one as a
            label only.
        encoder: what the model sees; for bart and t5, what the encoder sees.
        decoder: what the decoder of bart and t5 sees; 0 elsewhere.
        labels: places for labels.
    """

    raw: int
    encoder: int
    decoder: int
    labels: int

    @property
    def nominal(self) -> int:
        """The tokens that a sample counts for in the schedules, padding included."""
        return self.encoder + self.decoder


def sample_lengths(data: DataConfig, objective: ObjectiveConfig) -> SampleLengths:
    """Say how long a run's samples are.

    Raises:
        ConfigError: if the lengths leave the objective no room.
    """
    length, decoder = data.seq_length, data.decoder_seq_length
    if isinstance(objective, CausalLMConfig):
        return SampleLengths(length + 1, length, 0, length)
    if isinstance(objective, BertConfig):
        _at_least(length, NUM_PAIR_ENDS + 2, "two segments of one token and three special tokens")
        return SampleLengths(length - NUM_PAIR_ENDS, length, 0, max_predictions(objective, length))
    if isinstance(objective, TextToTextConfig):
        decoder = decoder or length
        _at_least(length, _LEAST_HALF, "an input of one token and its end")
        _at_least(decoder, _LEAST_HALF, "a target of one token and its end", "data.decoder_seq_length")
        return SampleLengths(length + decoder, length, decoder, decoder)
    _at_least(length, NUM_ENDS + 1, "one token and two special tokens")
    if isinstance(objective, RobertaConfig):
        return SampleLengths(length - NUM_ENDS, length, 0, max_predictions(objective, length))
    if not isinstance(objective, T5Config):
        decoder = decoder or length
        _at_least(decoder, NUM_ENDS + 1, "one token and two special tokens", "data.decoder_seq_length")
        return SampleLengths(min(length, decoder) - NUM_ENDS, length, decoder, decoder)
    if objective.noise == "spans":
        raw, targets = span_lengths(length, objective.density, objective.mean_span)
        _check_spans(raw, objective)
    elif objective.noise == "iid":
        raw, targets = length - 1, iid_targets(length - 1, objective.density)
    else:
        raw, targets = length - 1, length
    decoder = decoder or targets
    if decoder < targets:
        raise ConfigError(
            f"must be at least {targets}, the targets that {length} tokens of input leave",
            field="data.decoder_seq_length",
            value=decoder,
            remedy="leave it out",
        )
    return SampleLengths(raw, length, decoder, decoder)


def task_lengths(data: DataConfig, has_decoder_stack: bool) -> SampleLengths:
    """Say how long the rows of a task are: what the decoder reads, and where that is left out, as long as the input."""
    decoder = (data.decoder_seq_length or data.seq_length) if has_decoder_stack else 0
    return SampleLengths(data.seq_length, data.seq_length, decoder, decoder or data.seq_length)


def behind_prompt(lengths: SampleLengths, prompt_length: int, objective: ObjectiveConfig) -> SampleLengths:
    """Add the vectors of a trained prompt, which stand before what the model, or its encoder, sees of a sample."""
    labels = lengths.labels + (prompt_length if isinstance(objective, CausalLMConfig) else 0)
    return replace(lengths, encoder=lengths.encoder + prompt_length, labels=labels)


def noised_lengths(raw: int, density: float, mean_span: float) -> tuple[int, int, int, int]:
    """Return (noise tokens, spans, inputs, targets) of a text of `raw` tokens under span corruption.

    noise = min(max(round(raw density), 1), raw - 1); spans = max(round(noise / mean_span), 1); a sentinel for each span
    on either side, and an end on either side.

    Source: Raffel et al. 2020, arXiv:1910.10683, sec. 3.1.4, as its code rounds.
    """
    noise = min(max(round(raw * density), 1), raw - 1)
    spans = max(round(noise / mean_span), 1)
    return noise, spans, raw - noise + spans + 1, noise + spans + 1


def span_lengths(inputs: int, density: float, mean_span: float) -> tuple[int, int]:
    """Return the most raw tokens whose inputs under span corruption fit, and the length of their targets.

    512 inputs at 15 % in spans of 3 take 568 tokens and give 114 targets. At a density of one half, targets would come
    out one longer than inputs: one token less is taken.
    """
    raw = inputs
    while raw > 1 and noised_lengths(raw, density, mean_span)[2] > inputs:
        raw -= 1
    while noised_lengths(raw + 1, density, mean_span)[2] <= inputs:
        raw += 1
    targets = noised_lengths(raw, density, mean_span)[3]
    if density == 0.5 and targets > inputs:
        return raw - 1, targets - 1
    return raw, targets


def iid_targets(raw: int, density: float) -> int:
    """Return the length of the targets of `raw` tokens under i.i.d. noise: one in 10^8 texts has more than that.

    Noise tokens are raw density in the mean, sentinels raw density (1 - density), and an end comes behind them; of each
    the mean, and three standard deviations of the noise for either.
    """
    deviation = math.sqrt(raw * density * (1 - density))
    most = raw * density * (2 - density) + 6 * deviation + 1
    return min(math.ceil(most), raw + (raw + 1) // 2 + 1)


def _check_spans(raw: int, objective: T5Config) -> None:
    spans = noised_lengths(raw, objective.density, objective.mean_span)[1]
    if spans > NUM_SENTINELS:
        raise ConfigError(
            f"makes {spans} spans of {raw} tokens, and there are {NUM_SENTINELS} sentinels",
            field="data.seq_length",
            remedy="shorten the sequence, or use longer spans or a lower objective.density",
        )


def _at_least(length: int, least: int, what: str, field: str = "data.seq_length") -> None:
    if length < least:
        raise ConfigError(f"must hold {what}: at least {least}", field=field, value=length)
