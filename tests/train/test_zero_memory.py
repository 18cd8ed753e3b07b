"""The bytes of parameters, gradients and optimizer state on each of two ranks are those of the formula.

Counted on the tensors that DeepSpeed holds, gradients after the first of two micro batches. What deviates, within the
2 %: padding of flat buffers, and under ZeRO 3 biases and norms, which stay whole on every rank.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.config.optim import OptimConfig
from lmscale.errors import ConfigError
from lmscale.plan.activations import StepShape
from lmscale.plan.memory import StateBytes, device_bytes, moment_width, zero_bytes
from lmscale.plan.names import parameter_shapes
from lmscale.plan.stages import stage_parameters
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

RANKS = 2
TOLERANCE = 0.02
MODEL = {
    "num_layers": 6,
    "hidden_size": 384,
    "num_attention_heads": 6,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}
NUM_PARAMETERS = 14_186_496
LENGTH = 8


def optim_keys(name: str) -> dict[str, Any]:
    more: dict[str, dict[str, Any]] = {
        "sgd": {"sgd_momentum": 0.9},
        "muon": {"muon_precision": "fp32"},  # bf16 products are slow on a CPU
        "adafactor-whole": {"adafactor_min_dim": 512},  # above the width: no matrix is factored
    }
    return {"name": name.partition("-")[0], "lr": 1.0e-3, **more.get(name, {})}


def held_bytes(
    stage: int,
    precision: str,
    optimizer: str = "adamw",
    tp_size: int = 1,
    pp_size: int = 1,
    groups: list[dict[str, Any]] | None = None,
) -> tuple[int, StateBytes, StateBytes, StateBytes]:
    """Train a step of two micro batches; return the parameters, the bytes between the two, those after it, and of a watch.

    A pipeline's gradients are looked at behind the last micro batch, before they are reduced.
    """
    import torch

    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.memory import StateWatch, describe_state, state_bytes

    keys: dict[str, Any] = {
        "model": MODEL,
        "data": {"train": [{"prefix": "unread"}], "seq_length": LENGTH},
        "precision": precision,
        "parallel": {"tp_size": tp_size, "pp_size": pp_size},
        "batch": {"micro_batch_size": 1, "global_batch_size": 2 * RANKS // (tp_size * pp_size)},
        "optim": {**optim_keys(optimizer), "groups": groups or []},
        "train": {"train_tokens": 1000},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "output_dir": "unwritten",
    }
    if precision == "fp16":
        keys["loss_scale"] = {"initial": 1}  # nothing overflows, so the first step updates and makes the moments
    config = parse_run(keys)
    engine = build_engine(config, init_topology(tp_size, pp_size), ZeroChoice(stage=stage))
    looks: list[StateBytes] = []

    def look_at(name: str, before: bool) -> None:
        method = getattr(engine.deepspeed, name)

        def call(*args: Any, **kwargs: Any) -> None:
            if before:
                looks.append(state_bytes(engine))
            method(*args, **kwargs)
            if not before:
                looks.append(state_bytes(engine))

        setattr(engine.deepspeed, name, call)

    if pp_size == 1:
        look_at("step", before=False)
    else:
        reduce = "_bf16_reduce_grads" if engine.deepspeed.using_bf16_optimizer else "allreduce_gradients"
        look_at(reduce, before=True)
        look_at("_take_model_step", before=False)
    watch = StateWatch(engine)
    tokens = torch.zeros(1, LENGTH, dtype=torch.int64)
    batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(1, LENGTH)}
    engine.train_step([batch, batch] if engine.reads_data else [], 2, 1, 1.0e-3)
    watched = watch.finish()
    line, values = describe_state(engine, watched, config)
    assert values["memory/optimizer_bytes"] >= watched.optimizer
    assert line.startswith("memory of a rank, bytes a parameter: parameters ")
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    return num_parameters, looks[0], looks[1], watched


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (0, "fp32"),
        (1, "fp32"),
        (2, "fp32"),
        (3, "fp32"),
        (1, "bf16"),
        (2, "bf16"),
        (3, "bf16"),
        (1, "fp16"),
        (3, "fp16"),
    ],
)
def test_each_rank_holds_what_the_formula_says(stage: int, precision: str) -> None:
    expected = zero_bytes(NUM_PARAMETERS, RANKS, stage, precision)
    for num_parameters, between, after, watched in run_ranks(RANKS, held_bytes, stage, precision):
        assert num_parameters == NUM_PARAMETERS
        assert after.parameters == pytest.approx(expected.parameters, rel=TOLERANCE)
        assert between.gradients == pytest.approx(expected.gradients, rel=TOLERANCE)
        assert after.optimizer == pytest.approx(expected.optimizer, rel=TOLERANCE)
        for kind in ("parameters", "gradients", "optimizer"):
            assert getattr(watched, kind) == pytest.approx(getattr(expected, kind), rel=TOLERANCE), kind


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(1, "bf16"), pytest.param(0, "fp32", marks=pytest.mark.slow), pytest.param(3, "bf16", marks=pytest.mark.slow)],
)
def test_frozen_parameters_take_neither_gradients_nor_optimizer_state(stage: int, precision: str) -> None:
    frozen = sum(math.prod(shape) for name, shape in parameter_shapes(ModelConfig(**MODEL)).items() if "mlp" in name)
    expected = zero_bytes(NUM_PARAMETERS, RANKS, stage, precision, num_trainable=NUM_PARAMETERS - frozen)
    assert frozen > NUM_PARAMETERS // 4
    groups = [{"name": "frozen", "match": "*.mlp.*", "frozen": True}]
    for *_, watched in run_ranks(RANKS, held_bytes, stage, precision, "adamw", 1, 1, groups):
        for kind in ("parameters", "gradients", "optimizer"):
            assert getattr(watched, kind) == pytest.approx(getattr(expected, kind), rel=TOLERANCE), kind


@pytest.mark.parametrize(
    ("stage", "precision", "tp_size", "pp_size"),
    [(0, "fp32", 2, 1), (2, "bf16", 2, 1), (3, "bf16", 2, 1), (0, "fp32", 1, 2), (1, "fp32", 1, 2), (1, "bf16", 1, 2)],
)
def test_each_stage_holds_what_the_plan_says(stage: int, precision: str, tp_size: int, pp_size: int) -> None:
    model = ModelConfig(**MODEL)
    shape = StepShape(
        SampleLengths(LENGTH + 1, LENGTH, 0, LENGTH), 1, 2, tp_size=tp_size, pp_size=pp_size, precision=precision
    )
    measured = run_ranks(RANKS, held_bytes, stage, precision, "adamw", tp_size, pp_size)
    for rank, (num_parameters, between, after, _) in enumerate(measured):
        pipeline_stage = rank if pp_size > 1 else 0
        assert num_parameters == stage_parameters(model, tp_size, pp_size)[pipeline_stage]
        expected = device_bytes(model, shape, dp_size=1, zero_stage=stage, stage=pipeline_stage)
        assert after.parameters == pytest.approx(expected.parameters, rel=TOLERANCE)
        assert between.gradients == pytest.approx(expected.gradients, rel=TOLERANCE)
        assert after.optimizer == pytest.approx(expected.optimizer, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "stage", "precision"),
    [
        ("adafactor", 0, "fp32"),
        ("adafactor-whole", 1, "bf16"),
        ("muon", 1, "bf16"),
        ("lion", 3, "fp32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("adafactor", 1, "bf16"),
                ("adafactor", 3, "fp32"),
                ("muon", 3, "fp32"),
                ("sgd", 2, "fp32"),
                ("adam", 0, "fp32"),
            )
        ),
    ],
)
def test_each_optimizer_keeps_its_moments_and_no_more(name: str, stage: int, precision: str) -> None:
    width = moment_width(OptimConfig.model_validate(optim_keys(name)), ModelConfig(**MODEL))
    expected = zero_bytes(NUM_PARAMETERS, RANKS, stage, precision, moment_width=width)
    for _, _, after, watched in run_ranks(RANKS, held_bytes, stage, precision, name):
        assert watched.optimizer == after.optimizer
        assert after.optimizer == pytest.approx(expected.optimizer, rel=TOLERANCE)


def test_moments_by_optimizer_are_those_of_the_table() -> None:
    model = ModelConfig(**MODEL)
    widths = {
        name: moment_width(OptimConfig.model_validate(optim_keys(name)), model)
        for name in ("adamw", "adam", "lion", "sgd", "adafactor-whole")
    }
    assert widths == {"adamw": 8.0, "adam": 8.0, "lion": 4.0, "sgd": 4.0, "adafactor-whole": 4.0}
    h = 384
    layer = (3 * h + 3 * h) + (h + h) + 2 * (4 * h + h)  # queries, keys and values have columns of their own
    vectors = 6 * (3 + 1 + 4 + 1 + 4) * h + 2 * h
    factored = 6 * layer + (8192 + h) + (1024 + h) + vectors
    adafactor = moment_width(OptimConfig.model_validate(optim_keys("adafactor")), model)
    assert adafactor * NUM_PARAMETERS == pytest.approx(4 * factored)
    matrices = 6 * (4 + 8) * 384**2
    muon = moment_width(OptimConfig.model_validate(optim_keys("muon")), model)
    assert muon * NUM_PARAMETERS == pytest.approx(4 * matrices + 8 * (NUM_PARAMETERS - matrices))
    assert moment_width(OptimConfig(name="sgd", lr=1.0), model) == 0.0


def test_formula_agrees_with_the_papers_example() -> None:
    # 7.5 billion parameters over 64 ranks: 31.4 GB, 16.6 GB and 1.9 GB (table 1 of the ZeRO paper, with K = 12).
    paper = {1: 31.4e9, 2: 16.6e9, 3: 1.9e9}
    for stage, total in paper.items():
        assert zero_bytes(7_500_000_000, 64, stage, "fp16").total == pytest.approx(total, rel=0.02)


def test_half_precision_without_zero_has_no_formula() -> None:
    with pytest.raises(ConfigError, match="precision = 'bf16'"):
        zero_bytes(10, 1, 0, "bf16")
