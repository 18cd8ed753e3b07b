"""What every method of adaptation keeps to, on every architecture and layout. A method is a line in METHODS.

`make test` runs a pairwise cover: each method on two layouts, each layout and architecture with several methods.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.adapt_rules import check_adaptation
from lmscale.config.check import check_run
from lmscale.config.io import parse_run
from lmscale.config.run import ZeroChoice
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.groups import check_groups
from lmscale.plan.lora import check_targets
from tests.adapt.bases import STEPS, Bases
from tests.adapt.watch import adapt_and_look
from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import Keys, largest_difference, losses, norms, pretrain_on_ranks
from tests.distributed.test_ladder import FP32_TOLERANCE, HALF_NORM_TOLERANCE, HALF_TOLERANCE

pytestmark = pytest.mark.distributed

HALF_OF_TEXT = 2.0
"""T5's embeddings are N(0, 1), and roundings as much larger: see HALF_TOLERANCE of tests/distributed/test_objectives.py."""


@dataclass(frozen=True)
class Case:
    """A method to hold to the contract."""

    adapt: Keys
    exact: Keys | None = field(default_factory=dict)
    """Keys with which it starts as the base exactly; None where it cannot."""
    holds_itself: bool = True
    """Its checkpoints hold the adaptation alone."""
    shapes: tuple[str, ...] = ("gpt", "llama", "bert", "roberta", "bart", "t5")
    """Where it has a meaning."""


def adapter(variant: str, **keys: Any) -> Case:
    """Describe adapters that do something from the start; with zero_up they do not."""
    drawn = {"init": "normal", "init_std": 0.1, **keys}
    return Case({"method": "adapter", "variant": variant, "width": 6, **drawn}, {"init": "zero_up", "init_std": None})


_BIASED = ("gpt", "bert", "roberta", "bart")
METHODS: dict[str, Case] = {
    "lora": Case({"method": "lora", "rank": 4, "bias": "none", "dropout": 0.1}, {"dropout": 0.0}),
    "lora-all": Case(
        {"method": "lora", "rank": 4, "targets": ["qkv", "proj", "fc1", "fc2", "embedding"], "rslora": True}
    ),
    "houlsby": adapter("houlsby"),
    "pfeiffer": adapter("pfeiffer"),
    "parallel": adapter("parallel", scale=2.0),
    "bitfit": Case({"method": "bitfit"}, shapes=_BIASED),
    "bitfit-query": Case({"method": "bitfit", "which": "query_fc1"}, shapes=_BIASED),
    "full": Case({"method": "full", "layer_decay": 0.8}, holds_itself=False),
    "full-top": Case({"method": "full", "top_layers": 1}, holds_itself=False),
}


def on(ranks: int, stage: int = 0, **changes: Any) -> tuple[int, Keys]:
    return ranks, {"deepspeed__zero_optimization__stage": stage, **changes}


TP, PP, SP = {"parallel__tp_size": 2}, {"parallel__pp_size": 2}, {"parallel__sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2": on(2, **TP),
    "tp2-sp": on(2, **TP, **SP),
    "pp2": on(2, **PP),
    "tp2-pp2-zero1": on(4, 1, **TP, **PP),
    "tp2-pp2-sp": on(4, 0, **TP, **PP, **SP),
    "tp2-zero2-sp": on(2, 2, **TP, **SP),
    "dp2-zero1": on(2, 1),
    "dp2-zero2": on(2, 2),
    "dp2-zero3": on(2, 3),
    "recompute-full": on(1, 0, parallel__recompute="full"),
    "recompute-selective": on(1, 0, parallel__recompute="selective"),
    "zero3-recompute-full": on(1, 3, parallel__recompute="full"),
    "one-micro-batch": on(1, 0, batch__micro_batch_size=8),
}
QUICK = {
    ("lora", "gpt", "tp2-zero2-sp"),
    ("lora", "llama", "dp2-zero3"),
    ("lora", "gpt", "one-micro-batch"),
    ("lora-all", "llama", "tp2-sp"),
    ("lora-all", "gpt", "pp2"),
    ("lora-all", "t5", "tp2-pp2-zero1"),
    ("houlsby", "bert", "tp2-sp"),
    ("houlsby", "gpt", "recompute-full"),
    ("pfeiffer", "roberta", "dp2-zero3"),
    ("pfeiffer", "llama", "tp2"),
    ("parallel", "bart", "tp2-pp2-zero1"),
    ("parallel", "gpt", "zero3-recompute-full"),
    ("bitfit", "bert", "tp2"),
    ("bitfit", "gpt", "dp2-zero2"),
    ("bitfit-query", "gpt", "tp2-sp"),
    ("bitfit-query", "bart", "pp2"),
    ("full", "t5", "dp2-zero1"),
    ("full", "gpt", "recompute-selective"),
    ("full-top", "gpt", "pp2"),
    ("full-top", "llama", "tp2-pp2-sp"),
}
COVER = [
    pytest.param(
        method,
        shape,
        layout,
        id=f"{method}, {shape}, {layout}",
        marks=[] if (method, shape, layout) in QUICK else [pytest.mark.slow],
    )
    for method, case in METHODS.items()
    for shape in case.shapes
    for layout in LAYOUTS
]


def each_with(*pairs: tuple[str, str], of: tuple[str, ...] = tuple(METHODS)) -> list[Any]:
    """Pair methods with all of their architectures; `make test` runs the given pairs."""
    return [
        pytest.param(method, shape, marks=[] if (method, shape) in pairs else [pytest.mark.slow])
        for method in of
        for shape in METHODS[method].shapes
    ]


EXACT = tuple(method for method, case in METHODS.items() if case.exact is not None)
TEXT = ("bert", "roberta", "bart", "t5")


@pytest.mark.parametrize(
    ("method", "shape"),
    each_with(
        ("lora", "llama"), ("lora-all", "gpt"), ("houlsby", "bert"), ("pfeiffer", "roberta"), ("parallel", "t5"),
        ("bitfit", "bart"), ("bitfit-query", "gpt"), of=EXACT,
    ),
)  # fmt: skip
def test_an_untrained_adaptation_computes_what_its_base_does(
    method: str, shape: str, bases: Bases, tmp_path: Path
) -> None:
    adapt = {**METHODS[method].adapt, **(METHODS[method].exact or {})}
    first = pretrain_on_ranks(1, bases.keys(shape, tmp_path, adapt, train__stop_at_step=1))
    assert losses(first)[0] == losses(bases.reference("full", shape, METHODS["full"].adapt))[0]


@pytest.mark.parametrize(
    ("method", "shape"),
    each_with(
        ("lora", "gpt"), ("lora-all", "t5"), ("houlsby", "bert"), ("pfeiffer", "gpt"), ("parallel", "llama"),
        ("bitfit", "roberta"), ("bitfit-query", "gpt"), ("full", "llama"), ("full-top", "bart"),
    ),
)  # fmt: skip
def test_only_what_a_method_declares_gets_gradients_and_moves(
    method: str, shape: str, bases: Bases, tmp_path: Path
) -> None:
    keys = bases.keys(shape, tmp_path, METHODS[method].adapt)
    (seen,) = run_ranks(1, adapt_and_look, keys)
    adaptation = adaptation_of(parse_run(keys))
    assert adaptation is not None
    everything = set(adaptation.shapes())
    trained = {name for name in everything if adaptation.trains(name)}
    assert seen.frozen == everything - trained
    assert seen.with_gradients == trained
    assert seen.moved == trained
    assert seen.is_base_whole
    if METHODS[method].holds_itself:
        manifest = json.loads((_newest(tmp_path) / "manifest.json").read_text())
        stored = json.loads(next(_newest(tmp_path).glob("rank-*.json")).read_text())
        assert {piece["name"] for piece in stored["pieces"]} == trained
        assert Path(manifest["base"]["path"]) == Path(bases.path(shape))


@pytest.mark.parametrize(("method", "shape", "layout"), COVER)
def test_every_layout_adapts_as_one_rank_does(
    method: str, shape: str, layout: str, bases: Bases, tmp_path: Path
) -> None:
    # Dropout is drawn apart on ranks that hold apart tensors: without it layouts are the same.
    adapt = _without_dropout(METHODS[method].adapt)
    ranks, changes = LAYOUTS[layout]
    run = pretrain_on_ranks(ranks, bases.keys(shape, tmp_path, adapt, **changes))
    reference = bases.reference(method, shape, adapt)
    assert len(run) == STEPS
    assert largest_difference(losses(run), losses(reference)) < FP32_TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < FP32_TOLERANCE
    assert run[-1]["train/param_norm"] == pytest.approx(reference[-1]["train/param_norm"], rel=FP32_TOLERANCE)


HALF_RATE = {"optim__lr": 1.0e-3}
"""At the others' 0.01 Adam takes a rounding that turns a sign of a small gradient to losses apart by 2e-3, in fp16 too."""
SMOOTH = {"activation": "gelu"}
"""A rounding takes some of relu's inputs past 0, and gradients with them: 4 % of their norm in bf16."""
HALF = {
    ("lora", "gpt", "fp16"): on(2, 1),
    ("houlsby", "bert", "bf16"): on(2, 1, **PP),
    ("bitfit", "gpt", "bf16"): on(2, 1, **TP),
    ("lora-all", "gpt", "bf16"): on(2, 1, **PP),
    ("full-top", "gpt", "fp16"): on(1, 2),
    ("parallel", "llama", "bf16"): on(2, 3),
}


@pytest.mark.parametrize(("method", "shape", "precision"), HALF, ids=lambda value: value)
def test_half_precision_stays_near_fp32(method: str, shape: str, precision: str, bases: Bases, tmp_path: Path) -> None:
    adapt = _without_dropout(METHODS[method].adapt)
    adapt |= SMOOTH if adapt["method"] == "adapter" else {}
    ranks, changes = HALF[method, shape, precision]
    # Nothing overflows at 1024, so that no step is skipped.
    scale = {"loss_scale": {"initial": 1024}} if precision == "fp16" else {}
    run = pretrain_on_ranks(
        ranks, bases.keys(shape, tmp_path / precision, adapt, precision=precision, **scale, **HALF_RATE, **changes)
    )
    reference = pretrain_on_ranks(1, bases.keys(shape, tmp_path / "fp32", adapt, **HALF_RATE))
    more = HALF_OF_TEXT if shape in TEXT else 1.0
    assert largest_difference(losses(run), losses(reference)) < more * HALF_TOLERANCE[precision]
    assert largest_difference(norms(run), norms(reference)) < more * HALF_NORM_TOLERANCE[precision]


RESUMES: dict[str, tuple[str, tuple[int, Keys], tuple[int, Keys]]] = {
    "lora": ("gpt", on(1), on(1)),
    "lora-all": ("gpt", on(2, **PP), on(2, **PP)),
    "houlsby": ("bert", on(2, 3), on(2, 3)),
    "bitfit-query": ("gpt", on(2, 1, **TP), on(2, 1, **TP)),
    "full-top": ("llama", on(2, 2), on(2, 2)),
    "pfeiffer": ("roberta", on(1), on(1)),
    "parallel": ("bart", on(1, 1), on(1, 1)),
    "bitfit": ("bert", on(1), on(1)),
    "full": ("gpt", on(1), on(1)),
}
QUICK_RESUMES = ("lora", "houlsby", "bitfit-query", "full-top")
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in QUICK_RESUMES else [pytest.mark.slow]) for m in RESUMES]
)
def test_a_resumed_adaptation_repeats_the_uninterrupted_one(method: str, bases: Bases, tmp_path: Path) -> None:
    shape, (ranks, before), (_, after) = RESUMES[method]

    def keys(name: str, **changes: Any) -> Keys:
        return bases.keys(shape, tmp_path / name, METHODS[method].adapt, model=dict(DROPOUT), **changes)

    whole = pretrain_on_ranks(ranks, keys("whole", **before))
    pretrain_on_ranks(ranks, keys("parts", **{**before, "train__stop_at_step": 2}))
    run = pretrain_on_ranks(ranks, keys("parts", **after))
    for name in ("step", "train/lm_loss", "train/grad_norm", "train/param_norm"):
        assert [record[name] for record in run] == [record[name] for record in whole]


@pytest.mark.parametrize("method", ["lora", pytest.param("houlsby", marks=pytest.mark.slow)])
def test_an_adaptation_moves_to_another_layout_and_not_to_another_base(
    method: str, bases: Bases, tmp_path: Path
) -> None:
    adapt = _without_dropout(METHODS[method].adapt)
    pretrain_on_ranks(1, bases.keys("gpt", tmp_path, adapt, train__stop_at_step=2))
    other = bases.keys("gpt, another", tmp_path / "other", adapt, checkpoint__resume=str(_newest(tmp_path)))
    with pytest.raises(RankFailure, match="belongs to another base"):
        pretrain_on_ranks(1, other)
    ranks, changes = on(2, 1, **TP)
    run = pretrain_on_ranks(ranks, bases.keys("gpt", tmp_path, adapt, **changes))
    reference = bases.reference(method, "gpt", adapt)
    assert len(run) == STEPS
    assert largest_difference(losses(run), losses(reference)) < FP32_TOLERANCE


@pytest.mark.parametrize("method", ["lora-all", pytest.param("pfeiffer", marks=pytest.mark.slow)])
def test_compiled_layers_adapt_as_the_others_do(method: str, bases: Bases, tmp_path: Path) -> None:
    run = pretrain_on_ranks(1, bases.keys("gpt", tmp_path, METHODS[method].adapt, train__compile=True))
    reference = bases.reference(method, "gpt", METHODS[method].adapt)
    assert largest_difference(losses(run), losses(reference)) < FP32_TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < FP32_TOLERANCE


def test_backward_ends_at_the_lowest_trained_layer(bases: Bases, tmp_path: Path) -> None:
    (top,) = run_ranks(1, adapt_and_look, bases.keys("gpt", tmp_path / "top", METHODS["full-top"].adapt))
    assert top.reached == {"layers.3"}
    (lora,) = run_ranks(1, adapt_and_look, bases.keys("gpt", tmp_path / "lora", METHODS["lora"].adapt))
    assert lora.reached == {f"layers.{index}" for index in range(4)}


def test_an_adaptation_of_t5_by_biases_is_refused(bases: Bases, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapt.method = 'bitfit': the model's layers have no biases"):
        check_run(parse_run(bases.keys("t5", tmp_path, {"method": "bitfit"})), ZeroChoice(), 1)


def test_several_adaptations_need_zero_0(bases: Bases, tmp_path: Path) -> None:
    changes = {"optim__name": "sgd", "optim__weight_decay": 0.0, "optim__max_grad_norm": 0.0}
    config = parse_run(bases.keys("gpt", tmp_path, {"method": "lora", "entries": 3}, **changes))
    check_adaptation(config, ZeroChoice(stage=0))
    with pytest.raises(ConfigError, match=r"adapt.entries = 3: .* need ZeRO 0, and the stage is 1"):
        check_adaptation(config, ZeroChoice(stage=1))


def test_a_rule_may_not_freeze_what_an_adaptation_trains(bases: Bases, tmp_path: Path) -> None:
    changes = {"optim__groups": [{"name": "a", "match": "*.lora.*.a", "frozen": True}]}
    config = parse_run(bases.keys("gpt", tmp_path, METHODS["lora"].adapt, **changes))
    with pytest.raises(ConfigError, match=r"optim.groups.0.match = '\*.lora.\*.a': freezes layers.0.*\.a, which the"):
        check_groups(config.model, config.optim, adaptation_of(config))
    of_base = config.optim.model_copy(
        update={"groups": [config.optim.groups[0].model_copy(update={"match": "*.weight"})]}
    )
    check_groups(config.model, of_base, adaptation_of(config))


def test_every_method_of_the_contract_is_valid(bases: Bases, tmp_path: Path) -> None:
    for case in METHODS.values():
        config = parse_run(bases.keys(case.shapes[0], tmp_path, case.adapt))
        check_run(config, ZeroChoice(stage=0), 1)
        if config.adapt is not None and config.adapt.method == "lora":
            check_targets(config.model, config.adapt)


def _newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def _without_dropout(adapt: Keys) -> Keys:
    return {**adapt, "dropout": 0.0} if "dropout" in adapt else adapt
