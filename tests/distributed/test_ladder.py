"""Every layout trains to the same numbers: one rank, ZeRO 0 is the reference for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.distributed.runs import (
    LLAMA,
    Keys,
    largest_difference,
    losses,
    norms,
    pretrain_on_ranks,
    run_keys,
)

pytestmark = pytest.mark.distributed

FP32_TOLERANCE = 1.0e-5
"""Relative, losses and gradient norms over 6 steps in fp32: sums in another order, nothing else."""
PARAMETER_TOLERANCE = 1.0e-6
"""Absolute, weights of size 0.02 after 6 steps of SGD."""
ADAM_TOLERANCE = 0.02
"""Of the summed rate, which is how far Adam moves a weight at most: it divides a gradient by its own size, and a small one's
rounding with it. The key third of a QKV bias has no gradient in exact arithmetic: its rounding moves it by the whole rate,
so that bias is left out."""
HALF_TOLERANCE = {"bf16": 2.0e-3, "fp16": 5.0e-4}
"""Relative, losses against fp32 over 6 steps: one rounding of an activation is 2^-9 in bf16, 2^-12 in fp16, and the
losses start near log(500) = 6.2 for every layout."""
HALF_NORM_TOLERANCE = {"bf16": 2.0e-2, "fp16": 3.0e-3}
"""Relative, gradient norms against fp32: gradients are rounded as well as what they are computed from."""


def layout(ranks: int, stage: int = 0, *, slow: bool = False, **parallel: Any) -> Any:
    """Name a layout after its parts, for pytest. `make test` runs a pairwise cover of the axes, `make test-all` all."""
    changes = {f"parallel__{key}": value for key, value in parallel.items()}
    name = "-".join([f"{ranks}ranks", *(f"{key}={value}" for key, value in parallel.items()), f"zero{stage}"])
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(ranks, {**changes, "deepspeed__zero_optimization__stage": stage}, id=name, marks=marks)


SP = {"sequence_parallel": True}
LAYOUTS = [
    *(layout(1, stage) for stage in (1, 2, 3)),
    *(layout(2, stage) for stage in (0, 1, 2, 3)),
    *(layout(2, stage, tp_size=2, slow=stage in (0, 3)) for stage in (0, 1, 2, 3)),
    *(layout(2, stage, tp_size=2, slow=stage == 1, **SP) for stage in (0, 1, 2, 3)),
    *(layout(2, stage, pp_size=2) for stage in (0, 1)),
    *(layout(4, stage, tp_size=2, slow=stage in (1, 2)) for stage in (0, 1, 2, 3)),
    *(layout(4, stage, pp_size=2, slow=stage == 1) for stage in (0, 1)),
    *(layout(4, stage, tp_size=2, pp_size=2, slow=stage == 1) for stage in (0, 1)),
    layout(4, 1, tp_size=2, pp_size=2, **SP),
    layout(4, 1, pp_size=4, slow=True),
    layout(4, 1, tp_size=4, slow=True, **SP),
    layout(1, 0, recompute="selective"),
    layout(1, 0, recompute="full", slow=True),
    layout(1, 3, recompute="selective", slow=True),
    layout(1, 3, recompute="full"),
    *(
        layout(2, 1, pp_size=2, recompute=recompute, slow=recompute == "selective")
        for recompute in ("selective", "full")
    ),
    *(
        layout(2, 2, tp_size=2, recompute=recompute, slow=recompute == "full", **SP)
        for recompute in ("selective", "full")
    ),
]
PAIRWISE = [
    (1, 3, {"recompute": "full"}),
    (2, 1, {"pp_size": 2}),
    (2, 0, {"pp_size": 2}),
    (2, 2, {"tp_size": 2, **SP}),
    (2, 3, {}),
    (4, 1, {"tp_size": 2, "pp_size": 2, "recompute": "selective", **SP}),
    (4, 3, {"tp_size": 2, "recompute": "full"}),
]
HALF = [
    layout(1, 2),
    layout(2, 3),
    layout(2, 1, tp_size=2, **SP),
    layout(2, 1, pp_size=2),
    layout(4, 1, tp_size=2, pp_size=2, slow=True),
    layout(4, 2, tp_size=2, recompute="full", slow=True),
]
VARIANTS: dict[str, Keys] = {
    "gpt": {},
    "llama": {"model": dict(LLAMA)},
    "isolated": {"data__reset_attention_mask": True},
    "isolated-llama": {"model": dict(LLAMA), "data__reset_attention_mask": True},
}
QUICK_VARIANTS = {"llama": (1, 3, 5), "isolated": (0, 2, 5), "isolated-llama": (1, 4, 6)}
"""Which of PAIRWISE `make test` runs for each variant."""
VARIANT_LAYOUTS = [
    pytest.param(
        variant,
        *layout(ranks, stage, **parallel).values,
        id=f"{variant}-{number}",
        marks=[] if number in quick else [pytest.mark.slow],
    )
    for variant, quick in QUICK_VARIANTS.items()
    for number, (ranks, stage, parallel) in enumerate(PAIRWISE)
]


class References:
    """One-rank ZeRO-0 runs, trained once for each variant."""

    def __init__(self, corpus: str, directory: Path):
        self._corpus, self._directory = corpus, directory
        self._runs: dict[str, tuple[Keys, list[Keys]]] = {}

    def get(self, name: str, **changes: Any) -> tuple[Keys, list[Keys]]:
        if name not in self._runs:
            keys = run_keys(self._corpus, self._directory / name, **changes)
            self._runs[name] = keys, pretrain_on_ranks(1, keys)
        return self._runs[name]


@pytest.fixture(scope="module")
def references(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(corpus, tmp_path_factory.mktemp("references"))


def assert_same(run: list[Keys], reference: list[Keys]) -> None:
    assert largest_difference(losses(run), losses(reference)) < FP32_TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < FP32_TOLERANCE
    tag = "valid/tokens/lm_loss"
    assert run[-1][tag] == pytest.approx(reference[-1][tag], rel=FP32_TOLERANCE)
    assert run[-1]["train/param_norm"] == pytest.approx(reference[-1]["train/param_norm"], rel=FP32_TOLERANCE)


@pytest.mark.parametrize(("ranks", "changes"), LAYOUTS)
def test_gpt_trains_alike_on_every_layout(
    ranks: int, changes: Keys, corpus: str, tmp_path: Path, references: References
) -> None:
    run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path, **changes))
    assert_same(run, references.get("gpt")[1])


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [layout(1, 0), layout(1, 1), layout(2, 1, slow=True), layout(2, 1, tp_size=2, slow=True, **SP)],
)
def test_pipeline_of_one_stage_is_the_sequential_model_bit_for_bit(
    ranks: int, changes: Keys, corpus: str, tmp_path: Path
) -> None:
    changes = {**changes, "model__hidden_dropout": 0.1}
    sequential, pipeline = (
        pretrain_on_ranks(ranks, run_keys(corpus, tmp_path / name, **changes), pipeline=name == "pipeline")
        for name in ("sequential", "pipeline")
    )
    assert losses(pipeline) == losses(sequential)
    assert norms(pipeline) == norms(sequential)
    assert pipeline[-1]["train/param_norm"] == sequential[-1]["train/param_norm"]
    # DeepSpeed sums the held-out losses of micro batches in fp32, and we in fp64.
    tag = "valid/tokens/lm_loss"
    assert pipeline[-1][tag] == pytest.approx(sequential[-1][tag], rel=FP32_TOLERANCE)


@pytest.mark.parametrize(("variant", "ranks", "changes"), VARIANT_LAYOUTS)
def test_variants_train_alike_on_a_pairwise_cover(
    variant: str, ranks: int, changes: Keys, corpus: str, tmp_path: Path, references: References
) -> None:
    run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path, **VARIANTS[variant], **changes))
    assert_same(run, references.get(variant, **VARIANTS[variant])[1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("ranks", "changes"), HALF)
def test_half_precision_stays_near_fp32_on_every_layout(
    ranks: int, changes: Keys, precision: str, corpus: str, tmp_path: Path, references: References
) -> None:
    run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path, precision=precision, **changes))
    reference = references.get("gpt")[1]
    assert largest_difference(losses(run), losses(reference)) < HALF_TOLERANCE[precision]
    assert largest_difference(norms(run), norms(reference)) < HALF_NORM_TOLERANCE[precision]


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_one_micro_batch_or_many_train_alike(
    micro_batch_size: int, corpus: str, tmp_path: Path, references: References
) -> None:
    run = pretrain_on_ranks(1, run_keys(corpus, tmp_path, batch__micro_batch_size=micro_batch_size))
    assert_same(run, references.get("gpt")[1])


@pytest.mark.parametrize(
    ("ranks", "stage", "offload"),
    [(1, 1, "optimizer"), (2, 2, "optimizer"), (2, 3, "optimizer"), (2, 3, "param")],
)
def test_offload_to_the_host_trains_alike(
    ranks: int, stage: int, offload: str, corpus: str, tmp_path: Path, references: References
) -> None:
    zero: Keys = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    if offload == "param":
        zero["offload_param"] = {"device": "cpu"}
    keys = run_keys(corpus, tmp_path, deepspeed={"zero_optimization": zero})
    assert_same(pretrain_on_ranks(ranks, keys, timeout_s=290.0), references.get("gpt")[1])


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [layout(2, 0, pp_size=2), layout(2, 3), layout(2, 1, tp_size=2, **SP), layout(4, 1, tp_size=2, pp_size=2)],
)
def test_parameters_agree_under_sgd(
    ranks: int, changes: Keys, corpus: str, tmp_path: Path, references: References
) -> None:
    # Not under Adam: the key third of a QKV bias has a gradient that is zero in exact arithmetic, and Adam divides its
    # rounding by itself.
    sgd = {"optim__name": "sgd", "optim__lr": 0.1}
    reference_keys, reference = references.get("sgd", **sgd)
    keys = run_keys(corpus, tmp_path, **sgd, **changes)
    assert_same(pretrain_on_ranks(ranks, keys), reference)
    ours, theirs = (
        CheckpointReader(find_checkpoint(Path(k["output_dir"], "checkpoints"))) for k in (keys, reference_keys)
    )
    assert ours.shapes() == theirs.shapes()
    for name in theirs.shapes():
        torch.testing.assert_close(
            ours.logical(PARAMETER, name), theirs.logical(PARAMETER, name), rtol=0, atol=PARAMETER_TOLERANCE
        )


@pytest.mark.parametrize(("ranks", "changes"), [layout(2, 3), layout(4, 1, tp_size=2, pp_size=2)])
def test_parameters_agree_under_adam_but_for_key_biases(
    ranks: int, changes: Keys, corpus: str, tmp_path: Path, references: References
) -> None:
    reference_keys, _ = references.get("gpt")
    keys = run_keys(corpus, tmp_path, **changes)
    pretrain_on_ranks(ranks, keys)
    ours, theirs = (
        CheckpointReader(find_checkpoint(Path(k["output_dir"], "checkpoints"))) for k in (keys, reference_keys)
    )
    farthest = ADAM_TOLERANCE * 6 * keys["optim"]["lr"]
    for name in theirs.shapes():
        if name.endswith("linear_qkv.bias"):
            continue
        torch.testing.assert_close(
            ours.logical(PARAMETER, name), theirs.logical(PARAMETER, name), rtol=0, atol=farthest, msg=name
        )


def test_tensor_and_pipeline_parallel_zero1_follows_one_rank_for_fifty_steps(corpus: str, tmp_path: Path) -> None:
    length = {"train__train_tokens": 50 * 8 * 32}
    reference = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "one", **length))
    run = pretrain_on_ranks(
        4,
        run_keys(
            corpus,
            tmp_path / "four",
            parallel={"tp_size": 2, "pp_size": 2},
            deepspeed__zero_optimization__stage=1,
            **length,
        ),
    )
    assert len(run) == 50
    assert largest_difference(losses(run), losses(reference)) < FP32_TOLERANCE
