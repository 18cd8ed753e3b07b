"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.resilience import STOP_FILE
from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import (
    GPT,
    Keys,
    final_state,
    largest_difference,
    losses,
    norms,
    pretrain_in_rank,
    pretrain_on_ranks,
    records,
    run_keys,
)

pytestmark = pytest.mark.distributed

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
RAMP = {"batch__ramp": {"start": 4, "increment": 4, "ramp_samples": 12}, "train__train_tokens": 40 * 32}
OTHER_LAYOUT_TOLERANCE = 1.0e-5
"""Relative, fp32: as between layouts that never stopped."""


def zero(stage: int, **more: Any) -> Keys:
    return {"deepspeed__zero_optimization__stage": stage, **more}


def interrupt(ranks: int, keys: Keys, step: int) -> None:
    keys["train"]["stop_at_step"] = step
    pretrain_on_ranks(ranks, keys)
    del keys["train"]["stop_at_step"]


def same_bits(run: list[Keys], reference: list[Keys]) -> bool:
    kept = ("step", "consumed_tokens", "train/lm_loss", "train/grad_norm", "train/param_norm", "train/loss_scale")
    return [[r.get(k) for k in kept] for r in run] == [[r.get(k) for k in kept] for r in reference]


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit_with_offload(corpus: str, tmp_path: Path) -> None:
    # test_resume_bitwise.py has the layouts and precisions.
    changes = {**zero(1, deepspeed__zero_optimization__offload_optimizer={"device": "cpu"}), **DROPOUT, **RAMP}
    whole, keys = (run_keys(corpus, tmp_path / name, **changes) for name in ("whole", "parts"))
    reference = pretrain_on_ranks(1, whole)
    interrupt(1, keys, step=2)
    assert same_bits(records(keys), reference[:2])
    run = pretrain_on_ranks(1, keys)
    assert [record["step"] for record in run] == [1, 2, 3, 4, 5, 6, 7]
    assert [record["train/global_batch_size"] for record in run] == [4, 4, 4, 8, 8, 8, 8]
    assert same_bits(run, reference)
    assert final_state(keys) == final_state(whole)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((1, zero(0)), (2, zero(3)), marks=pytest.mark.slow),
        ((2, zero(3)), (2, zero(1, parallel__pp_size=2))),
        pytest.param((4, zero(1, parallel__tp_size=2, parallel__pp_size=2)), (1, zero(0)), marks=pytest.mark.slow),
        pytest.param((2, zero(1, parallel__pp_size=2)), (2, zero(2, parallel__tp_size=2)), marks=pytest.mark.slow),
        ((2, zero(2, parallel__tp_size=2)), (4, zero(1, parallel__tp_size=2, parallel__pp_size=2))),
    ],
    ids=str,
)
def test_run_resumed_on_another_layout_goes_on_as_before(
    before: tuple[int, Keys], after: tuple[int, Keys], corpus: str, tmp_path: Path
) -> None:
    swiglu = {"model__activation": "swiglu"}  # its first matrix is two blocks under tensor parallelism
    reference = pretrain_on_ranks(1, run_keys(corpus, tmp_path / "whole", **swiglu))
    keys = run_keys(corpus, tmp_path / "parts", **swiglu, **before[1])
    interrupt(before[0], keys, step=3)
    run = pretrain_on_ranks(after[0], run_keys(corpus, tmp_path / "parts", **swiglu, **after[1]))
    assert len(run) == 6
    assert largest_difference(losses(run), losses(reference)) < OTHER_LAYOUT_TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < OTHER_LAYOUT_TOLERANCE


def test_stop_file_saves_and_returns_its_own_status(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path)
    statuses = run_ranks(2, _pretrain_and_ask_to_stop, keys)
    assert statuses == [EXIT_INTERRUPTED_AND_SAVED] * 2
    assert not (tmp_path / STOP_FILE).exists()
    assert len(records(keys)) == 1
    assert pretrain_on_ranks(2, keys)[-1]["step"] == 6


def _pretrain_and_ask_to_stop(keys: Keys) -> int:
    from lmscale.train import loop

    step = loop._step

    def step_and_ask(run: Any, *rest: Any) -> Any:
        Path(keys["output_dir"], STOP_FILE).touch()  # asked for during the first step, seen after it
        return step(run, *rest)

    loop._step = step_and_ask
    try:
        return pretrain_in_rank(keys)
    finally:
        loop._step = step


def test_newest_checkpoints_are_kept_and_latest_names_the_last(corpus: str, tmp_path: Path) -> None:
    pretrain_on_ranks(1, run_keys(corpus, tmp_path, checkpoint={"save_interval": 1, "keep": 2}))
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000005", "step-00000006"]
    assert find_checkpoint(checkpoints) == checkpoints / "step-00000006"


def test_init_from_takes_the_weights_and_nothing_else(corpus: str, tmp_path: Path) -> None:
    source = run_keys(corpus, tmp_path / "source")
    pretrain_on_ranks(1, source)
    keys = run_keys(corpus, tmp_path / "target", model__init_from=source["output_dir"], train__stop_at_step=1)
    run = pretrain_on_ranks(2, keys)
    assert run[0]["step"] == 1
    assert run[0]["train/lm_loss"] < records(source)[0]["train/lm_loss"]
    reader = CheckpointReader(find_checkpoint(tmp_path / "target" / "checkpoints"))
    assert reader.manifest["optimizer"]["step"] == 1


def test_checkpoint_of_another_model_is_refused(corpus: str, tmp_path: Path) -> None:
    source = run_keys(corpus, tmp_path / "source", train__stop_at_step=1)
    pretrain_on_ranks(1, source)
    other = {**GPT, "hidden_size": 64, "init_from": source["output_dir"]}
    with pytest.raises(RankFailure, match=r"is of another model: \S+ is \(.*\) there and \(.*\) here"):
        pretrain_on_ranks(1, run_keys(corpus, tmp_path / "target", model=other))


def test_truncated_checkpoint_is_refused_by_name(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path, train__stop_at_step=1)
    pretrain_on_ranks(1, keys)
    file = tmp_path / "checkpoints" / "step-00000001" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    del keys["train"]["stop_at_step"]
    with pytest.raises(RankFailure, match=r"rank-00000\.safetensors has \d+ bytes of \d+"):
        pretrain_on_ranks(1, keys)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_is_told_and_the_run_goes_on(asynchronous: bool, corpus: str, tmp_path: Path) -> None:
    keys = run_keys(
        corpus, tmp_path, checkpoint__save_interval=2, checkpoint__asynchronous=asynchronous, train__log_interval=1
    )
    run_ranks(2, _pretrain_on_a_disk_that_fills_up, keys, 2)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000006"]
    assert CheckpointReader(find_checkpoint(checkpoints)).progress.step == 6
    assert records(keys)[-1]["checkpoint/failed_saves"] == 1


@pytest.mark.parametrize("changes", [{"checkpoint__on_failure": "stop"}, {"checkpoint__save_interval": 3}])
def test_full_disk_ends_the_run_where_it_should_or_at_the_last_save(changes: Keys, corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path, **{"checkpoint__save_interval": 2, **changes})
    with pytest.raises(RankFailure, match=r"could not be written: rank 0: .*No space left"):
        run_ranks(2, _pretrain_on_a_disk_that_fills_up, keys, 2)
    checkpoints = tmp_path / "checkpoints"
    kept = f"step-{keys['checkpoint']['save_interval']:08d}"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", kept]
    assert find_checkpoint(checkpoints) == checkpoints / kept


def _pretrain_on_a_disk_that_fills_up(keys: Keys, when: int) -> int:
    """Pretrain where the when-th save of rank 0 finds the disk full."""
    import errno
    import os

    import torch.distributed as dist

    from lmscale.train import saving

    write = saving._write_slices
    saves = []

    def fill_up(stem: Path, *arguments: Any) -> None:
        saves.append(stem)
        if len(saves) == when and dist.get_rank() == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(stem, *arguments)

    saving._write_slices = fill_up
    try:
        return pretrain_in_rank(keys)
    finally:
        saving._write_slices = write


def test_directory_that_cannot_be_written_is_told_by_every_rank(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").mkdir(parents=True)  # root may write anywhere, but not there
    with pytest.raises(RankFailure) as caught:
        run_ranks(2, pretrain_in_rank, keys)
    assert str(caught.value).count("OutputError: output_dir = ") == 2


def test_manifest_says_what_made_the_run(corpus: str, tmp_path: Path) -> None:
    pretrain_on_ranks(2, run_keys(corpus, tmp_path, parallel__tp_size=2, train__stop_at_step=1))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["layout"] == {"world_size": 2, "tp_size": 2, "pp_size": 1, "dp_size": 1, "zero_stage": 0}
    assert list(manifest["data"]) == [corpus]
    assert manifest["versions"]["deepspeed"].startswith("0.19")
