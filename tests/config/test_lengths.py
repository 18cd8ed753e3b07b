"""Lengths of samples against the published ones."""

from __future__ import annotations

import pytest

from lmscale.config.data import DataConfig, TrainSource
from lmscale.config.lengths import SampleLengths, noised_lengths, sample_lengths, span_lengths
from lmscale.config.objective import BartConfig, BertConfig, CausalLMConfig, ObjectiveConfig, RobertaConfig, T5Config

THEIRS = [
    (512, 0.15, 3.0, 568, 114),
    (512, 0.15, 2.0, 552, 126),
    (512, 0.15, 5.0, 581, 105),
    (512, 0.15, 10.0, 591, 99),
    (128, 0.15, 3.0, 141, 29),
    (256, 0.15, 3.0, 284, 58),
    (1024, 0.15, 3.0, 1137, 229),
    (2048, 0.15, 3.0, 2274, 456),
    (512, 0.5, 3.0, 766, 512),
]
"""Inputs, density, mean span, then raw tokens and targets, as random_spans_helper of T5's code gives them."""


@pytest.mark.parametrize(("inputs", "density", "mean_span", "raw", "targets"), THEIRS)
def test_spans_take_the_raw_tokens_that_t5s_own_helper_takes(
    inputs: int, density: float, mean_span: float, raw: int, targets: int
) -> None:
    assert span_lengths(inputs, density, mean_span) == (raw, targets)


def test_the_most_raw_tokens_that_fit_are_taken() -> None:
    for inputs in range(8, 700, 7):
        raw, targets = span_lengths(inputs, 0.15, 3.0)
        assert noised_lengths(raw, 0.15, 3.0)[2:] == (inputs, targets)
        assert noised_lengths(raw + 1, 0.15, 3.0)[2] > inputs


@pytest.mark.parametrize(
    ("objective", "decoder", "expected"),
    [
        (CausalLMConfig(), None, SampleLengths(513, 512, 0, 512)),
        (BertConfig(), None, SampleLengths(509, 512, 0, 77)),
        (BertConfig(max_predictions=20), None, SampleLengths(509, 512, 0, 20)),
        (RobertaConfig(), None, SampleLengths(510, 512, 0, 77)),
        (BartConfig(), None, SampleLengths(510, 512, 512, 512)),
        (BartConfig(), 256, SampleLengths(254, 512, 256, 256)),
        (T5Config(), None, SampleLengths(568, 512, 114, 114)),
        (T5Config(), 120, SampleLengths(568, 512, 120, 120)),
        (T5Config(noise="prefix_lm"), None, SampleLengths(511, 512, 512, 512)),
    ],
    ids=str,
)
def test_samples_of_512_tokens(objective: ObjectiveConfig, decoder: int | None, expected: SampleLengths) -> None:
    data = DataConfig(train=[TrainSource(prefix="c")], seq_length=512, decoder_seq_length=decoder)
    assert sample_lengths(data, objective) == expected
