"""What lmscale.train.engine mends in DeepSpeed: each of these fails where the mend is taken out or DeepSpeed changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import Keys, largest_difference, losses, norms, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed

FP16_NORM_TOLERANCE = 5.0e-3
"""Relative to fp32; a step unscaled with the wrong scale is off by 0.5."""
FP16_MOVE_TOLERANCE = 0.05
"""Of the distance that SGD moves the weights; one of four steps at half its size would be 0.125 off."""
BATCH_TOLERANCE = 1.0e-5


def zero(stage: int, **more: Any) -> Keys:
    return {"deepspeed__zero_optimization__stage": stage, **more}


def weights(keys: Keys) -> dict[str, Any]:
    reader = CheckpointReader(find_checkpoint(Path(keys["output_dir"], "checkpoints")))
    return {name: reader.logical(PARAMETER, name) for name in reader.shapes()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_step_in_which_the_loss_scale_doubles_has_its_full_size(stage: int, corpus: str, tmp_path: Path) -> None:
    sgd = {"optim__name": "sgd", "optim__lr": 0.5, "optim__lr_warmup_tokens": 0, "optim__weight_decay": 0.0}
    sgd |= {"optim__max_grad_norm": 0.0, "optim__lr_decay_style": "constant"}
    start, plain, scaled = (run_keys(corpus, tmp_path / name, **sgd) for name in ("start", "plain", "scaled"))
    start["optim"]["lr"] = 1.0e-30
    for keys in (start, plain, scaled):
        keys["train"]["stop_at_step"] = 4
    scaled["precision"], scaled["loss_scale"] = "fp16", {"initial": 256, "window": 3}
    scaled["deepspeed"]["zero_optimization"]["stage"] = stage
    pretrain_on_ranks(1, start)
    reference, run = pretrain_on_ranks(1, plain), pretrain_on_ranks(1, scaled)
    assert [record["train/loss_scale"] for record in run] == [256.0, 256.0, 256.0, 256.0]
    assert largest_difference(norms(run), norms(reference)) < FP16_NORM_TOLERANCE
    first, theirs, ours = weights(start), weights(plain), weights(scaled)
    moved = math.sqrt(sum(float((theirs[n] - first[n]).square().sum()) for n in first))
    apart = math.sqrt(sum(float((theirs[n] - ours[n]).square().sum()) for n in first))
    assert apart < FP16_MOVE_TOLERANCE * moved


@pytest.mark.parametrize("stage", [1, 3])
def test_overflow_skips_the_update_and_consumes_the_data(stage: int, corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path, **zero(stage, precision="fp16", loss_scale={"initial": 2**30, "hysteresis": 1}))
    run = pretrain_on_ranks(2, keys)
    skipped = run[-1]["train/skipped_steps"]
    assert skipped > 0
    assert [record["consumed_tokens"] for record in run] == [256 * step for step in range(1, 7)]
    assert run[0]["train/grad_norm"] is None  # not finite, which JSON cannot say
    assert run[0]["train/param_norm"] == run[1]["train/param_norm"]
    reader = CheckpointReader(find_checkpoint(tmp_path / "checkpoints"))
    assert reader.progress.skipped_steps == skipped
    assert reader.manifest["optimizer"]["step"] == 6 - skipped


def test_overflow_at_the_lowest_loss_scale_stops_the_run(corpus: str, tmp_path: Path) -> None:
    scale = {"initial": 2**40, "minimum": 2**40, "hysteresis": 1}
    with pytest.raises(RankFailure, match="gradients overflow at the lowest loss scale"):
        pretrain_on_ranks(1, run_keys(corpus, tmp_path, **zero(1, precision="fp16", loss_scale=scale)))


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(1, zero(1)), (1, zero(2)), (1, zero(3)), (2, zero(1)), (2, zero(1, parallel__pp_size=2))],
    ids=str,
)
def test_batch_ramp_steps_at_the_right_micro_batch(ranks: int, changes: Keys, corpus: str, tmp_path: Path) -> None:
    ramp = {"batch__ramp": {"start": 4, "increment": 4, "ramp_samples": 12}, "batch__global_batch_size": 12}
    ramp["train__train_tokens"] = 64 * 32
    reference = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "reference", **ramp))
    run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path / "run", **ramp, **changes))
    assert [record["train/global_batch_size"] for record in run] == [4, 4, 8, 12, 12, 12, 12]
    assert largest_difference(losses(run), losses(reference)) < BATCH_TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < BATCH_TOLERANCE


def test_deepspeed_itself_reports_no_gradient_norm_under_zero0() -> None:
    assert run_ranks(1, _norm_by_deepspeed) == [None]


def _norm_by_deepspeed() -> Any:
    import deepspeed
    import torch

    from lmscale.parallel.topology import init_topology

    mpu = init_topology(1, 1).mpu
    model = torch.nn.Linear(4, 4)
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "steps_per_print": 10**9}
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    return engine.get_global_grad_norm()


def test_dropout_is_the_same_for_every_pipeline_and_recompute(corpus: str, tmp_path: Path) -> None:
    dropout = {"model__hidden_dropout": 0.2, "model__attention_dropout": 0.2}
    reference = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "reference", **dropout))
    for number, (ranks, changes) in enumerate(
        [
            (1, {"parallel__recompute": "full"}),
            (1, {"parallel__recompute": "selective"}),
            (1, zero(3, parallel__recompute="full")),
            (2, zero(1, parallel__pp_size=2)),
        ]
    ):
        run = pretrain_on_ranks(ranks, run_keys(corpus, tmp_path / str(number), **dropout, **changes))
        assert largest_difference(losses(run), losses(reference)) < BATCH_TOLERANCE, changes
    plain = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "plain"))
    assert largest_difference(losses(plain), losses(reference)) > 100 * BATCH_TOLERANCE
