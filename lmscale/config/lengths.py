"""How many tokens a sample takes from the corpus, and how many the model sees of it."""

from __future__ import annotations

from dataclasses import dataclass

from lmscale.config.data import DataConfig
from lmscale.config.objective import (
    BertConfig,
    CausalLMConfig,
    ObjectiveConfig,
    RobertaConfig,
    T5Config,
    max_predictions,
)
from lmscale.errors import ConfigError

NUM_ENDS = 2
"""Special tokens around the text of a sample of RoBERTa and BART."""
NUM_PAIR_ENDS = 3
"""Special tokens of a pair of segments: one before, one behind each."""
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
    _at_least(length, NUM_ENDS + 1, "one token and two special tokens")
    if isinstance(objective, RobertaConfig):
        return SampleLengths(length - NUM_ENDS, length, 0, max_predictions(objective, length))
    if not isinstance(objective, T5Config):
        decoder = decoder or length
        return SampleLengths(min(length, decoder) - NUM_ENDS, length, decoder, decoder)
    if objective.noise == "spans":
        raw, targets = span_lengths(length, objective.density, objective.mean_span)
        _check_spans(raw, objective)
    elif objective.noise == "iid":
        raw, targets = length - 1, length * 3 // 8
    else:
        raw, targets = length - 1, length
    decoder = decoder or targets
    if decoder < targets and objective.noise != "iid":
        raise ConfigError(
            f"must be at least {targets}, the targets that {length} tokens of input leave",
            field="data.decoder_seq_length",
            value=decoder,
            remedy="leave it out",
        )
    return SampleLengths(raw, length, decoder, decoder)


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
    while noised_lengths(raw + 1, density, mean_span)[2] <= inputs:
        raw += 1
    targets = noised_lengths(raw, density, mean_span)[3]
    if density == 0.5 and targets > inputs:
        return raw - 1, targets - 1
    return raw, targets


def _check_spans(raw: int, objective: T5Config) -> None:
    spans = noised_lengths(raw, objective.density, objective.mean_span)[1]
    if spans > NUM_SENTINELS:
        raise ConfigError(
            f"makes {spans} spans of {raw} tokens, and there are {NUM_SENTINELS} sentinels",
            field="data.seq_length",
            remedy="shorten the sequence, or use longer spans or a lower objective.density",
        )


def _at_least(length: int, least: int, what: str) -> None:
    if length < least:
        raise ConfigError(f"must hold {what}: at least {least}", field="data.seq_length", value=length)
