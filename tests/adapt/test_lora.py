"""LoRA: what it adds is B A in the rows of its targets; biases, scale, dropout; the same as peft's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmscale.adapt.merge import lora_delta, merged_places
from lmscale.config.adapt import LoraConfig
from lmscale.config.io import parse_run
from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import Adaptation, adaptation_of, is_bias
from lmscale.plan.lora import check_targets, lora_scale
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.adapt.bases import Bases, checkpoint_of
from tests.adapt.watch import adapt_and_look
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import GPT, LLAMA, Keys, largest_difference, losses, pretrain_on_ranks
from tests.evaluate.checkpoints import reseal

pytestmark = pytest.mark.distributed

MERGED_TOLERANCE = 1.0e-6
"""Relative, of losses near 6: (W + B A) x beside W x + B (A x), in fp32."""
TARGETS: dict[str, list[list[str]]] = {
    "gpt": [["query"], ["key"], ["value"], ["query", "value"], ["qkv"], ["proj"], ["fc1"], ["fc2"], ["embedding"]],
    "llama": [["query", "key"], ["value"], ["qkv"], ["gate"], ["up"], ["gate", "up"], ["fc1"], ["embedding"]],
    "bert": [["embedding", "proj"]],
    "t5": [["cross_query"], ["cross_key"], ["cross_value", "cross_proj"], ["embedding"]],
}
QUICK = {
    "gpt": (["query", "value"], ["embedding"], ["fc2"]),
    "llama": (["value"], ["up"]),
    "t5": (["cross_key"], ["embedding"]),
}


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        pytest.param(
            shape,
            targets,
            id=f"{shape}, {'+'.join(targets)}",
            marks=[] if targets in QUICK.get(shape, ()) else [pytest.mark.slow],
        )
        for shape, lists in TARGETS.items()
        for targets in lists
    ],
)
def test_merged_weights_compute_what_the_pairs_do(shape: str, targets: list[str], bases: Bases, tmp_path: Path) -> None:
    adapt = {"method": "lora", "rank": 3, "alpha": 6.0, "targets": targets}
    keys = bases.keys(shape, tmp_path / "adapted", adapt)
    adapted = pretrain_on_ranks(1, keys)
    model = parse_run(keys).model
    source, own = (CheckpointReader(Path(path)) for path in (bases.path(shape), checkpoint_of(tmp_path / "adapted")))
    config = LoraConfig(**adapt)
    merged = {
        name: reading(source)(name) + lora_delta(model, config, pairs, reading(own))
        for name, pairs in merged_places(model, config).items()
    }
    assert merged
    write_with(Path(bases.path(shape)), tmp_path / "merged", merged)
    # The held-out loss behind the last step is that of the trained weights; a rate of 0 leaves the merged ones.
    still = bases.keys(shape, tmp_path / "still", {"method": "full"}, train__stop_at_step=1, optim__lr=1.0e-30)
    still["model"]["init_from"] = str(tmp_path / "merged")
    tags = [tag for tag in adapted[-1] if tag.startswith("valid/") and tag.endswith("loss")]
    run = pretrain_on_ranks(1, still)
    assert largest_difference([run[-1][tags[0]]], [adapted[-1][tags[0]]]) < MERGED_TOLERANCE
    base = pretrain_on_ranks(1, bases.keys(shape, tmp_path / "base", adapt, train__stop_at_step=1, optim__lr=1.0e-30))
    assert abs(base[-1][tags[0]] / adapted[-1][tags[0]] - 1) > 10 * MERGED_TOLERANCE


def reading(reader: CheckpointReader) -> Callable[[str], torch.Tensor]:
    return lambda name: reader.logical(PARAMETER, name)


def write_with(base: Path, target: Path, weights: dict[str, torch.Tensor]) -> None:
    """Copy a checkpoint of one rank, with other weights in it."""
    shutil.copytree(base, target)
    file = target / "rank-00000.safetensors"
    tensors = load_file(file)
    for name, weight in weights.items():
        tensors[f"{PARAMETER}/{name}"] = weight.reshape(-1).contiguous()
    save_file(tensors, file)
    reseal(target)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert lora_scale(LoraConfig(rank=16, alpha=8.0)) == 0.5
    assert lora_scale(LoraConfig(rank=16, alpha=8.0, rslora=True)) == 2.0


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_are_trained_as_the_mode_says(bias: str, bases: Bases, tmp_path: Path) -> None:
    keys = bases.keys("gpt", tmp_path, {"method": "lora", "targets": ["value", "fc1"], "bias": bias})
    (seen,) = run_ranks(1, adapt_and_look, keys)
    trained = {name for name in seen.moved if ".lora." not in name}
    everything = {name for name in Adaptation(parse_run(keys).model).shapes() if is_bias(name)}
    mine = {name for name in everything if name.endswith(("attention.linear_qkv.bias", "mlp.linear_fc1.bias"))}
    assert trained == {"none": set(), "all": everything, "lora_only": mine}[bias]
    assert any(".lora." in name for name in seen.moved)


def test_dropout_is_of_the_step_and_the_same_in_a_second_run(bases: Bases, tmp_path: Path) -> None:
    adapt = {"method": "lora", "dropout": 0.5}
    runs = [pretrain_on_ranks(1, bases.keys("gpt", tmp_path / name, adapt)) for name in ("one", "two")]
    assert losses(runs[0]) == losses(runs[1])
    full = pretrain_on_ranks(1, bases.keys("gpt", tmp_path / "full", adapt, parallel__recompute="full"))
    assert losses(full) == losses(runs[0])
    plain = pretrain_on_ranks(1, bases.keys("gpt", tmp_path / "plain", {"method": "lora"}))
    assert losses(plain)[0] == losses(runs[0])[0]  # B is 0
    assert losses(plain)[2] != losses(runs[0])[2]


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        (GPT, [], r"adapt.targets: is empty; name some of embedding, fc1"),
        (GPT, ["gate"], r"adapt.targets = 'gate': matches nothing in a gpt model of this shape"),
        (GPT, ["cross_query"], r"adapt.targets = 'cross_query': matches nothing"),
        (LLAMA, ["up", "up"], r"adapt.targets = 'up': is given twice"),
        (LLAMA, ["fc1", "up"], r"adapt.targets = 'up': fc1 holds up already"),
        (GPT, ["value", "qkv"], r"adapt.targets = 'value': qkv holds value already"),
    ],
)
def test_targets_that_mean_nothing_are_refused(shape: Keys, targets: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_targets(ModelConfig(**shape), LoraConfig(targets=targets))


def test_a_run_with_a_target_that_matches_nothing_is_refused(bases: Bases, tmp_path: Path) -> None:
    from lmscale.launcher.validate import validate_run

    config = parse_run(bases.keys("gpt", tmp_path, {"method": "lora", "targets": ["gate"]}))
    assert adaptation_of(config) is not None
    with pytest.raises(ConfigError, match=r"adapt.targets = 'gate': matches nothing"):
        validate_run(config, 1)
