"""Which parameters share settings, and which rules are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lmscale.config.io import parse_run
from lmscale.config.model import ModelConfig
from lmscale.config.optim import OptimConfig
from lmscale.config.presets import PRESETS, with_defaults
from lmscale.errors import ConfigError
from lmscale.plan.groups import check_groups, group_of, group_rows, num_trainable, plan_groups
from lmscale.plan.params import num_parameters

MODEL = ModelConfig(
    num_layers=12, hidden_size=32, num_attention_heads=4, vocab_size=190, max_position_embeddings=16, tied_head=False
)


def optim(*groups: dict[str, Any], **keys: Any) -> OptimConfig:
    return OptimConfig(lr=1.0e-3, groups=list(groups), **keys)


def test_biases_and_norms_are_not_decayed_and_the_first_rule_decides() -> None:
    rules = optim(
        {"name": "slow", "match": "re:^layers\\.[0-3]\\.", "lr_multiplier": 0.5, "weight_decay_multiplier": 2.0},
        {"name": "layers", "match": "layers.*", "frozen": True},
    )
    by_name = {
        "layers.0.mlp.linear_fc1.weight": ("slow", 0.5, 2.0, False),
        "layers.0.mlp.linear_fc1.bias": ("slow, no decay", 0.5, 0.0, False),
        "layers.10.mlp.linear_fc1.weight": ("layers", 1.0, 1.0, True),
        "head.table.weight": ("decay", 1.0, 1.0, False),
        "final_norm.norm.weight": ("no_decay", 1.0, 0.0, False),
    }
    for name, expected in by_name.items():
        group = group_of(name, 2 if "norm" not in name and name.endswith("weight") else 1, rules)
        assert (group.name, group.lr_multiplier, group.weight_decay_multiplier, group.is_frozen) == expected


def test_everything_is_decayed_on_request() -> None:
    rules = optim(decay_biases_and_norms=True)
    assert {group_of("a.bias", 1, rules).name, group_of("a.weight", 2, rules).name} == {"decay"}


@pytest.mark.parametrize("name", PRESETS)
def test_groups_hold_every_parameter_of_a_preset_once(name: str) -> None:
    model = ModelConfig.model_validate(with_defaults({"preset": name}))
    sizes = plan_groups(model, optim({"name": "words", "match": "word_embedding.*", "frozen": True}))
    assert sum(size.parameters for size in sizes) == num_parameters(model)
    assert sizes[0].parameters == model.vocab_size * model.hidden_size


def test_table_shows_rate_decay_and_share_over_all_ranks() -> None:
    rules = optim(
        {"name": "words", "match": "word_embedding.*", "frozen": True},
        {"name": "head", "match": "head.*", "lr_multiplier": 0.1},
        weight_decay=0.01,
    )
    total = num_parameters(MODEL)
    rows = group_rows(MODEL, rules)
    assert [row[0] for row in rows] == ["words", "head", "decay", "no_decay"]
    assert rows[0][1:] == ("frozen", "", "1", f"{190 * 32:,}", f"{190 * 32 / total:.2%}")
    assert rows[1][1:3] == ("0.1 x lr", "0.01")
    assert rows[3][2] == "0"
    assert num_trainable(MODEL, rules)[0] == total - 190 * 32


@pytest.mark.parametrize(
    ("groups", "part"),
    [
        ([{"name": "x", "match": "layer.0.*"}], "optim.groups.0.match = 'layer.0.*': matches no parameter"),
        ([{"name": "x", "match": "re:^mlp"}], "optim.groups.0.match = 're:^mlp': matches no parameter"),
        (
            [{"name": "x", "match": "layers.*"}, {"name": "y", "match": "layers.0.*"}],
            "optim.groups.1.match = 'layers.0.*': takes nothing",
        ),
        ([{"name": "x", "match": "*", "frozen": True}], "optim.groups: every parameter is frozen"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(groups: list[dict[str, Any]], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_groups(MODEL, optim(*groups))
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "keys", "part"),
    [
        ([{"name": "decay", "match": "*"}], {}, "optim.groups.0.name = 'decay': is the name of another group"),
        ([{"name": "x", "match": "*"}] * 2, {}, "optim.groups.1.name = 'x': is the name of another group"),
        (
            [{"name": "x", "match": "*", "frozen": True, "lr_multiplier": 0.5}],
            {},
            "optim.groups.0.lr_multiplier = 0.5: is read with frozen: false only",
        ),
        ([{"name": "x", "match": "re:("}], {}, "optim.groups.0.match = 're:(': is no regular expression"),
        (
            [{"name": "x", "match": "*", "weight_decay_multiplier": 0.5}],
            {"weight_decay": 0.0},
            "is read with optim.weight_decay above 0 only",
        ),
        ([], {"weight_decay": 0.0, "decay_biases_and_norms": True}, "optim.decay_biases_and_norms = True: is read"),
        ([{"name": "x", "match": "*", "lr_multiplier": 0.0}], {}, "optim.groups.0.lr_multiplier = 0.0"),
    ],
)
def test_contradictions_of_a_rule_are_refused(groups: list[dict[str, Any]], keys: dict[str, Any], part: str) -> None:
    from lmscale.config.check import check_run
    from lmscale.config.run import ZeroChoice

    run = {
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 190},
        "data": {"train": [{"prefix": "a"}], "seq_length": 32},
        "batch": {"micro_batch_size": 2, "global_batch_size": 16},
        "optim": {"lr": 1.0e-3, "groups": groups, **keys},
        "train": {"train_tokens": 10_000},
        "output_dir": "runs/x",
    }
    with pytest.raises(ConfigError) as caught:
        check_run(parse_run(run), ZeroChoice(), 1)
    assert part in str(caught.value)
