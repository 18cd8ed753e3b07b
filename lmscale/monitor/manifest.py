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

    Args:
        path: output_dir/manifest.json.
        config: the resolved config; its hash is that of the text in config.yaml.
        layout: sizes of the axes, ZeRO stage and so on.
        command: the command line of this start, as a list.
        extra: more keys, or other values: "data" (hashes of the corpora), "hosts" (all hosts, rank 0's alone if left
            out), "resume_step".
    """
    earlier = _earlier_starts(path)
    manifest = {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": {"lmscale": git_commit_of_package(), "working_directory": git_commit(Path.cwd())},
        "config_sha256": hashlib.sha256(show(config).encode()).hexdigest(),
        "layout": dict(layout),
        "hosts": [socket.gethostname()],
        "command": list(command),
        **(extra or {}),
        "earlier_starts": earlier,
    }
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


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    try:
        previous = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    if not isinstance(previous, dict):
        return []
    earlier = previous.pop("earlier_starts", [])
    return [*earlier, previous]
