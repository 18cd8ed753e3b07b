"""Where checkpoints are. No torch: a config may take its model from one."""

from __future__ import annotations

from pathlib import Path

from lmscale.errors import CheckpointError

LATEST = "latest"


def step_directory(checkpoints: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return checkpoints / f"step-{step:08d}"


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """List a run's checkpoints, the one to resume from first: `latest`, those before it from new to old, those after it.

    A checkpoint after `latest` is of a course that was given up (the run was resumed from an earlier one), or was
    committed when the run died before it could say so.
    """
    found = sorted((path for path in checkpoints.glob("step-*") if path.is_dir()), reverse=True)
    latest = _latest(checkpoints)
    if latest is None:
        return found
    return [path for path in found if path.name <= latest] + [path for path in found if path.name > latest]


def find_checkpoint(checkpoints: Path) -> Path | None:
    """Return the checkpoint of a run that `latest` names, or the newest where there is no `latest`; None without any.

    Raises:
        CheckpointError: if `latest` names one that is not there.
    """
    latest, found = _latest(checkpoints), list_checkpoints(checkpoints)
    if latest is not None and not (checkpoints / latest).is_dir():
        others = f", such as {found[0]}" if found else ""
        raise CheckpointError(
            "names a checkpoint that does not exist",
            field=str(checkpoints / LATEST),
            value=latest,
            remedy=f"name one{others}",
        )
    return found[0] if found else None


def _latest(checkpoints: Path) -> str | None:
    pointer = checkpoints / LATEST
    return pointer.read_text().strip() if pointer.is_file() else None


def resolve_checkpoint(path: Path) -> Path:
    """Take a checkpoint's directory, or the newest of a run's directory or of its checkpoints/.

    Raises:
        CheckpointError: if there is none.
    """
    if not path.is_dir():
        raise CheckpointError("does not exist", field="checkpoint", value=str(path))
    for directory in (path / "checkpoints", path):
        newest = find_checkpoint(directory)
        if newest is not None:
            return newest
    if (path / "manifest.json").is_file():
        return path
    raise CheckpointError("holds no checkpoint", field="checkpoint", value=str(path))


def tokenizer_copy(checkpoint: Path, original: str) -> Path:
    """Return the copy of a tokenizer that a checkpoint carries: a file or a directory, as the original was."""
    copy = checkpoint / "tokenizer"
    file = copy / Path(original).name
    return file if file.is_file() else copy
