"""Features: transformers' hidden states, the same on every layout, kept and read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmscale.batch import PADDING_ID
from lmscale.config.io import parse_run
from lmscale.convert.exporting import export_hf
from lmscale.data.tokenizer import load_tokenizer
from lmscale.tasks.build import build_task
from tests.convert.models import reload
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, pretrain_on_ranks
from tests.distributed.test_objectives import keys_of
from tests.probe.runs import changed_weights, features_of, probe_on_ranks, probe_without_model, probing_keys

pytestmark = pytest.mark.distributed

Base = Callable[[str], str]
TOLERANCE = 2.0e-5
"""Absolute, of hidden states of order 1 after four layers in fp32: sums in another order, nothing else."""
HALF_TOLERANCE = 6.0e-2
"""Absolute, of hidden states up to 3 computed in bf16, whose steps there are 2^-7: a few roundings over four layers."""
HEAD = {"task__output": "head"}
HF_NAMES = {
    "bert": "BertForPreTraining",
    "gpt": "GPT2LMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
}


def _hidden_states(base: str, keys: Keys, home: Path, split: str) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """Compute transformers' hidden states of a split's rows: (by layer [n, s, h], is_token [n, s], the split)."""
    export_hf(Path(base), home / "hf", "fp32")
    config = parse_run(keys)
    task = build_task(config, load_tokenizer(config.tokenizer))
    arrays = task.splits[split].arrays(np.arange(task.splits[split].num_rows))
    architecture = config.model.architecture
    model: Any = reload(HF_NAMES[architecture], home / "hf")
    model = model.get_encoder() if architecture in ("t5", "bart") else model
    is_token = torch.from_numpy(arrays["document_ids"] != PADDING_ID)
    inputs = {"input_ids": torch.from_numpy(arrays["tokens"]), "attention_mask": is_token.long()}
    if architecture == "bert":
        inputs["token_type_ids"] = torch.from_numpy(arrays["token_types"])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return list(states), is_token, task.splits[split]


def _pooled(states: torch.Tensor, is_token: torch.Tensor, pooling: str, split: Any) -> torch.Tensor:
    if pooling == "words":
        return states[torch.from_numpy(split.gold.word_rows), torch.from_numpy(split.gold.word_places)]
    if pooling in ("cls", "first"):
        return states[:, 0]
    if pooling == "last":
        return torch.stack([row[mask][-1] for row, mask in zip(states, is_token, strict=True)])
    return torch.stack([row[mask].mean(dim=0) for row, mask in zip(states, is_token, strict=True)])


@pytest.mark.parametrize(
    ("objective", "task", "pooling"),
    [
        ("bert", "classes", "mean"),
        pytest.param("bert", "classes", "cls", marks=pytest.mark.slow),
        ("bert", "tags", "words"),
        ("prefix-lm", "classes", "last"),
        pytest.param("prefix-lm", "values", "mean", marks=pytest.mark.slow),
        ("t5", "classes", "mean"),
        ("bart", "tags", "words"),
        pytest.param("t5", "tags", "words", marks=pytest.mark.slow),
        pytest.param("bart", "classes", "cls", marks=pytest.mark.slow),
        pytest.param("prefix-lm", "tags", "words", marks=pytest.mark.slow),
    ],
)
def test_features_are_the_hidden_states_of_transformers(
    objective: str, task: str, pooling: str, base: Base, tasks: Path, tmp_path: Path
) -> None:
    adapt = {"layers": "all"} | ({"pooling": pooling} if pooling != "words" else {})
    changes = {} if objective == "bert" else HEAD
    keys = probing_keys(task, base(objective), tasks, tmp_path / "run", adapt, **changes)
    probe_on_ranks(1, keys)
    states, is_token, split = _hidden_states(base(objective), keys, tmp_path, "far")
    ours = features_of(keys)
    for layer, expected in enumerate(states):
        found = ours[f"far-layer-{layer:02d}-{pooling}"]
        torch.testing.assert_close(found, _pooled(expected, is_token, pooling, split), atol=TOLERANCE, rtol=0)
    assert (states[0] - states[-1]).abs().max() > 100 * TOLERANCE  # one layer's states are not another's


LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2": (2, {"parallel__tp_size": 2}),
    "tp2-sp": (2, {"parallel__tp_size": 2, "parallel__sequence_parallel": True}),
    "pp2": (2, {"parallel__pp_size": 2}),
    "dp2-zero3": (2, {"deepspeed__zero_optimization__stage": 3}),
    "dp2-zero2": (2, {"deepspeed__zero_optimization__stage": 2}),
    "tp2-pp2-sp-zero1": (
        4,
        {
            "parallel__tp_size": 2,
            "parallel__pp_size": 2,
            "parallel__sequence_parallel": True,
            "deepspeed__zero_optimization__stage": 1,
        },
    ),
    "dp2-pp2": (4, {"parallel__pp_size": 2}),
}
QUICK = {("bert-tags", "tp2-sp"), ("gpt-classes", "pp2"), ("bert-attention", "dp2-zero3"), ("gpt-classes", "dp2-pp2")}
QUICK |= {("t5-questions", "tp2-pp2-sp-zero1"), ("bart-classes", "pp2")}
CASES: dict[str, tuple[str, str, Keys, Keys]] = {
    "bert-tags": ("bert", "tags", {"layers": "all"}, {}),
    "bert-attention": ("bert", "classes", {"layers": [1, 4], "head": "attention"}, {}),
    "gpt-classes": ("prefix-lm", "classes", {"layers": "all", "pooling": "last"}, HEAD),
    "t5-questions": ("t5", "questions", {"layers": "all"}, HEAD),
    "bart-classes": ("bart", "classes", {"layers": "all", "pooling": "cls"}, HEAD),
}


class References:
    """One rank's features of each case, computed where they are asked for."""

    def __init__(self, base: Base, tasks: Path, home: Path):
        self._base, self._tasks, self._home = base, tasks, home
        self._made: dict[str, dict[str, torch.Tensor]] = {}

    def keys(self, case: str, output_dir: Path, **more: Any) -> Keys:
        objective, task, adapt, changes = CASES[case]
        return probing_keys(task, self._base(objective), self._tasks, output_dir, adapt, **changes, **more)

    def __getitem__(self, case: str) -> dict[str, torch.Tensor]:
        if case not in self._made:
            keys = self.keys(case, self._home / case)
            probe_on_ranks(1, keys)
            self._made[case] = features_of(keys)
        return self._made[case]


@pytest.fixture(scope="module")
def references(base: Base, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(base, tasks, tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        pytest.param(case, layout, marks=[] if (case, layout) in QUICK else [pytest.mark.slow])
        for layout in LAYOUTS
        for case in CASES
    ],
)
def test_features_are_the_same_on_every_layout(case: str, layout: str, references: References, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    keys = references.keys(case, tmp_path / "run", **changes)
    probe_on_ranks(ranks, keys)
    ours = features_of(keys)
    assert ours.keys() == references[case].keys()
    for name, expected in references[case].items():
        torch.testing.assert_close(ours[name], expected, atol=TOLERANCE, rtol=0)


def test_features_of_half_precision_are_kept_in_fp32(references: References, tmp_path: Path) -> None:
    zero = {"deepspeed__zero_optimization__stage": 1}
    keys = references.keys("gpt-classes", tmp_path / "run", precision="bf16", **zero)
    probe_on_ranks(1, keys)
    for name, found in features_of(keys).items():
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, references["gpt-classes"][name], atol=HALF_TOLERANCE, rtol=0)


def test_dropout_is_off(references: References, tmp_path: Path) -> None:
    dropout = {"model__hidden_dropout": 0.3, "model__attention_dropout": 0.3}
    keys = references.keys("bert-tags", tmp_path / "run", **dropout)
    probe_on_ranks(1, keys)
    assert all(torch.equal(found, references["bert-tags"][name]) for name, found in features_of(keys).items())


def test_the_base_is_unchanged_bit_for_bit(base: Base, tasks: Path, tmp_path: Path) -> None:
    assert run_ranks(1, changed_weights, probing_keys("classes", base("bert"), tasks, tmp_path)) == [[]]
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_second_run_with_another_head_reads_the_features(base: Base, tasks: Path, tmp_path: Path) -> None:
    first = probe_on_ranks(1, probing_keys("classes", base("bert"), tasks, tmp_path))
    keys = probing_keys("classes", base("bert"), tasks, tmp_path, {"head": "mlp"})
    assert run_ranks(1, probe_without_model, keys) == [0]
    second = probe_on_ranks(1, keys)
    assert (first["head"], second["head"]) == ("linear", "mlp")


def test_features_of_another_base_or_other_rows_are_computed_anew(
    base: Base,
    tasks: Path,
    prepared: tuple[str, str],
    tmp_path: Path,
) -> None:
    keys = probing_keys("classes", base("bert"), tasks, tmp_path / "run")
    probe_on_ranks(1, keys)
    former = features_of(keys)
    other = keys_of("bert", prepared, tmp_path / "other", train__stop_at_step=1)
    pretrain_on_ranks(1, other)
    keys["model"]["init_from"] = str(tmp_path / "other" / "checkpoints" / "step-00000001")
    probe_on_ranks(1, keys)
    changed = features_of(keys)
    assert not any(torch.equal(changed[name], former[name]) for name in former)

    rows = tmp_path / "dev.jsonl"
    lines = (tasks / "classes-dev.jsonl").read_text().splitlines()
    rows.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    keys["task"]["dev"] = str(rows)
    probe_on_ranks(1, keys)
    name = "dev-layer-04-mean"
    swapped = [1, 0, *range(2, len(lines))]
    torch.testing.assert_close(features_of(keys)[name], changed[name][swapped], atol=TOLERANCE, rtol=0)
    assert torch.equal(features_of(keys)["train-layer-04-mean"], changed["train-layer-04-mean"])
