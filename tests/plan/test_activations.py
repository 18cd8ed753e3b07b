"""Activations by the planner's formulas against what torch's graph keeps of our layers, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.config.presets import preset, with_defaults
from lmscale.plan.activations import StepShape, activation_bytes, korthikanti_bytes, saved_bytes
from lmscale.plan.stages import PlannedLayer, planned_layers
from tests.distributed.ranks import run_ranks
from tests.plan.saved import LENGTH, SIZES, TARGETS, count_saved, step_shape

TOLERANCE = 0.001
"""The issue is memory, not bytes; what is left out is the next-sentence loss's few numbers."""
LLAMA = {
    "activation": "swiglu",
    "normalization": "rmsnorm",
    "position_embedding": "rope",
    "linear_bias": False,
    "num_query_groups": 2,
    "tied_head": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": LLAMA,
    "bert": {"architecture": "bert"},
    "roberta": {"architecture": "roberta"},
    "bart": {"architecture": "bart"},
    "t5": {"architecture": "t5"},
    "t5-v1.1": {"architecture": "t5", "activation": "geglu", "tied_head": False, "scaled_logits": False},
}
DROPOUTS: dict[str, dict[str, float]] = {
    "none": {},
    "hidden": {"hidden_dropout": 0.1},
    "all": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "ffn_dropout": 0.1},
}
"""Without attention's dropout a CPU takes the flash kernel, with it the math kernel; t5's self attention always."""
RECOMPUTES = ("none", "selective", "full")


def expected_of(model_keys: dict[str, Any], step_keys: dict[str, Any]) -> tuple[int, int]:
    """Return what the formulas say of (embedding and layers, logits)."""
    model = ModelConfig.model_validate(with_defaults({**SIZES, **model_keys}))
    step = step_shape(model.architecture, **step_keys)
    saved = saved_bytes(model, step, planned_layers(model))
    if model.architecture == "t5" and step.recompute == "selective":
        # The recomputation holds the bias of relative positions by itself, out of the graph's sight.
        pairs = LENGTH * LENGTH + TARGETS * TARGETS
        saved["layers"] -= pairs * step.micro_batch_size * model.num_attention_heads // step.tp_size * 4
    return saved["embedding"] + saved["layers"], saved["logits"]


def check(world_size: int, cases: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for results in run_ranks(world_size, count_saved, cases):
        for case, counted in zip(cases, results, strict=True):
            body, logits = expected_of(*case)
            assert body == pytest.approx(counted["embedding"] + counted["layers"], rel=TOLERANCE), case
            assert logits == pytest.approx(counted["logits"], rel=TOLERANCE), case


@pytest.mark.parametrize("name", MODELS)
def test_saved_tensors_are_those_of_the_formulas(name: str) -> None:
    check(
        1,
        [
            ({**MODELS[name], **dropout}, {"recompute": recompute, "micro_batch_size": rows})
            for dropout in DROPOUTS.values()
            for recompute in RECOMPUTES
            for rows in ((1, 2) if recompute == "none" else (2,))
        ],
    )


def test_packed_documents_keep_their_mask_and_a_pipeline_its_joined_memory() -> None:
    check(
        1,
        [
            ({}, {"has_mask": True}),
            (LLAMA, {"has_mask": True}),
            (MODELS["bart"], {"pp_size": 2}),
            (MODELS["t5"], {"pp_size": 2}),
        ],
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_keeps_its_keys_and_values_and_a_mask(name: str) -> None:
    check(
        1,
        [
            ({**MODELS[name], **DROPOUTS[dropout]}, {"prefix_length": 8, "recompute": recompute, **more})
            for dropout, recompute, more in (
                ("none", "none", {}),
                ("none", "none", {"micro_batch_size": 1}),
                ("all", "none", {"prefix_dropout": True}),
                ("none", "full", {}),
                ("none", "selective", {}),
            )
        ],
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("gpt", "t5") else [pytest.mark.slow]) for n in MODELS]
)
def test_tensor_and_sequence_parallel_ranks_keep_their_part(name: str) -> None:
    check(
        2,
        [
            ({**MODELS[name], **DROPOUTS[dropout]}, {"recompute": recompute, "tp_size": 2, "sequence_parallel": split})
            for dropout, recompute in (("none", "none"), ("none", "selective"), ("none", "full"), ("all", "none"))
            for split in (False, True)
        ],
    )


GPT3 = ModelConfig(**{**preset("gpt3-13b"), "hidden_dropout": 0.1, "attention_dropout": 0.1})


def layer_bytes(**keys: Any) -> tuple[int, int]:
    """Return ours and the published count of one layer of GPT-3 13B in bf16."""
    step = StepShape(SampleLengths(2049, 2048, 0, 2048), 4, 1, **keys)
    return saved_bytes(GPT3, step, [PlannedLayer("layer")])["layers"], korthikanti_bytes(GPT3, step)


@pytest.mark.parametrize("tp_size", [1, 8])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_korthikantis_formula_is_ours_where_the_kernel_keeps_no_scores(tp_size: int, sequence_parallel: bool) -> None:
    # They recompute the core attention selectively; a fused kernel does so always, and keeps 4 bytes a query for it.
    step = {"tp_size": tp_size, "sequence_parallel": sequence_parallel}
    ours, _ = layer_bytes(**step)
    _, theirs = layer_bytes(**step, recompute="selective")
    assert ours == pytest.approx(theirs, rel=0.005)


def test_korthikantis_full_recompute_leaves_a_layers_input() -> None:
    ours, theirs = layer_bytes(recompute="full")
    assert ours == theirs == 2 * 4 * 2048 * 5120


def test_1f1b_keeps_the_micro_batches_of_the_stages_behind() -> None:
    step = StepShape(SampleLengths(2049, 2048, 0, 2048), 1, 3, pp_size=8)
    layers = [activation_bytes(GPT3, step, stage)["layers"] for stage in range(8)]
    one = layers[6] // 2
    assert layers[:6] == [3 * one] * 6  # three micro batches in all
    assert layers[6] == 2 * one
    logits = [activation_bytes(GPT3, step, stage)["logits"] for stage in range(8)]
    assert logits[:7] == [0] * 7
    assert logits[7] == 2048 * (5120 + 50304) * 2
