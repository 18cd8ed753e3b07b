"""manifest.json: what it takes to say, later, what a run was: versions, commits, hashes, layout, command, hosts."""

from __future__ import annotations

import hashlib
import json
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lmscale.config.io import show
from lmscale.config.run import RunConfig
from lmscale.monitor.atomic import replaced

_PACKAGES = ("lmscale", "torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")
_PACKAGE_DIR = Path(__file__).parents[1]
_GIT_TIMEOUT_S = 10


def write_manifest(
    path: Path,
    config: RunConfig,
    layout: Mapping[str, Any],
    command: Sequence[str],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a run's manifest, atomically. A start of the same run before this one is kept under "earlier_starts".

    What `add_restart` has noted stays, and the last restart is told the step that this start goes on from.

    Args:
        path: output_dir/manifest.json.
        config: the resolved config; its hash is that of the text in config.yaml.
        layout: sizes of the axes, ZeRO stage and so on.
        command: the command line of this start, as a list.
        extra: more keys, or other values: "data" (hashes of the corpora), "device" (of rank 0), "hosts" (all hosts,
            rank 0's alone if left out), "resume_step".
    """
    earlier, restarts = _earlier_starts(path)
    if restarts and restarts[-1]["resumed_step"] is None:
        restarts[-1]["resumed_step"] = (extra or {}).get("resume_step")
    manifest = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": {"lmscale": git_commit_of_package(), "working_directory": git_commit(Path.cwd())},
        "config_sha256": hashlib.sha256(show(config).encode()).hexdigest(),
        "layout": dict(layout),
        "hosts": [socket.gethostname()],
        "command": list(command),
        **(extra or {}),
        "restarts": restarts,
        "earlier_starts": earlier,
    }
    _write(path, manifest)


def add_restart(path: Path, status: int, reason: str) -> None:
    """Note in a run's manifest that it is about to be started again; the new start fills in the step it resumes from.

    Args:
        path: output_dir/manifest.json.
        status: of the start that ended.
        reason: why it did, in a line.

    Raises:
        OSError: if it cannot be written.
    """
    manifest = _read(path)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": now, "status": status, "reason": reason, "resumed_step": None}
    _write(path, {**manifest, "restarts": [*manifest.get("restarts", []), entry]})


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        file.write((json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def versions() -> dict[str, str | None]:
    """Return the versions of Python and the packages that a run depends on, None where one is not installed.

    Read from the packages' metadata: nothing is imported.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def git_commit(directory: Path) -> str | None:
    """Return the commit of the checkout that holds a directory, with "+changes" where tracked files differ from it.

    Returns:
        None, where there is no checkout, no commit or no git.
    """
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+changes" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")


def git_commit_of_package() -> str | None:
    """Return the commit of the checkout that lmscale runs from, or None for an installed copy."""
    # An installed copy may lie, ignored, inside a checkout of something else.
    is_tracked = _git(_PACKAGE_DIR, "ls-files", "--error-unmatch", "__init__.py") is not None
    return git_commit(_PACKAGE_DIR) if is_tracked else None


def _git(directory: Path, *arguments: str) -> str | None:
    # No optional locks: the run must not disturb a git command that the user has under way.
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _earlier_starts(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the starts and the restarts before this start."""
    previous = _read(path)
    earlier, restarts = previous.pop("earlier_starts", []), previous.pop("restarts", [])
    return [*earlier, previous] if previous else earlier, restarts
