"""Parameter groups through the engine: their rates and frozen parameters are those of one rank on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.distributed.runs import Keys, largest_difference, losses, norms, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""Relative, of losses and norms: fp32 sums in another order."""
FROZEN = ("word_embedding.table.weight", "layers.0.", "layers.3.mlp.linear_fc2.bias")
GROUPS: Keys = {
    "optim__groups": [
        {"name": "frozen", "match": "re:^word_embedding|^layers\\.0\\.|3\\.mlp\\.linear_fc2\\.bias", "frozen": True},
        {"name": "low", "match": "layers.1.*", "lr_multiplier": 0.1, "weight_decay_multiplier": 5.0},
        {"name": "high", "match": "layers.[23].*", "lr_multiplier": 3.0},
    ],
    "model__position_embedding": "learned",
    "checkpoint__save_interval": 1,
    "checkpoint__keep": 0,
}


def zero(stage: int, **more: Any) -> Keys:
    return {"deepspeed__zero_optimization__stage": stage, **more}


LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2-zero1": (2, zero(1, parallel__tp_size=2)),
    "pp2": (2, zero(0, parallel__pp_size=2)),
    "dp2-zero2": (2, zero(2)),
    "dp2-zero3": (2, zero(3)),
    "tp2-pp2-zero1": (4, zero(1, parallel__tp_size=2, parallel__pp_size=2)),
}
SLOW = {"tp2-zero1", "dp2-zero2", "pp2"}


@pytest.fixture(scope="module")
def reference(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Keys], Path]:
    """The run of one rank, and its directory."""
    path = tmp_path_factory.mktemp("reference")
    return pretrain_on_ranks(1, run_keys(corpus, path, **zero(0), **GROUPS)), path


def weights(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    path = run / f"checkpoints/step-{step:08d}" if step else find_checkpoint(run / "checkpoints")
    assert path is not None
    reader = CheckpointReader(path)
    return {name: reader.logical(PARAMETER, name) for name in reader.shapes()}


def assert_frozen_alone_stayed(run: Path) -> None:
    """Compare the weights after the first step and after the last."""
    first, last = weights(run, step=1), weights(run)
    assert set(first) == set(last)
    for name, before in first.items():
        assert torch.equal(before, last[name]) == name.startswith(FROZEN), name


def test_frozen_parameters_stay_bit_for_bit_and_the_others_follow_their_rates(
    reference: tuple[list[Keys], Path], corpus: str, tmp_path: Path
) -> None:
    _, path = reference
    assert_frozen_alone_stayed(path)
    pretrain_on_ranks(1, run_keys(corpus, tmp_path, **zero(0), train__stop_at_step=1))
    plain, grouped = weights(tmp_path, step=1), weights(path, step=1)
    # Adam's first step moves each weight by the rate, but for eps and for decay: biases begin at 0 and have none.
    rate = float(plain["layers.0.mlp.linear_fc1.bias"].abs().max())
    for layer, multiplier in ((0, 0.0), (1, 0.1), (2, 3.0), (3, 3.0)):
        moved = grouped[f"layers.{layer}.mlp.linear_fc1.bias"].abs()
        assert float(moved.max()) == pytest.approx(multiplier * rate, rel=1.0e-2)


@pytest.mark.parametrize(
    "layout", [pytest.param(layout, marks=[pytest.mark.slow] if layout in SLOW else []) for layout in LAYOUTS]
)
def test_every_layout_trains_the_groups_as_one_rank_does(
    layout: str, reference: tuple[list[Keys], Path], corpus: str, tmp_path: Path
) -> None:
    ranks, changes = LAYOUTS[layout]
    run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path, **changes, **GROUPS))
    assert largest_difference(losses(run), losses(reference[0])) < TOLERANCE
    assert largest_difference(norms(run), norms(reference[0])) < TOLERANCE
    assert [r["train/param_norm"] for r in run] == pytest.approx(
        [r["train/param_norm"] for r in reference[0]], rel=1e-6
    )
    assert_frozen_alone_stayed(tmp_path)
    mine, theirs = weights(tmp_path), weights(reference[1])
    for name in theirs:
        assert torch.equal(mine[name], theirs[name]) or not name.startswith(FROZEN), name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, zero(3, precision="bf16")), (2, zero(3, precision="bf16"))),
        pytest.param((2, zero(1)), (2, zero(1)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumed_run_with_frozen_parameters_repeats_the_uninterrupted_one(
    before: tuple[int, Keys], after: tuple[int, Keys], corpus: str, tmp_path: Path
) -> None:
    whole = pretrain_on_ranks(before[0], run_keys(corpus, tmp_path / "whole", **before[1], **GROUPS))
    keys = run_keys(corpus, tmp_path / "parts", **before[1], **GROUPS)
    keys["train"]["stop_at_step"] = 3
    pretrain_on_ranks(before[0], keys)
    run = pretrain_on_ranks(after[0], run_keys(corpus, tmp_path / "parts", **after[1], **GROUPS))
    for name in ("step", "train/lm_loss", "train/grad_norm", "train/param_norm"):
        assert [record[name] for record in run] == [record[name] for record in whole]
    assert_frozen_alone_stayed(tmp_path / "parts")


def test_first_record_alone_says_what_the_training_state_takes(reference: tuple[list[Keys], Path]) -> None:
    run, path = reference
    sizes = {name: value.numel() for name, value in weights(path).items()}
    trained = sum(size for name, size in sizes.items() if not name.startswith(FROZEN))
    state = {"memory/parameter_bytes": 4 * sum(sizes.values()), "memory/gradient_bytes": 4 * trained}
    state["memory/optimizer_bytes"] = 8 * trained
    for tag, expected in state.items():
        assert run[0][tag] == pytest.approx(expected, rel=0.01)  # and a step count for each tensor
        assert all(tag not in record for record in run[1:])


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stage_without_anything_to_train_trains_as_on_one_stage(stage: int, corpus: str, tmp_path: Path) -> None:
    groups = [{"name": "frozen", "match": "re:^word|^input|^layers\\.[01]\\.", "frozen": True}]
    changes: Keys = {"optim__groups": groups, "model__tied_head": False, "checkpoint__save_interval": 0}
    one = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "one", **zero(stage), **changes))
    run = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "two", **zero(stage, parallel__pp_size=2), **changes))
    for tag in ("train/lm_loss", "train/grad_norm", "train/param_norm"):
        assert largest_difference([r[tag] for r in run], [r[tag] for r in one]) < TOLERANCE
    mine, theirs = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert set(mine) == set(theirs)  # the idle parameter is no part of the model
