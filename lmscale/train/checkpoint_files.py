"""The files of a checkpoint, without torch: what can be said of one before any rank starts.

The form of a checkpoint is described in lmscale.train.checkpoint. Its manifest names every file with size and SHA-256, and
carries a checksum of itself; what is not named is not part of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lmscale.errors import CheckpointError

FORMAT = 2
OLDEST_FORMAT = 1
"""Sizes without hashes: its files can be looked at, and not verified."""
MANIFEST = "manifest.json"
PARAMETER = "param"
"""Kind of a slice of master weights; the moments' kinds are the optimizer's names: exp_avg and exp_avg_sq of Adam;
momentum_buffer of SGD; lion_momentum; muon_momentum; of Adafactor, row and column (logical tensors of their own shapes,
under their parameter's name), second and first."""
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A stored range [start, end) of the flattened slice that one tensor-parallel rank has of a logical tensor."""

    kind: str
    name: str
    shape: tuple[int, ...]
    tp_dim: int | None
    tp_stride: int
    tp_rank: int
    tp_size: int
    start: int
    end: int
    file: str
    key: str


@dataclass(frozen=True)
class StoredFile:
    """A file as the manifest has it; sha256 is None in format 1."""

    num_bytes: int
    sha256: str | None


def seal(directory: Path, fields: Mapping[str, Any], known: Mapping[str, StoredFile] | None = None) -> int:
    """Write the manifest of a directory's files, and flush it to the disk.

    Args:
        directory: of the checkpoint, complete but for the manifest.
        fields: what the manifest says besides.
        known: files that were hashed while they were written; the others are hashed here.

    Returns:
        The bytes of all files but the manifest.

    Raises:
        OSError: if a file cannot be read or written.
    """
    known = known or {}
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            stored = known.get(name) or StoredFile(path.stat().st_size, hash_file(path))
            files[name] = {"bytes": stored.num_bytes, "sha256": stored.sha256}
    manifest = {"format": FORMAT, **fields, "files": files}
    manifest["checksum"] = _checksum(manifest)
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return sum(entry["bytes"] for entry in files.values())


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check that its files are there and have their sizes.

    Raises:
        CheckpointError: if the directory is no checkpoint of ours, of another format, names files outside of itself, or
            lacks (part of) a file.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
        version, files = int(manifest["format"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"is not a checkpoint of lmscale: it has no readable {MANIFEST}",
            field="checkpoint",
            value=str(path),
        ) from None
    if not OLDEST_FORMAT <= version <= FORMAT:
        raise CheckpointError(
            f"has format {version}, and this lmscale reads {OLDEST_FORMAT} to {FORMAT}",
            field="checkpoint",
            value=str(path),
            remedy="install a newer lmscale" if version > FORMAT else "read and save it with an older lmscale first",
        )
    if version > OLDEST_FORMAT and manifest.get("checksum") != _checksum(manifest):
        raise _bad(path, f"{MANIFEST} is not as it was written: its checksum differs")
    _check_names(path, files)
    for name, stored in stored_files(manifest).items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != stored.num_bytes:
            raise _bad(
                path, f"{name} is missing" if found is None else f"{name} has {found} bytes of {stored.num_bytes}"
            )
    return manifest


def stored_files(manifest: Mapping[str, Any]) -> dict[str, StoredFile]:
    """List the files of a manifest that was read."""
    if manifest["format"] == OLDEST_FORMAT:
        return {name: StoredFile(size, None) for name, size in manifest["files"].items()}
    return {name: StoredFile(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}


def is_whole(path: Path) -> bool:
    """Tell whether a directory is a checkpoint whose files have their sizes."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


def check_hashes(path: Path, files: Mapping[str, StoredFile]) -> None:
    """Read files of a checkpoint and compare their hashes with the manifest's.

    Raises:
        CheckpointError: at the first that differs or cannot be read.
    """
    for name, stored in files.items():
        try:
            found = hash_file(path / name)
        except OSError as error:
            raise _bad(path, f"{name} cannot be read: {error.strerror}") from None
        if stored.sha256 is not None and found != stored.sha256:
            raise _bad(
                path, f"{name} is not as it was written: SHA-256 {found[:12]} in the place of {stored.sha256[:12]}"
            )


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def flush(paths: Iterable[Path]) -> None:
    """Send files' and directories' content to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _checksum(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_names(path: Path, names: Iterable[str]) -> None:
    """Refuse names that lead out of the directory, by themselves or by a link."""
    root = path.resolve()
    for name in names:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or not (path / name).resolve().is_relative_to(root):
            raise _bad(path, f"{MANIFEST} names a file outside of the checkpoint: {name!r}")


def _bad(path: Path, rule: str) -> CheckpointError:
    return CheckpointError(rule, field="checkpoint", value=str(path), remedy="use another one")
