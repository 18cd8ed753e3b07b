"""A resumed run is the uninterrupted one bit for bit: losses, norms, every parameter, every moment, the loss scale.

Dropout is on, the batch ramps up, the corpus is short. Default is a pairwise cover of layout, precision and place of the
save; all of them are slow.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmscale.config.io import parse_run
from lmscale.config.layouts import Layout, broken_rule
from lmscale.feed.loader import build_blend
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, final_state, pretrain_in_rank, pretrain_on_ranks, records, run_keys

pytestmark = pytest.mark.distributed

EPOCH = 26
"""Samples of an epoch."""
CHANGES: Keys = {
    "model__hidden_dropout": 0.1,
    "model__attention_dropout": 0.1,
    "batch__ramp": {"start": 4, "increment": 4, "ramp_samples": 12},
    "data__split": "1,0,0",
    "train__train_tokens": 44 * 32,
}
BORDERS = [0, 4, 8, 12, 20, 28, 36, 44]
"""Samples consumed after each step."""
PLACES = {"in the ramp": 2, "at an epoch's border": 4, "in an epoch": 5}
"""Step of the save. The step after the fourth reads the last samples of an epoch and the first of the next."""
PRECISIONS: dict[str, Keys] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {
        "precision": "fp16",
        # The first steps overflow and are skipped; later the scale grows.
        "loss_scale": {"initial": 2**20, "window": 2, "hysteresis": 1},
    },
}
LAYOUTS: dict[str, tuple[int, int, Keys]] = {
    **{f"dp2-zero{stage}": (2, stage, {}) for stage in range(4)},
    **{f"tp2-zero{stage}": (2, stage, {"parallel": {"tp_size": 2, "sequence_parallel": True}}) for stage in range(4)},
    **{f"pp2-zero{stage}": (2, stage, {"parallel": {"pp_size": 2}}) for stage in range(2)},
    "one-zero1": (1, 1, {}),
    "tp2-pp2-zero1": (4, 1, {"parallel": {"tp_size": 2, "pp_size": 2}}),
}
QUICK = {
    ("dp2-zero0", "fp32", "in an epoch"),
    ("dp2-zero1", "fp16", "in the ramp"),
    ("dp2-zero2", "bf16", "at an epoch's border"),
    ("dp2-zero3", "fp16", "at an epoch's border"),
    ("dp2-zero3", "bf16", "in the ramp"),
    ("tp2-zero1", "fp32", "at an epoch's border"),
    ("tp2-zero2", "fp16", "in an epoch"),
    ("pp2-zero1", "bf16", "in an epoch"),
    ("pp2-zero0", "fp32", "in the ramp"),
}


def _is_legal(layout: str, precision: str) -> bool:
    _, stage, changes = LAYOUTS[layout]
    parallel = changes.get("parallel", {})
    sizes = parallel.get("pp_size", 1), parallel.get("tp_size", 1), parallel.get("sequence_parallel", False)
    return broken_rule(Layout(stage, *sizes, precision, False, False)) is None


def _cases() -> list[Any]:
    return [
        pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow])
        for case in itertools.product(LAYOUTS, PRECISIONS, PLACES)
        if _is_legal(*case[:2])
    ]


@pytest.fixture(scope="module")
def short_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of EPOCH samples of 32 tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("short") / "tokens"
    rng = np.random.default_rng(3)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(EPOCH):
        builder.add_document(np.append(1 + (499 * rng.random(31) ** 3).astype(np.int64), 0), [32])
    builder.add_document(np.array([5, 0]), [2])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def train_in_two_parts(ranks: int, keys: Keys, step: int) -> list[Keys]:
    keys["train"]["stop_at_step"] = step
    pretrain_on_ranks(ranks, keys)
    del keys["train"]["stop_at_step"]
    return pretrain_on_ranks(ranks, keys)


def series(run: list[Keys]) -> list[list[Any]]:
    tags = ("step", "consumed_samples", "train/lm_loss", "train/grad_norm", "train/param_norm", "train/loss_scale")
    return [[record.get(tag) for tag in tags] for record in run]


def test_the_places_are_what_they_are_called(short_corpus: str, tmp_path: Path) -> None:
    blend = build_blend(parse_run(run_keys(short_corpus, tmp_path, **CHANGES)))
    epochs = blend.locate(np.arange(BORDERS[-1])).epoch
    assert (epochs == np.arange(BORDERS[-1]) // EPOCH).all()
    assert BORDERS[PLACES["in the ramp"]] < CHANGES["batch__ramp"]["ramp_samples"]
    border = PLACES["at an epoch's border"]
    assert BORDERS[border] < EPOCH < BORDERS[border + 1]
    assert BORDERS[PLACES["in an epoch"]] > EPOCH


@pytest.mark.parametrize(("layout", "precision", "place"), _cases())
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    layout: str, precision: str, place: str, short_corpus: str, tmp_path: Path
) -> None:
    ranks, stage, changes = LAYOUTS[layout]
    changes = {**CHANGES, **changes, **PRECISIONS[precision], "deepspeed__zero_optimization__stage": stage}
    whole, parts = (run_keys(short_corpus, tmp_path / name, **changes) for name in ("whole", "parts"))
    reference = pretrain_on_ranks(ranks, whole)
    run = train_in_two_parts(ranks, parts, PLACES[place])
    assert [record["consumed_samples"] for record in run] == BORDERS[1:]
    if precision == "fp16":
        skipped = [record["train/skipped_steps"] for record in run]
        assert skipped[PLACES[place] - 1] > 0  # before the save
        assert skipped[-1] < len(run)
    assert series(run) == series(reference)
    assert final_state(parts) == final_state(whole)


def test_training_draws_nothing_from_global_generators_and_sets_them_by_step(short_corpus: str, tmp_path: Path) -> None:
    changes = {**CHANGES, "parallel": {"tp_size": 2}, "train__stop_at_step": 3}
    runs = [run_keys(short_corpus, tmp_path / name, **changes) for name in "ab"]
    drawn = [run_ranks(2, _train_from_another_state, keys, seed) for seed, keys in enumerate(runs)]
    assert drawn[0] == drawn[1]
    assert len({numbers for rank in drawn[0] for numbers in rank}) == 2 * 3  # another for each rank and each step
    assert series(records(runs[0])) == series(records(runs[1]))
    assert final_state(runs[0]) == final_state(runs[1])


def _train_from_another_state(keys: Keys, seed: int) -> list[tuple[float, float]]:
    """Train with generators in some state; return what a user's code would draw from them after each step."""
    from lmscale.train.engine import Engine

    drawn, train_step = [], Engine.train_step

    def step_and_draw(self: Engine, *args: Any, **more: Any) -> Any:
        result = train_step(self, *args, **more)
        drawn.append((random.random(), float(np.random.random())))  # noqa: NPY002 - the generator in question
        return result

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator in question
    torch.manual_seed(seed)
    Engine.train_step = step_and_draw  # type: ignore[method-assign]
    try:
        pretrain_in_rank(keys)
    finally:
        Engine.train_step = train_step  # type: ignore[method-assign]
    return drawn
