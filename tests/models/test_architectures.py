"""Every architecture trains alike on every kind of layout: hand-made batches through the engine, no data pipeline."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import largest_difference
from tests.models.batches import make_batch

pytestmark = pytest.mark.distributed

VOCAB, LENGTH = 190, 16
MICRO, GLOBAL, STEPS = 2, 8, 3
TOLERANCE = 1.0e-5
"""Relative, of losses and gradient norms: fp32 sums in another order."""
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {"architecture": "bert", "num_layers": 4},
    "roberta": {"architecture": "roberta", "num_layers": 4},
    "bart": {"architecture": "bart"},
    "t5": {"architecture": "t5", "head_dim": 6},
    "t5-v1.1": {"architecture": "t5", "activation": "geglu", "tied_head": False, "scaled_logits": False},
}
Ranks = dict[str, Any]
LAYOUTS: dict[str, Ranks] = {
    "tp2": {"ranks": 2, "tp": 2},
    "tp2-sp": {"ranks": 2, "tp": 2, "sp": True},
    "pp2": {"ranks": 2, "pp": 2, "stage": 1},
    "pp4": {"ranks": 4, "pp": 4, "stage": 0},
    "tp2-sp-pp2": {"ranks": 4, "tp": 2, "pp": 2, "sp": True, "stage": 1},
    "dp2-zero1": {"ranks": 2, "stage": 1},
    "dp2-zero2": {"ranks": 2, "stage": 2},
    "dp2-zero3-recompute": {"ranks": 2, "stage": 3, "recompute": "full"},
    "recompute-full": {"ranks": 1, "recompute": "full"},
    "recompute-selective": {"ranks": 1, "recompute": "selective"},
}


def config_keys(model: dict[str, Any], layout: Ranks, dropout: float) -> dict[str, Any]:
    """Make the config of a run on hand-made batches."""
    chances = dict.fromkeys(("hidden_dropout", "attention_dropout", "ffn_dropout"), dropout)
    return {
        "model": {**SIZES, **chances, **model},
        "tokenizer": {"path": "unread"},
        "data": {"train": [{"prefix": "unread"}], "seq_length": LENGTH},
        "batch": {"micro_batch_size": MICRO, "global_batch_size": GLOBAL},
        "optim": {"lr": 1.0e-2, "name": "sgd"},
        "train": {"train_tokens": 10_000},
        "parallel": {
            "tp_size": layout.get("tp", 1),
            "pp_size": layout.get("pp", 1),
            "sequence_parallel": layout.get("sp", False),
            "recompute": layout.get("recompute", "none"),
        },
        "deepspeed": {"zero_optimization": {"stage": layout.get("stage", 0)}},
        "output_dir": "unwritten",
    }


def train_in_rank(keys: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Train some steps and return losses and gradient norms."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.plan.params import num_parameters
    from lmscale.pretrain import build_engine

    config = parse_run(keys)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    stage = keys["deepspeed"]["zero_optimization"]["stage"]
    engine = build_engine(config, topology, ZeroChoice(stage=stage))
    if topology.world_size == 1:
        assert sum(p.numel() for p in engine.model.parameters()) == num_parameters(config.model, padded=True)
    num = GLOBAL // (MICRO * topology.dp_size)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        batch = make_batch(config.model.architecture, step, rows=GLOBAL, vocab_size=VOCAB)
        starts = [(m * topology.dp_size + topology.dp_rank) * MICRO for m in range(num)]
        micro = [{name: array[start : start + MICRO] for name, array in batch.items()} for start in starts]
        result = engine.train_step(micro if engine.reads_data else [], num, step, 1.0e-2)
        losses.append(float(result.loss))
        norms.append(result.grad_norm)
    return losses, norms


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, float], tuple[list[float], list[float]]]:
    """What one rank computes, by architecture and dropout."""
    return {}


QUICK = ("tp2-sp-pp2", "dp2-zero3-recompute", "pp4")
"""Between them every axis; `make test-all` runs the others."""


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_losses_and_norms_are_those_of_one_rank(architecture: str, layout: str, references: dict[Any, Any]) -> None:
    chosen = LAYOUTS[layout]
    is_whole = ("tp" not in chosen and chosen["ranks"] != 2) or layout == "pp4"
    dropout = 0.1 if is_whole else 0.0  # data- and tensor-parallel ranks draw other masks on purpose
    key = architecture, dropout
    if key not in references:
        (references[key],) = run_ranks(1, train_in_rank, config_keys(MODELS[architecture], {}, dropout))
    keys = config_keys(MODELS[architecture], chosen, dropout)
    for losses, norms in run_ranks(chosen["ranks"], train_in_rank, keys):
        assert largest_difference(losses, references[key][0]) < TOLERANCE
        assert largest_difference(norms, references[key][1]) < TOLERANCE
