"""Reading checkpoints: logical tensors, or slices of them, from whatever layout wrote them.

The form of a checkpoint is described in lmscale.train.checkpoint. Nothing here needs an engine: generation and
conversion read through this module.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmscale.errors import CheckpointError
from lmscale.train.fragments import LogicalTensor
from lmscale.train.progress import Progress

FORMAT = 1
PARAMETER = "param"
"""Kind of a slice of master weights; the moments' kinds are the optimizer's names: exp_avg and exp_avg_sq; of Adafactor,
row and column (1-D logical tensors under their parameter's name), second."""


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


def find_checkpoint(checkpoints: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None where it has none.

    Raises:
        CheckpointError: if `latest` names one that is not there.
    """
    pointer = checkpoints / "latest"
    if not pointer.is_file():
        return None
    path = checkpoints / pointer.read_text().strip()
    if not path.is_dir():
        raise CheckpointError(
            "names a checkpoint that does not exist",
            field=str(pointer),
            value=path.name,
            remedy="name one by checkpoint.resume",
        )
    return path


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


class CheckpointReader:
    """Reads logical tensors, or slices of them, from a checkpoint's directory.

    Raises:
        CheckpointError: if the directory is no checkpoint of ours, of a newer format, or lacks (part of) a file.
    """

    def __init__(self, path: Path):
        self.path = path
        self.manifest = self._read_manifest()
        self._pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        for file in sorted(path.glob("rank-*.json")):
            for entry in json.loads(file.read_text()):
                piece = Piece(**{**entry, "shape": tuple(entry["shape"])})
                self._pieces[piece.kind, piece.name].append(piece)
        self._open: dict[str, Any] = {}
        self._logical: tuple[tuple[str, str], torch.Tensor] | None = None

    @property
    def progress(self) -> Progress:
        """Where the run was."""
        return Progress(**self.manifest["progress"])

    def holds(self, kind: str, name: str) -> bool:
        """Tell whether a kind of a parameter's state is stored."""
        return (kind, name) in self._pieces

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of each parameter."""
        return {name: pieces[0].shape for (kind, name), pieces in self._pieces.items() if kind == PARAMETER}

    def logical(self, kind: str, name: str) -> torch.Tensor:
        """Read a whole logical tensor, fp32 on the CPU; the last one read is kept."""
        if self._logical is None or self._logical[0] != (kind, name):
            pieces = self._pieces[kind, name]
            first = pieces[0]
            parts = []
            for tp_rank in range(first.tp_size):
                shape = _local_shape(first.shape, first.tp_dim, first.tp_size)
                flat = torch.empty(torch.Size(shape).numel(), dtype=torch.float32)
                self._fill(flat, 0, [piece for piece in pieces if piece.tp_rank == tp_rank])
                parts.append(flat.view(shape))
            self._logical = (kind, name), _join(parts, first.tp_dim, first.tp_stride)
        return self._logical[1]

    def fragment(
        self, kind: str, tensor: LogicalTensor, tp_rank: int, tp_size: int, start: int, end: int
    ) -> torch.Tensor:
        """Read the range [start, end) of a rank's flattened slice of a logical tensor, from whatever layout wrote it.

        Returns: fp32 [end - start], on the CPU.
        """
        pieces = self._pieces[kind, tensor.name]
        split = tensor.tp_dim is not None
        if pieces[0].tp_size == (tp_size if split else 1):
            flat = torch.empty(end - start, dtype=torch.float32)
            self._fill(flat, start, [piece for piece in pieces if piece.tp_rank == (tp_rank if split else 0)])
            return flat
        whole = self.logical(kind, tensor.name)
        return tp_slice(whole, tensor.tp_dim, tensor.tp_stride, tp_rank, tp_size).reshape(-1)[start:end]

    def _fill(self, flat: torch.Tensor, start: int, pieces: list[Piece]) -> None:
        """Copy what the pieces hold of [start, start + len(flat)); together they must cover it."""
        end, covered = start + flat.numel(), 0
        for piece in pieces:
            low, high = max(start, piece.start), min(end, piece.end)
            if low < high:
                stored = self._file(piece.file).get_slice(piece.key)[low - piece.start : high - piece.start]
                flat[low - start : high - start] = stored
                covered += high - low
        if covered != flat.numel():
            name = pieces[0].name if pieces else "?"
            raise CheckpointError(f"holds {covered} of {flat.numel()} values of {name}", field=str(self.path))

    def _file(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"cannot be read: {error}", field=str(self.path / name)) from None
        return self._open[name]

    def _read_manifest(self) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
            version, files = manifest["format"], manifest["files"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CheckpointError(
                "is not a checkpoint of lmscale: it has no readable manifest.json",
                field="checkpoint",
                value=str(self.path),
            ) from None
        if version > FORMAT:
            raise CheckpointError(
                f"has format {version}, newer than the {FORMAT} that this lmscale reads",
                field="checkpoint",
                value=str(self.path),
                remedy="install a newer lmscale",
            )
        for name, size in files.items():
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes of {size}"
                raise CheckpointError(
                    f"{name} {state}", field="checkpoint", value=str(self.path), remedy="use another one"
                )
        return manifest


def _local_shape(shape: tuple[int, ...], tp_dim: int | None, tp_size: int) -> tuple[int, ...]:
    return tuple(size // tp_size if dim == tp_dim else size for dim, size in enumerate(shape))


def tp_slice(whole: torch.Tensor, tp_dim: int | None, tp_stride: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Cut a rank's slice out of a logical tensor: its share of each of tp_stride blocks along tp_dim."""
    if tp_dim is None:
        return whole
    blocks = whole.chunk(tp_stride, dim=tp_dim)
    return torch.cat([block.chunk(tp_size, dim=tp_dim)[tp_rank] for block in blocks], dim=tp_dim)


def _join(parts: list[torch.Tensor], tp_dim: int | None, tp_stride: int) -> torch.Tensor:
    """Put the slices of all ranks together; the inverse of `tp_slice`."""
    if tp_dim is None:
        return parts[0]
    by_rank = [part.chunk(tp_stride, dim=tp_dim) for part in parts]
    return torch.cat([blocks[index] for index in range(tp_stride) for blocks in by_rank], dim=tp_dim)
