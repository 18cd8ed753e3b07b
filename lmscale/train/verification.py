"""Checking a checkpoint on all ranks together before anything is loaded, and choosing the one to resume from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from lmscale.config.checkpoint_paths import LATEST, list_checkpoints
from lmscale.errors import CheckpointError
from lmscale.train.checkpoint_files import check_hashes, read_manifest, stored_files
from lmscale.train.checkpoint_reader import CheckpointReader


def open_verified(path: Path, leaders: list[int]) -> CheckpointReader:
    """Open a checkpoint after its hashes were compared; the ranks that share a directory share the work.

    Args:
        path: the checkpoint.
        leaders: by rank, the lowest rank that sees the same directory.

    Raises:
        CheckpointError: on every rank, if a file is missing, torn or altered in any directory.
    Collectives: every rank must call.
    """
    problem = _agreed(_problem_here(path, leaders))
    if problem is not None:
        raise problem
    return CheckpointReader(path, is_verified=True)


def newest_good(checkpoints: Path, leaders: list[int], note: Callable[[str], None]) -> CheckpointReader | None:
    """Open the checkpoint of a run to resume from: the one that `latest` names, or the newest that is whole everywhere.

    Args:
        checkpoints: the run's directory of them.
        leaders: as of `open_verified`.
        note: told of each that is passed over, and why.

    Returns:
        None where there is none at all.

    Raises:
        CheckpointError: on every rank, if there are some and none is whole.
    Collectives: every rank must call.
    """
    names: list[list[str]] = [[] for _ in leaders]
    dist.all_gather_object(names, [path.name for path in list_checkpoints(checkpoints)])
    # Of hosts with directories of their own, one may have committed a step that another has not.
    candidates = [name for name in names[0] if all(name in others for others in names)]
    bad = []
    for name in candidates:
        try:
            reader = open_verified(checkpoints / name, leaders)
        except CheckpointError as error:
            bad.append(error)
            note(f"passed over: {error}")
            continue
        if bad or _differs_from_latest(checkpoints, name):
            note(f"resuming from {reader.path}, the newest that is whole")
        return reader
    if bad or any(names):
        raise CheckpointError(
            f"holds no checkpoint that is whole{f': {bad[0].rule}' if bad else ' on every host'}",
            field="checkpoint.resume",
            value=str(checkpoints),
            remedy="name a checkpoint by its path, or start anew in another output_dir",
        )
    return None


def _differs_from_latest(checkpoints: Path, name: str) -> bool:
    pointer = checkpoints / LATEST
    return pointer.is_file() and pointer.read_text().strip() != name


def _problem_here(path: Path, leaders: list[int]) -> CheckpointError | None:
    """Check this rank's share of a checkpoint's files."""
    rank = dist.get_rank()
    near = [other for other, leader in enumerate(leaders) if leader == leaders[rank]]
    try:
        files = stored_files(read_manifest(path))
        mine = sorted(files, key=lambda name: -files[name].num_bytes)[near.index(rank) :: len(near)]
        check_hashes(path, {name: files[name] for name in mine})
    except CheckpointError as error:
        return error
    return None


def _agreed(problem: CheckpointError | None) -> CheckpointError | None:
    problems: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found is not None), None)
