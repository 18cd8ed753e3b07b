"""Adafactor through the engine: on every layout the update of one rank, its state factored, saved and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.train.checkpoint_reader import CheckpointReader
from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import Keys, final_state, largest_difference, losses, norms, pretrain_on_ranks, run_keys
from tests.models.batches import make_batch

pytestmark = pytest.mark.distributed

MICRO, GLOBAL, STEPS, LR = 2, 8, 5, 1.0e-2
TOLERANCE = 1.0e-5
"""Relative, of losses and gradient norms: fp32 sums in another order."""
MIN_DIM = 16
MODELS: dict[str, Keys] = {
    "t5": {"architecture": "t5", "head_dim": 6, "activation": "geglu", "tied_head": False, "scaled_logits": False},
    "gpt": {"num_layers": 2, "position_embedding": "learned"},
}
Ranks = dict[str, Any]
LAYOUTS: dict[str, Ranks] = {
    "tp2": {"ranks": 2, "tp": 2},
    "tp2-sp-zero1": {"ranks": 2, "tp": 2, "sp": True, "stage": 1},
    "pp2": {"ranks": 2, "pp": 2},
    "dp2-zero0": {"ranks": 2},
    "dp2-zero1": {"ranks": 2, "stage": 1},
    "dp2-zero2": {"ranks": 2, "stage": 2},
    "dp2-zero3": {"ranks": 2, "stage": 3},
    "dp3-zero1": {"ranks": 3, "stage": 1},
    "dp2-tp2-zero1": {"ranks": 4, "tp": 2, "stage": 1},
    "dp2-pp2-zero1": {"ranks": 4, "pp": 2, "stage": 1},
}
QUICK = ("tp2", "dp2-zero2", "dp2-zero3", "dp2-tp2-zero1")
"""Layouts of the default suite."""


def config_keys(model: str, layout: Ranks) -> Keys:
    """Make the config of a run on hand-made batches."""
    batch = 12 if layout["ranks"] == 3 else GLOBAL
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 190,
            "max_position_embeddings": 32,
            **dict.fromkeys(("hidden_dropout", "attention_dropout", "ffn_dropout"), 0.0),
            **MODELS[model],
        },
        "tokenizer": {"path": "unread"},
        "data": {"train": [{"prefix": "unread"}], "seq_length": 16},
        "batch": {"micro_batch_size": MICRO, "global_batch_size": batch},
        "optim": {"lr": LR, "name": "adafactor", "adafactor_min_dim": MIN_DIM, "max_grad_norm": 0.0},
        "train": {"train_tokens": 10_000},
        "parallel": {
            "tp_size": layout.get("tp", 1),
            "pp_size": layout.get("pp", 1),
            "sequence_parallel": layout.get("sp", False),
        },
        "precision": layout.get("precision", "fp32"),
        "deepspeed": {"zero_optimization": {"stage": layout.get("stage", 0)}},
        "output_dir": "unwritten",
    }


def train_in_rank(keys: Keys) -> tuple[list[float], list[float]]:
    """Train some steps, look that matrices m x n keep m + n numbers, and return losses and gradient norms."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine

    config = parse_run(keys)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    stage = keys["deepspeed"]["zero_optimization"]["stage"]
    engine = build_engine(config, topology, ZeroChoice(stage=stage))
    rows = config.batch.global_batch_size
    num = rows // (MICRO * topology.dp_size)
    series: tuple[list[float], list[float]] = [], []
    for step in range(1, STEPS + 1):
        batch = make_batch(config.model.architecture, step, rows=rows, vocab_size=190)
        starts = [(m * topology.dp_size + topology.dp_rank) * MICRO for m in range(num)]
        micro = [{name: array[start : start + MICRO] for name, array in batch.items()} for start in starts]
        result = engine.train_step(micro if engine.reads_data else [], num, step, LR)
        series[0].append(float(result.loss))
        series[1].append(result.grad_norm)
    for fragment in engine.fragments():
        tensor, state = fragment.tensor, engine.basic_optimizer.state[fragment.key]
        assert state["step"] == STEPS
        fused = num_matrices(tensor.name, config.model.is_gated)
        is_factored = len(tensor.shape) == 2 and min(tensor.shape[0] // fused, tensor.shape[1]) >= MIN_DIM
        size = fragment.end - fragment.start
        sizes = (tensor.local_shape[0], fused * tensor.local_shape[1]) if is_factored else (size,)
        assert tuple(values.numel() for values in state[tensor.name].values()) == sizes, tensor.name
    return series


def num_matrices(name: str, is_gated: bool) -> int:
    """Count the matrices, all of one size here, that a tensor holds."""
    return {"linear_qkv": 3, "linear_kv": 2, "linear_fc1": 2 if is_gated else 1}.get(name.split(".")[-2], 1)


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, int], Any]:
    """What one rank computes, by model and batch."""
    return {}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(pytest.param("t5", layout, marks=[] if layout in QUICK else [pytest.mark.slow]) for layout in LAYOUTS),
        ("gpt", "tp2-sp-zero1"),
        pytest.param("gpt", "dp2-pp2-zero1", marks=pytest.mark.slow),
    ],
)
def test_losses_norms_and_state_are_those_of_one_rank(model: str, layout: str, references: dict[Any, Any]) -> None:
    keys = config_keys(model, LAYOUTS[layout])
    key = model, keys["batch"]["global_batch_size"]
    if key not in references:
        one = config_keys(model, {"ranks": 1}) | {"batch": keys["batch"]}
        (references[key],) = run_ranks(1, train_in_rank, one)
    reference = references[key]
    for result in run_ranks(LAYOUTS[layout]["ranks"], train_in_rank, keys):
        assert largest_difference(result[0], reference[0]) < TOLERANCE
        assert largest_difference(result[1], reference[1]) < TOLERANCE


ADAFACTOR: Keys = {"optim": {"name": "adafactor", "lr": 1.0e-2, "adafactor_min_dim": MIN_DIM, "max_grad_norm": 0.0}}
SWIGLU: Keys = {"model__activation": "swiglu"}  # its first matrix is two blocks under tensor parallelism


def zero(stage: int, **more: Any) -> Keys:
    return {"deepspeed__zero_optimization__stage": stage, **more}


def interrupt(ranks: int, keys: Keys, step: int) -> None:
    keys["train"]["stop_at_step"] = step
    pretrain_on_ranks(ranks, keys)
    del keys["train"]["stop_at_step"]


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        pytest.param(1, zero(0), marks=pytest.mark.slow),
        pytest.param(2, zero(1), marks=pytest.mark.slow),
        pytest.param(2, zero(2, precision="bf16"), marks=pytest.mark.slow),
        pytest.param(2, zero(3), marks=pytest.mark.slow),
        (4, zero(1, precision="bf16", parallel__tp_size=2, parallel__pp_size=2)),
        pytest.param(1, zero(1, precision="fp16", loss_scale={"initial": 1024, "window": 2}), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    ranks: int, changes: Keys, corpus: str, tmp_path: Path
) -> None:
    changes = {**ADAFACTOR, **changes}
    whole, keys = (run_keys(corpus, tmp_path / part, **changes) for part in ("whole", "parts"))
    reference = pretrain_on_ranks(ranks, whole)
    interrupt(ranks, keys, step=3)
    run = pretrain_on_ranks(ranks, keys)
    for name in ("step", "train/lm_loss", "train/grad_norm", "train/param_norm"):
        assert [record[name] for record in run] == [record[name] for record in reference]
    assert final_state(keys) == final_state(whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, zero(0)), (2, zero(3)), marks=pytest.mark.slow),
        ((2, zero(3)), (2, zero(1, parallel__pp_size=2))),
        pytest.param((4, zero(1, parallel__tp_size=2, parallel__pp_size=2)), (1, zero(0)), marks=pytest.mark.slow),
        pytest.param((2, zero(1)), (4, zero(2, parallel__tp_size=2)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_run_resumed_on_another_layout_goes_on_as_before(
    before: tuple[int, Keys], after: tuple[int, Keys], corpus: str, tmp_path: Path
) -> None:
    reference = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "whole", **ADAFACTOR, **SWIGLU))
    keys = run_keys(corpus, tmp_path / "parts", **ADAFACTOR, **SWIGLU, **before[1])
    interrupt(before[0], keys, step=3)
    run = pretrain_on_ranks(after[0], run_keys(corpus, tmp_path / "parts", **ADAFACTOR, **SWIGLU, **after[1]))
    assert len(run) == 6
    assert largest_difference(losses(run), losses(reference)) < TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < TOLERANCE


def test_checkpoint_holds_each_statistic_once_as_a_tensor_of_the_whole_model(corpus: str, tmp_path: Path) -> None:
    layout = zero(1, parallel__tp_size=2, train__stop_at_step=1)
    pretrain_on_ranks(4, run_keys(corpus, tmp_path, **ADAFACTOR, **SWIGLU, **layout))
    path = find_checkpoint(tmp_path / "checkpoints")
    assert path is not None
    reader = CheckpointReader(path)
    for name, shape in reader.shapes().items():
        if len(shape) == 2:
            matrices = num_matrices(name, is_gated=True)
            assert reader.logical("row", name).shape == (shape[0],)
            assert reader.logical("column", name).shape == ((matrices, shape[1]) if matrices > 1 else (shape[1],))
        else:
            assert reader.logical("second", name).shape == shape


@pytest.mark.parametrize(
    ("before", "after", "missing"),
    [
        ({}, ADAFACTOR, "holds no (row|second) of .*: its optimizer was AdamW"),
        (ADAFACTOR, {}, "holds no exp_avg of .*: its optimizer was Adafactor"),
        (
            ADAFACTOR,
            {**ADAFACTOR, "optim__adafactor_min_dim": 1000},
            "holds no second of .*: its optimizer was Adafactor",
        ),
    ],
    ids=["of adamw", "to adamw", "other min_dim"],
)
def test_checkpoint_of_another_state_is_refused(
    before: Keys, after: Keys, missing: str, corpus: str, tmp_path: Path
) -> None:
    before, after = copy.deepcopy((before, after))
    pretrain_on_ranks(1, run_keys(corpus, tmp_path, train__stop_at_step=1, **before))
    with pytest.raises(RankFailure, match=missing):
        pretrain_on_ranks(1, run_keys(corpus, tmp_path, **after))
