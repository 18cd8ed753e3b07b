"""Combinations that have no meaning are refused, each with its line."""

from __future__ import annotations

from typing import Any

import pytest

from lmscale.config.check import CROSS_SECTION_RULES
from lmscale.config.io import parse_run
from lmscale.errors import ConfigError
from tests.distributed.runs import Keys


def _keys(task: Keys | None, adapt: Keys, architecture: str = "bert", **changes: Any) -> Keys:
    model: Keys = {"architecture": architecture, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
    keys: Keys = {
        "model": {**model, "vocab_size": 420, "max_position_embeddings": 32, "init_from": "base"},
        "tokenizer": {"path": "t"},
        "objective": {"name": {"gpt": "causal_lm"}.get(architecture, architecture)},
        "data": {"seq_length": 32},
        "adapt": {"method": "probing", **adapt},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"lr": 1.0e-2},
        "train": {"train_tokens": 1000},
        "output_dir": "out",
    }
    if task is None:
        keys["data"]["train"] = [{"prefix": "p"}]
    else:
        keys["task"] = {"train": "train.jsonl", **task}
    for name, value in changes.items():
        keys.setdefault(name, {}).update(value)
    return keys


CLASSES, TAGS = {"kind": "classification"}, {"kind": "token_classification"}
BROKEN: list[tuple[Keys, str]] = [
    (_keys(None, {}), "task: is required by adapt.method: probing"),
    (_keys(CLASSES, {}, model={"init_from": None}), "model.init_from: is required by adapt.method: probing"),
    (
        _keys({"kind": "extractive_qa"}, {"control": True}),
        "adapt.control = True: compares accuracies, and extractive_qa",
    ),
    (_keys({"kind": "extractive_qa"}, {"head": "attention"}), "adapt.head = 'attention': averages over a sequence"),
    (
        _keys({"kind": "extractive_qa"}, {"pooling": "last"}),
        "adapt.pooling = 'last': is not read: every token is asked",
    ),
    (_keys({"kind": "generation"}, {}, "gpt"), "task.kind = 'generation': is no task of classes, numbers or places"),
    (_keys({**CLASSES, "output": "head"}, {"pooling": "cls"}, "t5"), "adapt.pooling = 'cls': t5 has no token"),
    (_keys(CLASSES, {}, "gpt"), "task.output = 'text': probing trains a classifier on hidden states"),
    (_keys(CLASSES, {}, "t5"), "task.output = 'text': probing trains a classifier on hidden states"),
    (_keys(TAGS, {"pooling": "last"}), "adapt.pooling = 'last': is not read: a word's class is told from"),
    (_keys(TAGS, {"head": "attention"}), "adapt.head = 'attention': averages over a sequence"),
    (_keys(CLASSES, {"head": "attention", "pooling": "cls"}), "adapt.pooling = 'cls': is not read: adapt.head: attent"),
    (_keys(CLASSES, {}, monitor={"step_times": True}), "monitor.step_times: is not read by adapt.method: probing"),
    (_keys(CLASSES, {}, monitor={"trace": {"start_step": 2}}), "monitor.trace: is not read by adapt.method: probing"),
    (_keys(CLASSES, {}, monitor={"histogram_interval": 2}), "monitor.histogram_interval: is not read by adapt.method"),
    (_keys({**CLASSES, "output": "head"}, {"pooling": "cls"}, "gpt"), "adapt.pooling = 'cls': gpt has no token"),
    (
        _keys(CLASSES, {"layers": [1, 5]}),
        "adapt.layers = 5: must lie between 0, the embeddings, and model.num_layers = 4",
    ),
    (_keys(CLASSES, {"layers": [-1]}), "adapt.layers = -1: must lie between"),
    (_keys(CLASSES, {"layers": [2, 2]}), "adapt.layers = 2: is given twice"),
    (_keys(CLASSES, {"layers": []}), "adapt.layers = []: names no layer"),
    (_keys({"kind": "regression"}, {"control": True}), "adapt.control = True: compares accuracies"),
    (_keys(CLASSES, {}, checkpoint={"resume": "some/path"}), "checkpoint.resume = 'some/path': names a checkpoint"),
]


def _check(keys: Keys) -> None:
    base = keys["model"].pop("init_from")
    config = parse_run(keys)
    config = config.model_copy(update={"model": config.model.model_copy(update={"init_from": base})})
    for rule in CROSS_SECTION_RULES:
        rule(config)


@pytest.mark.parametrize(("keys", "line"), BROKEN, ids=[line[:60] for _, line in BROKEN])
def test_what_has_no_meaning_is_refused(keys: Keys, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _check(keys)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "keys",
    [
        _keys(CLASSES, {"layers": [0, 4], "pooling": "cls", "head": "mlp", "control": True}),
        _keys(TAGS, {"layers": "mix", "control": True}, "roberta"),
        _keys({"kind": "regression", "output": "head"}, {"head": "attention", "layers": "all"}, "gpt"),
        _keys({**TAGS, "output": "head"}, {}, "gpt"),
        _keys({"kind": "extractive_qa", "output": "head"}, {"head": "mlp"}, "t5"),
        _keys({**CLASSES, "output": "head"}, {"pooling": "cls"}, "bart"),
    ],
)
def test_what_has_a_meaning_is_not(keys: Keys) -> None:
    _check(keys)
