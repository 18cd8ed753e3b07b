"""Saving: behind the loop or in it the same files; what ranks verify together; which one a start takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lmscale.config.checkpoint_paths import LATEST, find_checkpoint
from lmscale.errors import CheckpointError
from lmscale.train.checkpoint_files import is_whole, read_manifest, stored_files
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import pretrain_in_rank, pretrain_on_ranks, records, run_keys

pytestmark = pytest.mark.distributed


def digests(checkpoint: Path) -> dict[str, str | None]:
    files = stored_files(read_manifest(checkpoint))
    return {name: file.sha256 for name, file in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"deepspeed__zero_optimization__stage": 2}),
        (2, {"parallel__tp_size": 2, "precision": "bf16", "deepspeed__zero_optimization__stage": 1}),
        pytest.param(2, {"parallel__pp_size": 2}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_written_behind_the_loop_is_the_state_of_its_step(ranks, changes, corpus, tmp_path):
    """The state moves on while it is written: the copy must not."""
    waits = run_keys(corpus, tmp_path / "waits", checkpoint__save_interval=2, checkpoint__keep=0, **changes)
    pretrain_on_ranks(ranks, waits)
    behind = run_keys(
        corpus,
        tmp_path / "behind",
        checkpoint__save_interval=2,
        checkpoint__keep=0,
        checkpoint__asynchronous=True,
        **changes,
    )
    run_ranks(ranks, _pretrain_with_slow_writes, behind)
    for step in (2, 4, 6):
        name = f"checkpoints/step-{step:08d}"
        assert digests(tmp_path / "waits" / name) == digests(tmp_path / "behind" / name)
    assert records(waits)[-1]["train/lm_loss"] == records(behind)[-1]["train/lm_loss"]


def _pretrain_with_slow_writes(keys) -> int:
    import time

    from lmscale.train import saving

    write = saving._write_slices

    def slowly(*arguments) -> None:
        time.sleep(0.3)
        write(*arguments)

    saving._write_slices = slowly
    try:
        return pretrain_in_rank(keys)
    finally:
        saving._write_slices = write


def damage(checkpoint: Path, name: str = "rank-00000.safetensors") -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[-1] ^= 1
    (checkpoint / name).write_bytes(content)


def test_every_rank_refuses_a_flipped_bit_in_another_ranks_file(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path, train__stop_at_step=1, checkpoint__keep=0, deepspeed__zero_optimization__stage=1)
    pretrain_on_ranks(2, keys)
    damage(tmp_path / "checkpoints/step-00000001", "rank-00001.safetensors")
    del keys["train"]["stop_at_step"]
    with pytest.raises(RankFailure) as caught:
        pretrain_on_ranks(2, keys)
    assert str(caught.value).count("holds no checkpoint that is whole") == 2
    assert "rank-00001.safetensors is not as it was written" in str(caught.value)


def test_a_start_falls_back_to_the_newest_that_is_whole_and_goes_on_as_the_run_would_have(corpus, tmp_path):
    whole = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "whole", deepspeed__zero_optimization__stage=1))
    keys = run_keys(
        corpus, tmp_path / "run", checkpoint__save_interval=1, checkpoint__keep=0, deepspeed__zero_optimization__stage=1
    )
    keys["train"]["stop_at_step"] = 4
    pretrain_on_ranks(2, keys)
    checkpoints = tmp_path / "run/checkpoints"
    damage(checkpoints / "step-00000004")
    (checkpoints / "step-00000003" / "rank-00001.json").unlink()
    (checkpoints / ".step-00000005.partial").mkdir()
    del keys["train"]["stop_at_step"]
    run = pretrain_on_ranks(2, keys)
    assert [record["step"] for record in run] == [1, 2, 3, 4, 5, 6]
    assert [record["train/lm_loss"] for record in run] == [record["train/lm_loss"] for record in whole]
    assert not (checkpoints / ".step-00000005.partial").exists()
    manifest = read_manifest(checkpoints / "step-00000006")
    assert manifest["resumed_from"]["step"] == 2
    assert manifest["resumed_from"]["checksum"] == read_manifest(checkpoints / "step-00000002")["checksum"]
    assert all(is_whole(checkpoints / f"step-{step:08d}") for step in range(1, 7))  # the damaged ones were replaced


def test_checkpoints_that_are_all_damaged_are_an_error_and_no_new_start(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path, checkpoint__save_interval=1, checkpoint__keep=0, train__stop_at_step=2)
    pretrain_on_ranks(1, keys)
    for step in (1, 2):
        damage(tmp_path / f"checkpoints/step-{step:08d}")
    keys["train"]["stop_at_step"] = 4
    with pytest.raises(
        RankFailure, match=r"holds no checkpoint that is whole: rank-00000\.safetensors is not as it was"
    ):
        pretrain_on_ranks(1, keys)
    assert [record["step"] for record in records(keys)] == [1, 2]


def test_a_crash_between_rename_and_latest_loses_nothing(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path, checkpoint__save_interval=2, train__stop_at_step=4)
    pretrain_on_ranks(1, keys)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / LATEST).write_text("step-00000002\n")
    assert find_checkpoint(checkpoints) == checkpoints / "step-00000002"
    del keys["train"]["stop_at_step"]
    assert [record["step"] for record in pretrain_on_ranks(1, keys)] == [1, 2, 3, 4, 5, 6]


def test_hosts_with_directories_of_their_own_keep_what_their_ranks_need(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path / "whole", deepspeed__zero_optimization__stage=1)
    whole = pretrain_on_ranks(2, keys)
    keys = run_keys(
        corpus,
        tmp_path / "run",
        deepspeed__zero_optimization__stage=1,
        checkpoint__save_interval=1,
        train__stop_at_step=3,
    )
    run_ranks(2, _pretrain_on_hosts, keys, str(tmp_path))
    directories = [tmp_path / f"host-{rank}" / "checkpoints" for rank in (0, 1)]
    for rank, checkpoints in enumerate(directories):
        newest = find_checkpoint(checkpoints)
        assert [file.name for file in newest.glob("rank-*.safetensors")] == [f"rank-0000{rank}.safetensors"]
        assert read_manifest(newest)["num_directories"] == 2
    shutil.rmtree(directories[1] / "step-00000003")  # one host has lost its newest: both take the one before
    del keys["train"]["stop_at_step"]
    run_ranks(2, _pretrain_on_hosts, keys, str(tmp_path))
    run = [json.loads(line) for line in (tmp_path / "host-0/metrics.jsonl").read_text().splitlines()]
    assert [record["train/lm_loss"] for record in run] == [record["train/lm_loss"] for record in whole]
    assert read_manifest(find_checkpoint(directories[1]))["resumed_from"]["step"] == 2


def _pretrain_on_hosts(keys, home: str) -> int:
    """Pretrain as a rank whose host has a directory and a name of its own."""
    import socket

    import torch.distributed as dist

    host = f"host-{dist.get_rank()}"
    name, socket.gethostname = socket.gethostname, lambda: host
    try:
        return pretrain_in_rank({**keys, "output_dir": f"{home}/{host}"})
    finally:
        socket.gethostname = name


def test_a_layout_that_one_hosts_directory_cannot_serve_is_refused(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path / "run", deepspeed__zero_optimization__stage=1, train__stop_at_step=2)
    run_ranks(2, _pretrain_on_hosts, keys, str(tmp_path))
    alone = run_keys(corpus, tmp_path / "host-1")
    with pytest.raises(RankFailure, match="holds what the ranks of one of 2 hosts need, and not for this layout"):
        pretrain_on_ranks(1, alone)


def test_ephemeral_and_permanent_checkpoints_and_the_command_for_each(corpus, tmp_path):
    seen = tmp_path / "seen"
    keys = run_keys(
        corpus,
        tmp_path / "run",
        checkpoint={
            "save_interval": 3,
            "keep": 1,
            "keep_every_steps": 3,
            "ephemeral_minutes": 1e-6,
            "on_saved": f'basename "$LMSCALE_CHECKPOINT" >> {seen}; test -f "$LMSCALE_CHECKPOINT/manifest.json"',
        },
    )
    pretrain_on_ranks(2, keys)
    checkpoints = tmp_path / "run/checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-00000003", "step-00000006"]
    assert seen.read_text().split() == [f"step-{step:08d}" for step in range(1, 7)]
    assert read_manifest(checkpoints / "step-00000003")["kind"] == "regular"


def test_a_checkpoint_reads_no_file_unseen(corpus, tmp_path):
    pretrain_on_ranks(1, run_keys(corpus, tmp_path, train__stop_at_step=1))
    path = find_checkpoint(tmp_path / "checkpoints")
    reader = CheckpointReader(path)
    damage(path)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors is not as it was written"):
        reader.logical(PARAMETER, next(iter(reader.shapes())))


def test_everything_is_on_disk_before_it_has_its_name(corpus, tmp_path):
    keys = run_keys(corpus, tmp_path, train__stop_at_step=1, deepspeed__zero_optimization__stage=1)
    flushed = [set(names) for names in run_ranks(2, _flushed_before_the_rename, keys)]
    checkpoint = find_checkpoint(tmp_path / "checkpoints")
    written = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*")} | {"."}
    assert flushed[0] | flushed[1] == written
    assert flushed[1] == {"rank-00001.safetensors", "rank-00001.json"}


def _flushed_before_the_rename(keys) -> list[str]:
    """Train, and list what this rank had flushed of the checkpoint when it was renamed."""
    import os

    fsync, rename, flushed, seen = os.fsync, Path.rename, [], []

    def noting(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        parts = path.parts
        partial = next((number for number, part in enumerate(parts) if part.endswith(".partial")), None)
        if partial is not None:
            flushed.append("/".join(parts[partial + 1 :]) or ".")
        fsync(descriptor)

    def renaming(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            seen.extend(flushed)
        return rename(path, target)

    os.fsync, Path.rename = noting, renaming
    try:
        pretrain_in_rank(keys)
    finally:
        os.fsync, Path.rename = fsync, rename
    return seen or flushed
