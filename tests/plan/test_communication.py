"""The planner's bytes on the wire are those that ranks over gloo send in a training step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lmscale.config.io import parse_run
from lmscale.plan.activations import StepShape
from lmscale.plan.communication import Traffic, step_traffic
from lmscale.plan.stages import stage_parameters
from tests.distributed.ranks import run_ranks
from tests.plan.counting import count_step

CONTROL_BYTES = 16
"""Norms, losses, overflow flags: what the planner leaves out."""
Layout = dict[str, Any]
WIDE = {"hidden_size": 384, "num_attention_heads": 6}
GATHERED_AGAIN = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
T5 = {
    "architecture": "t5",
    "head_dim": 8,
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "ffn_dropout"), 0.0),
}
BERT = {"architecture": "bert", "hidden_dropout": 0.0, "attention_dropout": 0.0}


def config_keys(layout: Layout) -> dict[str, Any]:
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 190,
            "max_position_embeddings": 32,
            **layout.get("model", {}),
        },
        "tokenizer": {"path": "unread"},
        "data": {"train": [{"prefix": "unread"}], "seq_length": 16, **layout.get("data", {})},
        "objective": layout.get("objective", {}),
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"lr": 1.0e-3},
        "train": {"train_tokens": 10_000},
        "parallel": {
            "tp_size": layout.get("tp", 1),
            "pp_size": layout.get("pp", 1),
            "sequence_parallel": layout.get("sp", False),
            "recompute": layout.get("recompute", "none"),
        },
        "precision": layout.get("precision", "fp32"),
        "deepspeed": {"zero_optimization": {"stage": layout.get("stage", 0), **layout.get("zero", {})}},
        "output_dir": "unwritten",
    }


def planned(layout: Layout, stage: int) -> list[Traffic]:
    config = parse_run(config_keys(layout))
    tp_size, pp_size = config.parallel.tp_size, config.parallel.pp_size
    dp_size = layout["ranks"] // (tp_size * pp_size)
    step = StepShape(
        config.lengths,
        2,
        8 // (2 * dp_size),
        tp_size,
        pp_size,
        config.parallel.sequence_parallel,
        config.parallel.recompute,
        config.precision,
    )
    return step_traffic(
        config.model,
        step,
        dp_size=dp_size,
        zero_stage=layout.get("stage", 0),
        stage=stage,
        num_parameters=stage_parameters(config.model, tp_size, pp_size)[stage],
    )


def by_axis(place: dict[str, Any], calls: list[tuple[str, tuple[int, ...], str, int, int]]) -> Counter[tuple[str, str]]:
    """Sum the counted bytes by axis and collective; what is received is what another rank sends."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, ranks, _, num_bytes, number in calls:
        if num_bytes <= CONTROL_BYTES or len(ranks) == 1 or kind == "recv":
            continue
        axes = {place["tp_group"]: "tensor", place["dp_group"]: "data"}
        axis = "pipeline" if kind == "send" else axes.get(ranks, "pipeline")
        found[axis, kind] += num_bytes * number
    return found


LAYOUTS: dict[str, Layout] = {
    "tp2": {"ranks": 2, "tp": 2},
    "tp2 sp zero1": {"ranks": 2, "tp": 2, "sp": True, "stage": 1},
    "dp2 zero0": {"ranks": 2},
    "dp2 zero1": {"ranks": 2, "stage": 1},
    "dp2 zero2": {"ranks": 2, "stage": 2},
    "dp2 zero3": {"ranks": 2, "stage": 3, "model": WIDE},
    "pp2": {"ranks": 2, "pp": 2},
    "tp2 pp2 sp bf16": {"ranks": 4, "tp": 2, "pp": 2, "sp": True, "stage": 1, "precision": "bf16"},
}
SLOW: dict[str, Layout] = {
    "dp2 zero1 bf16": {"ranks": 2, "stage": 1, "precision": "bf16"},
    "dp2 zero2 bf16": {"ranks": 2, "stage": 2, "precision": "bf16"},
    "dp2 zero3 bf16": {"ranks": 2, "stage": 3, "precision": "bf16", "model": WIDE},
    "tp2 recompute": {"ranks": 2, "tp": 2, "recompute": "full"},
    "tp2 sp recompute": {"ranks": 2, "tp": 2, "sp": True, "recompute": "full"},
    "tp2 pp2 zero1": {"ranks": 4, "tp": 2, "pp": 2, "stage": 1},
    "tp2 dp2 zero3": {"ranks": 4, "tp": 2, "stage": 3},
    "pp2 dp2 zero1": {"ranks": 4, "pp": 2, "stage": 1},
    "t5 tp2": {"ranks": 2, "tp": 2, "model": T5, "data": {"decoder_seq_length": 8}},
    "t5 tp2 sp": {"ranks": 2, "tp": 2, "sp": True, "model": T5, "data": {"decoder_seq_length": 8}},
    "t5 pp2": {"ranks": 2, "pp": 2, "model": T5, "data": {"decoder_seq_length": 8}},
    "bert tp2": {"ranks": 2, "tp": 2, "model": BERT, "objective": {"max_predictions": 4}},
    "bert tp2 sp": {"ranks": 2, "tp": 2, "sp": True, "model": BERT, "objective": {"max_predictions": 4}},
    "bert pp2": {"ranks": 2, "pp": 2, "model": BERT, "objective": {"max_predictions": 4}},
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS.values(), *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW.values())],
    ids=[*LAYOUTS, *SLOW],
)
def test_planned_bytes_are_the_counted_ones(layout: Layout) -> None:
    for place, calls in run_ranks(layout["ranks"], count_step, config_keys(layout)):
        expected: Counter[tuple[str, str]] = Counter()
        for message in planned(layout, place["pp_rank"]):
            expected[message.axis, message.collective] += message.num_bytes
        assert by_axis(place, calls) == expected


@pytest.mark.distributed
def test_zero3_gathers_for_backward_again_where_nothing_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    layout: Layout = {"ranks": 2, "stage": 3, "model": WIDE}
    monkeypatch.setattr("lmscale.plan.communication.REUSED_ELEMENTS", 0)
    expected = sum(message.num_bytes for message in planned(layout, 0) if message.collective == "all_gather")
    for place, calls in run_ranks(2, count_step, config_keys({**layout, "zero": GATHERED_AGAIN})):
        assert by_axis(place, calls)["data", "all_gather"] == expected


def test_a_ring_sends_an_all_reduce_twice_but_for_one_part() -> None:
    message = Traffic("data", "all_reduce", 800, 4, "gradients")
    assert message.wire_bytes == 2 * 3 / 4 * 800
    assert Traffic("data", "all_gather", 800, 4, "parameters").wire_bytes == 3 / 4 * 800
    assert Traffic("pipeline", "send", 800, 4, "forward").wire_bytes == 800


def test_zero3_gathers_again_what_is_far_away() -> None:
    config = parse_run({**config_keys({"ranks": 1}), "model": {"preset": "gpt3-6.7b"}})
    parameters = stage_parameters(config.model, 1, 1)[0]
    step = StepShape(config.lengths, 1, 3)
    messages = step_traffic(config.model, step, dp_size=8, zero_stage=3, num_parameters=parameters)
    gathered = sum(message.num_bytes for message in messages if message.collective == "all_gather")
    # Forward and backward of three micro batches, less the last half billion elements of each.
    assert gathered == pytest.approx(2 * 3 * (2 * parameters - 0.5e9), rel=0.01)
