"""Schedules in training: what the steps read and apply is what the pure functions say, on every layout and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmscale.config.io import parse_run
from lmscale.optim.lr import lr_at, weight_decay_at
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import (
    Keys,
    largest_difference,
    losses,
    norms,
    pretrain_in_rank,
    pretrain_on_ranks,
    run_keys,
)

pytestmark = pytest.mark.distributed

OTHER_LAYOUT_TOLERANCE = 1.0e-5
"""Relative, fp32: as between layouts of any run."""
CURRICULUM: Keys = {
    "data__seq_length_stages": [
        {"seq_length": 8, "until_tokens": 100},
        {"seq_length": 16, "until_tokens": 300},
    ],
    "batch__stages": [{"batch_size": 4, "until_tokens": 400}],
    "train__train_tokens": 900,
}
SHAPES = [(4, 8), (4, 8), (4, 8), (4, 8), (4, 16), (4, 16), (4, 16), (4, 32), (8, 32), (8, 32)]
"""Batch and length of each step, which ends at 32, 64, 96, 128, 192, 256, 320, 448, 704 and 960 tokens."""


def zero(stage: int, **more: Any) -> Keys:
    return {"deepspeed__zero_optimization__stage": stage, **more}


def interrupt(ranks: int, keys: Keys, step: int) -> None:
    keys["train"]["stop_at_step"] = step
    pretrain_on_ranks(ranks, keys)
    del keys["train"]["stop_at_step"]


def shapes(run: list[Keys]) -> list[tuple[int, int]]:
    tokens = np.diff([0, *(record["consumed_tokens"] for record in run)]).tolist()
    samples = np.diff([0, *(record["consumed_samples"] for record in run)]).tolist()
    return [(count, size // count) for count, size in zip(samples, tokens, strict=True)]


@pytest.fixture(scope="module")
def reference(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[Keys]:
    return pretrain_on_ranks(1, run_keys(corpus, tmp_path_factory.mktemp("reference"), **CURRICULUM))


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, zero(3)),
        pytest.param(2, zero(2), marks=pytest.mark.slow),
        (2, zero(1, parallel__tp_size=2, parallel__sequence_parallel=True)),
        pytest.param(2, zero(1, parallel__pp_size=2), marks=pytest.mark.slow),
        (4, zero(1, parallel__pp_size=4)),  # stages in the middle read no batch, and must learn the length
        pytest.param(2, zero(1, parallel__recompute="full"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_curriculum_trains_alike_on_every_layout(
    ranks: int, changes: Keys, reference: list[Keys], corpus: str, tmp_path: Path
) -> None:
    assert shapes(reference) == SHAPES
    changes = {**CURRICULUM, "train__eval_interval": 6, **changes}  # evaluation is at full length, between two lengths
    run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path, **changes))
    assert shapes(run) == SHAPES
    assert [record["train/global_batch_size"] for record in run] == [batch for batch, _ in SHAPES]
    assert largest_difference(losses(run), losses(reference)) < OTHER_LAYOUT_TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < OTHER_LAYOUT_TOLERANCE


@pytest.mark.parametrize(
    ("before", "after", "is_bitwise"),
    [
        ((2, zero(1, parallel__pp_size=2)), (2, zero(1, parallel__pp_size=2)), True),
        pytest.param((1, zero(0)), (1, zero(0)), True, marks=pytest.mark.slow),
        ((1, zero(0)), (2, zero(2)), False),
    ],
    ids=str,
)
def test_resume_inside_a_stage_goes_on_as_if_it_had_not_stopped(
    before: tuple[int, Keys],
    after: tuple[int, Keys],
    is_bitwise: bool,
    reference: list[Keys],
    corpus: str,
    tmp_path: Path,
) -> None:
    keys = run_keys(corpus, tmp_path / "parts", **CURRICULUM, **before[1])
    interrupt(before[0], keys, step=6)  # the second length, the second to last step of its stage
    run = pretrain_on_ranks(after[0], run_keys(corpus, tmp_path / "parts", **CURRICULUM, **after[1]))
    assert shapes(run) == SHAPES
    if is_bitwise:
        whole = pretrain_on_ranks(before[0], run_keys(corpus, tmp_path / "whole", **CURRICULUM, **before[1]))
        assert (losses(run), norms(run)) == (losses(whole), norms(whole))
    assert largest_difference(losses(run), losses(reference)) < OTHER_LAYOUT_TOLERANCE


def test_run_resumed_with_a_doubled_batch_counts_on(corpus: str, tmp_path: Path) -> None:
    schedule = {"optim__lr_decay_style": "wsd", "optim__lr_cooldown_tokens": 1000, "train__train_tokens": 3000}
    keys = run_keys(corpus, tmp_path, **schedule)
    interrupt(1, keys, step=3)
    doubled = run_keys(
        corpus, tmp_path, **schedule, batch__global_batch_size=16, checkpoint__allow_change=["batch"], **zero(1)
    )
    run = pretrain_on_ranks(2, doubled)
    assert shapes(run) == [(8, 32)] * 3 + [(16, 32)] * 5
    config = parse_run(doubled)
    rates = [lr_at(record["consumed_tokens"], config.optim, 3000) for record in run]
    assert [record["train/lr"] for record in run] == pytest.approx(rates, rel=1e-12)
    assert rates[0] < rates[1] == rates[2] > rates[-1]  # of warm-up, stable phase and decay


def test_older_checkpoint_cools_down_in_another_directory(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path / "long", checkpoint__save_interval=3, optim__lr_decay_style="constant")
    pretrain_on_ranks(1, keys)
    cooldown = {"start_tokens": 768, "tokens": 512, "style": "one_minus_sqrt"}
    branch = run_keys(
        *(corpus, tmp_path / "branch"),
        optim__lr_decay_style="constant",
        optim__lr_cooldown=cooldown,
        checkpoint__resume=str(tmp_path / "long" / "checkpoints" / "step-00000003"),
        train__train_tokens=1280,
    )
    run = pretrain_on_ranks(1, branch)
    assert [record["step"] for record in run] == [4, 5]
    assert [record["train/lr"] for record in run] == pytest.approx([1.0e-3 * (1 - 0.5**0.5), 0.0])


@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_weight_decay_of_each_step_reaches_the_groups_that_decay(stage: int, corpus: str, tmp_path: Path) -> None:
    decay = {"optim__weight_decay": 0.1, "optim__weight_decay_end": 0.4, "optim__weight_decay_style": "cosine"}
    keys = run_keys(corpus, tmp_path, **decay, **zero(stage))
    (seen,) = run_ranks(1, _weight_decays, keys)
    optim = parse_run(keys).optim
    expected = [weight_decay_at(256 * step, optim, 256 * 6) for step in range(1, 7)]
    assert seen == [{"no_decay": 0.0, "decay": value} for value in expected]
    assert expected[-1] == pytest.approx(0.4)


def _weight_decays(keys: Keys) -> list[dict[str, float]]:
    from lmscale.train.engine import Engine

    seen, train_step = [], Engine.train_step

    def spy(self: Engine, *arguments: Any) -> Any:
        result = train_step(self, *arguments)
        seen.append({group["name"]: group["weight_decay"] for group in self.basic_optimizer.param_groups})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", spy)
        pretrain_in_rank(keys)
    return seen
