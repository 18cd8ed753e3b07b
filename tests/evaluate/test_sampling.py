"""Choosing the next token from logits."""

from __future__ import annotations

import pytest
import torch

from lmscale.errors import ConfigError
from lmscale.evaluate.sampling import Sampler, Sampling

CPU = torch.device("cpu")
NUM_DRAWS = 20_000
FREQUENCY_TOLERANCE = 0.02
"""Of 20,000 draws: more than five standard deviations."""
LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5])


def choose(logits: torch.Tensor, **options: object) -> torch.Tensor:
    return Sampler(Sampling(**options), CPU)(logits)  # type: ignore[arg-type]


def frequencies(**options: object) -> torch.Tensor:
    tokens = choose(LOGITS.expand(NUM_DRAWS, -1), seed=0, **options)
    return tokens.bincount(minlength=len(LOGITS)) / NUM_DRAWS


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}])
def test_the_likeliest_token_is_taken(options):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, **options), logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_by_softmax_of_logits_over_temperature(temperature):
    expected = (LOGITS / temperature).softmax(dim=-1)
    assert (frequencies(temperature=temperature) - expected).abs().max() < FREQUENCY_TOLERANCE


def test_top_k_draws_among_the_k_likeliest_in_proportion():
    expected = LOGITS.softmax(dim=-1) * torch.tensor([0, 1, 0, 0, 1])
    found = frequencies(top_k=2)
    assert (found - expected / expected.sum()).abs().max() < FREQUENCY_TOLERANCE
    assert found[[0, 2, 3]].sum() == 0


def test_top_p_keeps_the_fewest_tokens_that_add_up_to_p():
    probabilities = LOGITS.softmax(dim=-1)
    largest_two = float(probabilities.sort(descending=True).values[:2].sum())
    just_two, just_three = frequencies(top_p=largest_two - 1e-4), frequencies(top_p=largest_two + 1e-4)
    assert (just_two > 0).tolist() == [False, True, False, False, True]
    assert (just_three > 0).tolist() == [False, True, True, False, True]
    assert (frequencies(top_p=1.0) - probabilities).abs().max() < FREQUENCY_TOLERANCE


def test_top_p_counts_among_what_top_k_left():
    # Of the two likeliest, the first has 0.62 of what is left, though less than half of all.
    assert (frequencies(top_k=2, top_p=0.6) > 0).tolist() == [False, True, False, False, False]
    assert (frequencies(top_p=0.6) > 0).sum() == 2


def test_top_k_beyond_the_vocabulary_keeps_all():
    assert torch.equal(frequencies(top_k=1000) > 0, torch.ones(5, dtype=torch.bool))


def test_equal_seeds_draw_equal_tokens():
    logits = torch.zeros(100, 50)
    assert torch.equal(choose(logits, seed=4), choose(logits, seed=4))
    assert not torch.equal(choose(logits, seed=4), choose(logits, seed=5))
    assert not torch.equal(choose(logits), choose(logits))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be 0 (greedy) or more"),
        ({"temperature": float("nan")}, "temperature = nan: must be 0 (greedy) or more"),
        ({"top_k": 0}, "top_k = 0: must be at least 1; leave it out to keep all"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0, and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5: must be above 0, and at most 1"),
    ],
)
def test_options_out_of_range_are_refused(options, line):
    with pytest.raises(ConfigError) as error:
        Sampling(**options)
    assert str(error.value) == line
