"""What adaptations train of published models, beside the papers' counts, and what their parameters are called."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmscale.config.adapt import AdaptConfig, AdapterConfig, BitFitConfig, FullConfig, LoraConfig
from lmscale.config.model import ModelConfig
from lmscale.config.optim import OptimConfig
from lmscale.config.presets import with_defaults
from lmscale.plan.adaptation import CLASSIFIER, Adaptation, Head
from lmscale.plan.groups import group_rows, num_trainable, plan_groups
from lmscale.plan.params import num_parameters

OPTIM = OptimConfig(name="adamw", lr=1.0e-3)


def preset(name: str, **keys: Any) -> ModelConfig:
    return ModelConfig.model_validate(with_defaults({"preset": name, **keys}))


def trained(model: ModelConfig, adapt: AdaptConfig, head: Head | None = None) -> int:
    """Count what is trained, the classifier of a task aside."""
    adaptation = Adaptation(model, adapt, head)
    trained, total = num_trainable(model, OPTIM, adaptation)
    own = sum(math.prod(shape) for shape in adaptation.shapes(padded=False).values())
    assert total == own
    shapes = adaptation.shapes(padded=False).items()
    return trained - sum(math.prod(shape) for name, shape in shapes if name.startswith(CLASSIFIER))


@pytest.mark.parametrize(
    ("name", "adapt", "count"),
    [
        ("roberta-large", LoraConfig(rank=8), 786_432),
        ("gpt3-350m", LoraConfig(rank=4), 393_216),  # GPT-2 medium has the same layers
        ("gpt3-175b", LoraConfig(rank=1), 4_718_592),
        ("bert-large", AdapterConfig(width=64, norms=False), 6_343_680),
        ("bert-large", AdapterConfig(width=64), 6_343_680 + 100_352),
        ("bert-large", AdapterConfig(width=64, variant="pfeiffer"), 6_343_680 // 2),
        ("bert-base", BitFitConfig(which="query_fc1"), 46_080),
        ("bert-large", BitFitConfig(which="query_fc1"), 122_880),
    ],
    ids=str,
)
def test_trained_parameters_are_those_of_the_papers(name: str, adapt: AdaptConfig, count: int) -> None:
    assert trained(preset(name), adapt) == count


@pytest.mark.parametrize(
    ("name", "count", "share"), [("bert-base", 102_912, "0.09%"), ("bert-large", 272_384, "0.08%")]
)
def test_bitfit_trains_the_biases_of_encoder_and_pooler(name: str, count: int, share: str) -> None:
    model, adapt, head = preset(name), BitFitConfig(), Head("classes", 2)
    assert trained(model, adapt, head) == count
    total = num_trainable(model, OPTIM, Adaptation(model, adapt, head))[1] - 2 * (model.hidden_size + 1)
    assert f"{count / total:.2%}" == share


def test_the_table_of_groups_counts_the_rows_of_queries_alone() -> None:
    model = preset("bert-base")
    adaptation = Adaptation(model, BitFitConfig(which="query_fc1"))
    rows = {row[0]: row for row in group_rows(model, OPTIM, adaptation)}
    assert rows["no_decay"][1:] == ("1 x lr", "0", "24", "46,080", "0.04%")
    assert rows["frozen"][4] == f"{num_parameters(model) - 46_080:,}"


def test_layers_have_rates_of_their_own_in_the_table() -> None:
    model = preset("bert-base", num_layers=3)
    sizes = plan_groups(model, OPTIM, Adaptation(model, FullConfig(layer_decay=0.5)))
    rates = {size.group.lr_multiplier for size in sizes}
    assert rates == {1.0, 0.5, 0.25, 0.125}
    adaptation = Adaptation(model, FullConfig(layer_decay=0.5))
    assert adaptation.rate_multiplier("layers.2.mlp.linear_fc1.weight") == 1.0
    assert adaptation.rate_multiplier("layers.0.mlp.linear_fc1.weight") == 0.25
    assert adaptation.rate_multiplier("word_embedding.table.weight") == 0.125
    assert adaptation.rate_multiplier("masked_head.dense.weight") == 1.0
    names = {row[0] for row in group_rows(model, OPTIM, adaptation)}
    assert "decay, rate x 0.5" in names


@pytest.mark.parametrize(
    ("name", "last"), [("gpt3-125m", "final_norm.norm.weight"), ("bert-base", "masked_head.dense.bias")]
)
def test_top_layers_are_the_last_ones_and_what_is_behind_them(name: str, last: str) -> None:
    model = preset(name)
    adaptation = Adaptation(model, FullConfig(top_layers=2))
    assert adaptation.trains("layers.10.mlp.linear_fc1.weight")
    assert not adaptation.trains("layers.9.mlp.linear_fc1.weight")
    assert not adaptation.trains("word_embedding.table.weight")
    assert adaptation.trains(last)
    assert not adaptation.is_added


def test_lora_on_the_word_table_counts_no_rows_of_padding() -> None:
    model = preset("bert-base")
    assert model.padded_vocab_size > model.vocab_size
    count = trained(model, LoraConfig(rank=2, targets=["embedding"]))
    assert count == 2 * (model.vocab_size + model.hidden_size)
