"""Which checkpoints stay, which one `latest` names, and what a crash has left behind. On the leader of a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from lmscale.config.checkpoint_paths import LATEST
from lmscale.monitor.atomic import replaced
from lmscale.train.checkpoint_files import MANIFEST, flush

REGULAR, EPHEMERAL = "regular", "ephemeral"
_LEFTOVERS = (".step-*.partial", ".step-*.replaced", ".step-*.deleted", ".replacing-*.tmp", ".seen-*")


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay besides the newest of all.

    Attributes:
        newest: regular ones; 0 keeps all.
        every_steps: those of every so many steps, for good; 0 keeps none for that.
    """

    newest: int = 0
    every_steps: int = 0


def point_latest(final: Path) -> None:
    """Let `latest` name a checkpoint."""
    with replaced(final.parent / LATEST) as file:
        file.write(f"{final.name}\n".encode())
    flush([final.parent])


def prune(checkpoints: Path, keep: Keep, newest: Path, protected: Set[Path] = frozenset()) -> None:
    """Delete the checkpoints that nothing keeps.

    Args:
        checkpoints: the run's directory of them.
        keep: which stay.
        newest: the one just committed, which stays.
        protected: others that stay.
    """
    # Later ones are of a course that was given up; this one replaces them as it comes to their steps.
    kinds = {path: _kind(path) for path in sorted(checkpoints.glob("step-*")) if path.is_dir() and path <= newest}
    regular = [path for path, kind in kinds.items() if kind == REGULAR and path not in protected]
    stays = {newest, *protected, *(regular[-keep.newest :] if keep.newest else regular)}
    if keep.every_steps:
        stays |= {path for path in regular if _step(path) % keep.every_steps == 0}
    for path in kinds:
        if path not in stays:
            delete(path)


def delete(path: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no torn one is seen."""
    gone = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what a crash left of saves and deletions; one that had lost its name to a save that failed gets it back."""
    for path in checkpoints.glob(".step-*.replaced"):
        named = checkpoints / path.name.removeprefix(".").removesuffix(".replaced")
        if not named.exists():
            path.rename(named)
    for pattern in _LEFTOVERS:
        for path in checkpoints.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _kind(path: Path) -> str:
    """Read whether a checkpoint is ephemeral; of what cannot be read nothing is deleted for that."""
    try:
        return str(json.loads((path / MANIFEST).read_text()).get("kind", REGULAR))
    except (OSError, ValueError):
        return REGULAR


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
