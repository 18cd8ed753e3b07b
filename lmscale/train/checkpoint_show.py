"""What can be said of a run's checkpoints from their files alone, without torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lmscale.config.checkpoint_paths import list_checkpoints, resolve_checkpoint
from lmscale.errors import CheckpointError
from lmscale.train.checkpoint_files import StoredFile, check_hashes, read_manifest, stored_files

_POINTERS = ("latest", "best")


@dataclass(frozen=True)
class Description:
    """What a checkpoint's manifest says; None where it cannot be read."""

    name: str
    pointers: tuple[str, ...]
    """Which of latest and best name it."""
    state: str
    """whole, or what is wrong. Hashes are not compared."""
    step: int | None = None
    tokens: int | None = None
    num_bytes: int | None = None
    num_files: int | None = None
    layout: str | None = None
    kind: str | None = None


def describe(path: Path) -> Description:
    """Describe a checkpoint by its manifest and the sizes of its files."""
    named = ((pointer, path.parent / pointer) for pointer in _POINTERS)
    pointers = tuple(pointer for pointer, file in named if file.is_file() and file.read_text().strip() == path.name)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Description(path.name, pointers, error.rule)
    files, layout = stored_files(manifest), manifest.get("layout", {})
    sizes = (f"{axis}{layout.get(f'{axis.lower()}_size', '?')}" for axis in ("TP", "PP", "DP"))
    return Description(
        path.name,
        pointers,
        "whole" if _has_hashes(files) else "whole, without hashes",
        step=manifest["progress"]["step"],
        tokens=manifest["progress"]["consumed_tokens"],
        num_bytes=sum(file.num_bytes for file in files.values()),
        num_files=len(files),
        layout=f"{' '.join(sizes)} ZeRO {layout.get('zero_stage', '?')}",
        kind=manifest.get("kind", "regular"),
    )


def checkpoints_under(path: Path) -> list[Path]:
    """List the checkpoints that a path means: all of a run or of its checkpoints/, or the one.

    Raises:
        CheckpointError: if there is none.
    """
    return list_checkpoints(path / "checkpoints") or list_checkpoints(path) or [resolve_checkpoint(path)]


@dataclass(frozen=True)
class Verified:
    """What the reading of a checkpoint's files has shown."""

    problems: list[CheckpointError]
    num_files: int
    num_bytes: int
    has_hashes: bool


def verify(
    path: Path, threads: int | None = None, advance: Callable[[int, int], None] = lambda done, total: None
) -> Verified:
    """Read every file of a checkpoint and compare it with its hash, the largest files first.

    Args:
        path: the checkpoint.
        threads: files read at a time; None takes the CPUs.
        advance: told the bytes of each file that is done, and of all.
    """
    try:
        files = stored_files(read_manifest(path))
    except CheckpointError as error:
        return Verified([error], 0, 0, False)
    total, problems = sum(file.num_bytes for file in files.values()), []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        largest_first = sorted(files.items(), key=lambda item: -item[1].num_bytes)
        for item, work in [(item, pool.submit(check_hashes, path, dict([item]))) for item in largest_first]:
            try:
                work.result()
            except CheckpointError as error:
                problems.append(error)
            advance(item[1].num_bytes, total)
    return Verified(problems, len(files), total, _has_hashes(files))


def _has_hashes(files: dict[str, StoredFile]) -> bool:
    return all(file.sha256 is not None for file in files.values())
