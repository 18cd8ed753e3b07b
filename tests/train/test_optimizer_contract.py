"""Every optimizer through the engine: one update on every layout, fp32 masters and moments, resumed bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import Keys, final_state, largest_difference, losses, norms, pretrain_on_ranks, run_keys
from tests.models.batches import make_batch
from tests.train.test_adafactor import MICRO, config_keys, interrupt, zero

pytestmark = pytest.mark.distributed

STEPS = 5
TOLERANCE = 2.0e-5
"""Relative, of losses and gradient norms: fp32 sums in another order."""
SIGN_TOLERANCE = 1.0e-4
"""Lion's: a gradient near zero has another sign on another layout, and moves its weight by the whole rate. Its losses move
by 2.4e-3."""
HALF_SHARE = 0.15
"""How far losses in bf16 and fp16 may be from those in fp32, of how far training has moved these; 1 would be no training.
The roundings of a forward pass in bf16 are 1e-4, and the least moved of the losses, adafactor's, have moved by 1.5e-3."""
OPTIMIZERS: dict[str, Keys] = {
    "sgd": {"name": "sgd", "lr": 0.1, "sgd_momentum": 0.9, "sgd_nesterov": True},
    "adam": {"name": "adam", "lr": 1.0e-3, "weight_decay": 0.01},
    "adamw": {"name": "adamw", "lr": 1.0e-3},
    "adamw-raw": {"name": "adamw", "lr": 1.0e-3, "adam_eps_mode": "raw", "adam_eps": 1.0e-6},
    "adamw-deepspeed": {"name": "adamw", "lr": 1.0e-3, "implementation": "deepspeed"},
    "adafactor": {"name": "adafactor", "lr": 1.0e-2, "adafactor_min_dim": 16},
    "lion": {"name": "lion", "lr": 1.0e-3},
    "muon": {"name": "muon", "lr": 1.0e-2, "muon_precision": "fp32"},
}
OFFLOADED = ("sgd", "adam", "adamw", "adamw-raw", "lion")
LAYOUTS: dict[str, Any] = {
    "tp2-sp-zero1": {"ranks": 2, "tp": 2, "sp": True, "stage": 1},
    "dp2-zero3": {"ranks": 2, "stage": 3},
    "dp2-zero2-bf16": {"ranks": 2, "stage": 2, "precision": "bf16"},
    "zero1-offload": {"ranks": 1, "stage": 1, "offload": True},
}
MORE_LAYOUTS: dict[str, Any] = {
    "tp2": {"ranks": 2, "tp": 2},
    "dp2-zero0": {"ranks": 2},
    "dp2-zero1": {"ranks": 2, "stage": 1},
    "dp2-zero2": {"ranks": 2, "stage": 2},
    "pp2": {"ranks": 2, "pp": 2},
    "dp2-tp2-zero2": {"ranks": 4, "tp": 2, "stage": 2},
    "dp2-pp2-zero1": {"ranks": 4, "pp": 2, "stage": 1},
    "dp2-zero1-fp16": {"ranks": 2, "stage": 1, "precision": "fp16"},
    "dp2-zero2-offload": {"ranks": 2, "stage": 2, "offload": True},
    "dp2-zero3-offload": {"ranks": 2, "stage": 3, "offload": True},
}
PLAIN = {"ranks": 1}
ALL_LAYOUTS = LAYOUTS | MORE_LAYOUTS
Series = tuple[list[float], list[float]]


def train_all_in_rank(layout: dict[str, Any]) -> dict[str, Series]:
    """Train some steps with each optimizer; return losses and gradient norms."""
    from lmscale.parallel.topology import init_topology

    topology = init_topology(layout.get("tp", 1), layout.get("pp", 1))
    names = OFFLOADED if layout.get("offload") else OPTIMIZERS
    series = {name: train_in_rank(layout, OPTIMIZERS[name], topology) for name in names}
    if layout == PLAIN:
        series["still"] = train_in_rank(layout, {"name": "sgd", "lr": 1.0e-12, "sgd_momentum": 0.9}, topology)
    return series


def train_in_rank(layout: dict[str, Any], optim: Keys, topology: Any) -> Series:
    import torch

    from lmscale.config.check import check_run
    from lmscale.config.deepspeed_json import check_deepspeed
    from lmscale.config.io import parse_run
    from lmscale.pretrain import build_engine
    from lmscale.train.moments import moments

    keys = config_keys("gpt", layout) | {"optim": optim}
    if layout.get("offload"):
        keys["deepspeed"]["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if layout.get("precision") == "fp16":
        keys["loss_scale"] = {"initial": 256}  # nothing overflows: no step is skipped
    config = parse_run(keys)
    zero_choice = check_deepspeed(keys["deepspeed"], config)
    check_run(config, zero_choice, topology.world_size)
    engine = build_engine(config, topology, zero_choice)
    rows = config.batch.global_batch_size
    num = rows // (MICRO * topology.dp_size)
    series: Series = [], []
    for step in range(1, STEPS + 1):
        batch = make_batch(config.model.architecture, step, rows=rows, vocab_size=190)
        starts = [(m * topology.dp_size + topology.dp_rank) * MICRO for m in range(num)]
        micro = [{name: array[start : start + MICRO] for name, array in batch.items()} for start in starts]
        result = engine.train_step(micro if engine.reads_data else [], num, step, config.optim.lr)
        series[0].append(float(result.loss))
        series[1].append(result.grad_norm)
    for fragment in engine.fragments():
        assert fragment.master.dtype == torch.float32
        kept = moments(engine.basic_optimizer, fragment)
        assert kept
        assert all(moment.values.dtype == torch.float32 for moment in kept)
    return series


def farthest(one: list[float], other: list[float]) -> float:
    """Return the largest difference of two series."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Series]]]:
    """What the ranks of a layout computed, for all optimizers at once; "one" is plain training on one rank."""
    return {}


def _series(results: dict[str, Any], layout: str) -> list[dict[str, Series]]:
    if layout not in results:
        chosen = ALL_LAYOUTS.get(layout, PLAIN)
        results[layout] = run_ranks(chosen["ranks"], train_all_in_rank, chosen)
    return results[layout]


def trained_on(layout: str) -> Iterable[str]:
    """Name the optimizers of a layout: under offload, those that are legal there and not the same as another."""
    return OFFLOADED if ALL_LAYOUTS[layout].get("offload") else OPTIMIZERS


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *((layout, name) for layout in LAYOUTS for name in trained_on(layout)),
        *(pytest.param(layout, name, marks=pytest.mark.slow) for layout in MORE_LAYOUTS for name in trained_on(layout)),
    ],
)
def test_every_layout_takes_the_steps_of_plain_training(layout: str, name: str, results: dict[str, Any]) -> None:
    (reference,) = _series(results, "one")
    assert largest_difference(reference[name][0], reference["still"][0]) > 10 * TOLERANCE
    for mine in _series(results, layout):
        if "precision" in ALL_LAYOUTS[layout]:
            moved = farthest(reference[name][0], reference["still"][0])
            assert farthest(mine[name][0], reference[name][0]) < HALF_SHARE * moved
            continue
        tolerance = SIGN_TOLERANCE if name == "lion" else TOLERANCE
        assert largest_difference(mine[name][0], reference[name][0]) < tolerance
        assert largest_difference(mine[name][1], reference[name][1]) < 10 * tolerance


RESUMED = ("sgd", "adam", "lion", "muon")


@pytest.mark.parametrize(
    ("name", "ranks", "changes"),
    [
        ("sgd", 1, zero(0)),
        ("muon", 2, zero(2, precision="bf16")),
        ("lion", 2, zero(3)),
        *(
            pytest.param(name, ranks, changes, marks=pytest.mark.slow)
            for name in RESUMED
            for ranks, changes in (
                (1, zero(0)),
                (2, zero(3)),
                (2, zero(2, precision="bf16")),
                (4, zero(1, precision="bf16", parallel__tp_size=2, parallel__pp_size=2)),
                (1, zero(1, precision="fp16", loss_scale={"initial": 1024, "window": 2})),
            )
        ),
        *(
            pytest.param(
                name,
                2,
                zero(2, deepspeed__zero_optimization__offload_optimizer={"device": "cpu"}),
                marks=pytest.mark.slow,
            )
            for name in ("sgd", "adam", "lion")
        ),
    ],
    ids=str,
)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    name: str, ranks: int, changes: Keys, corpus: str, tmp_path: Path
) -> None:
    changes = {"optim": OPTIMIZERS[name], **changes}
    whole, keys = (run_keys(corpus, tmp_path / part, **changes) for part in ("whole", "parts"))
    reference = pretrain_on_ranks(ranks, whole)
    interrupt(ranks, keys, step=3)
    run = pretrain_on_ranks(ranks, keys)
    for tag in ("step", "train/lm_loss", "train/grad_norm", "train/param_norm"):
        assert [record[tag] for record in run] == [record[tag] for record in reference]
    assert final_state(keys) == final_state(whole)


@pytest.mark.parametrize("name", [pytest.param("sgd", marks=pytest.mark.slow), "muon"])
def test_run_resumed_on_another_layout_goes_on_as_before(name: str, corpus: str, tmp_path: Path) -> None:
    optim = {"optim": OPTIMIZERS[name]}
    reference = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "whole", **optim))
    interrupt(2, run_keys(corpus, tmp_path / "parts", **optim, **zero(3)), step=3)
    run = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "parts", **optim, **zero(1, parallel__tp_size=2)))
    assert len(run) == 6
    assert largest_difference(losses(run), losses(reference)) < TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < 10 * TOLERANCE


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ("adamw", "lion", "holds no lion_momentum of .*: its optimizer was AdamW"),
        pytest.param("lion", "muon", "holds no (muon_momentum|exp_avg) of", marks=pytest.mark.slow),
    ],
)
def test_checkpoint_of_another_optimizer_is_refused(
    before: str, after: str, missing: str, corpus: str, tmp_path: Path
) -> None:
    pretrain_on_ranks(1, run_keys(corpus, tmp_path, train__stop_at_step=1, optim=OPTIMIZERS[before]))
    with pytest.raises(RankFailure, match=missing):
        pretrain_on_ranks(1, run_keys(corpus, tmp_path, optim=OPTIMIZERS[after]))
