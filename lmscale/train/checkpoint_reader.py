"""Reading checkpoints: logical tensors, or slices of them, from whatever layout wrote them.

The form of a checkpoint is described in lmscale.train.checkpoint. Nothing here needs an engine: generation and
conversion read through this module.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import torch

from lmscale.errors import CheckpointError
from lmscale.train.checkpoint_files import FORMAT, PARAMETER, Piece, check_hashes, read_manifest, stored_files
from lmscale.train.fragments import LogicalTensor
from lmscale.train.progress import Progress
from lmscale.train.tensor_file import TensorFile

__all__ = ["FORMAT", "PARAMETER", "CheckpointReader", "Piece", "tp_slice"]


class CheckpointReader:
    """Reads logical tensors, or slices of them, from a checkpoint's directory.

    Each file is compared with its hash before its first tensor is read.

    Args:
        path: the directory.
        is_verified: all its hashes were compared just now.

    Raises:
        CheckpointError: if the directory is no checkpoint of ours, of a newer format, lacks (part of) a file, or has another
            than was written.
    """

    def __init__(self, path: Path, *, is_verified: bool = False):
        self.path = path
        self.manifest = read_manifest(path)
        self._files = stored_files(self.manifest)
        self._is_verified = is_verified
        self._pieces: dict[tuple[str, str], list[Piece]] = defaultdict(list)
        self._kinds: dict[str, list[str]] = defaultdict(list)
        self._read_pieces()
        self._open: dict[str, TensorFile] = {}
        self._logical: tuple[tuple[str, str], torch.Tensor] | None = None

    def _read_pieces(self) -> None:
        seen = set()
        for name in sorted(name for name in self._files if name.startswith("rank-") and name.endswith(".json")):
            self._check(name)
            content = json.loads((self.path / name).read_text())
            for entry in content if isinstance(content, list) else content["pieces"]:  # a list in format 1
                piece = Piece(**{**entry, "shape": tuple(entry["shape"])})
                place = (piece.kind, piece.name, piece.tp_rank, piece.start, piece.end)
                if place not in seen:  # of copies, one
                    self._pieces[piece.kind, piece.name].append(piece)
                    seen.add(place)
        for kind, name in self._pieces:
            self._kinds[name].append(kind)

    def _check(self, name: str) -> None:
        if name not in self._files:
            raise CheckpointError(f"{name} is not named by its manifest", field="checkpoint", value=str(self.path))
        if not self._is_verified:
            check_hashes(self.path, {name: self._files[name]})

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

    def kinds(self, name: str) -> list[str]:
        """List what is stored of a parameter, in the order of the files."""
        return self._kinds[name]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Logical shape of a kind of a parameter's state."""
        return self._pieces[kind, name][0].shape

    def logical(self, kind: str, name: str) -> torch.Tensor:
        """Read a whole logical tensor, fp32 on the CPU; the last one read is kept."""
        if self._logical is None or self._logical[0] != (kind, name):
            self._logical = None  # before the next is made
            self._logical = (kind, name), self._read_whole(self._pieces[kind, name])
        return self._logical[1]

    def _read_whole(self, pieces: list[Piece]) -> torch.Tensor:
        """Read the slice of each tensor-parallel rank into its place; at most one slice is in memory besides the whole."""
        first = pieces[0]
        whole = torch.empty(first.shape, dtype=torch.float32)
        if first.tp_dim is None:
            self._fill(whole.view(-1), 0, pieces)
            return whole
        local = _local_shape(first.shape, first.tp_dim, first.tp_size)
        for tp_rank in range(first.tp_size):
            flat = torch.empty(math.prod(local), dtype=torch.float32)
            self._fill(flat, 0, [piece for piece in pieces if piece.tp_rank == tp_rank])
            parts = flat.view(local).chunk(first.tp_stride, dim=first.tp_dim)
            for block, part in zip(whole.chunk(first.tp_stride, dim=first.tp_dim), parts, strict=True):
                block.chunk(first.tp_size, dim=first.tp_dim)[tp_rank].copy_(part)
        return whole

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
                self._read(piece, low - piece.start, flat[low - start : high - start])
                covered += high - low
        if covered != flat.numel():
            name = pieces[0].name if pieces else "?"
            raise self.lacks(f"{covered} of {flat.numel()} values of {name} are there")

    def lacks(self, what: str) -> CheckpointError:
        """Make the error for a part that is not there: on hosts with directories of their own, perhaps another has it."""
        hosts = self.manifest.get("num_directories", 1)
        return CheckpointError(
            what
            if hosts == 1
            else f"holds what the ranks of one of {hosts} hosts need, and not for this layout: {what}",
            field="checkpoint",
            value=str(self.path),
            remedy=None
            if hosts == 1
            else "resume on the same hosts and layout, or in a directory that all hosts share",
        )

    def _read(self, piece: Piece, start: int, values: torch.Tensor) -> None:
        try:
            if piece.file not in self._open:
                self._check(piece.file)
                self._open[piece.file] = TensorFile(self.path / piece.file)
            self._open[piece.file].read_into(piece.key, start, values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot be read: {error}", field=str(self.path / piece.file)) from None


def _local_shape(shape: tuple[int, ...], tp_dim: int | None, tp_size: int) -> tuple[int, ...]:
    return tuple(size // tp_size if dim == tp_dim else size for dim, size in enumerate(shape))


def tp_slice(whole: torch.Tensor, tp_dim: int | None, tp_stride: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Cut a rank's slice out of a logical tensor: its share of each of tp_stride blocks along tp_dim."""
    if tp_dim is None:
        return whole
    blocks = whole.chunk(tp_stride, dim=tp_dim)
    return torch.cat([block.chunk(tp_size, dim=tp_dim)[tp_rank] for block in blocks], dim=tp_dim)
