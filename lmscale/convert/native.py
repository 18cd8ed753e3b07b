"""Writing a checkpoint that no run has trained: weights alone, at step 0.

The form is that of lmscale.train.checkpoint. Files stay below 1 GiB, so a tensor that is larger lies in several.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from lmscale.train.base import BaseModel
from lmscale.train.checkpoint_files import PARAMETER, Piece, StoredFile, seal
from lmscale.train.progress import Progress
from lmscale.train.tensor_file import write_tensors

_FILE_VALUES = 2**28 - 2**18
"""fp32 values in a file: 1 GiB, less a mebibyte for the header."""


class NativeWriter:
    """Writes logical tensors one after another into a checkpoint's directory.

    Args:
        directory: of the checkpoint.
        file_values: most values in a file.
    """

    def __init__(self, directory: Path, file_values: int = _FILE_VALUES):
        self._directory, self._limit = directory, file_values
        self._tensors: dict[str, torch.Tensor] = {}
        self._pieces: list[Piece] = []
        self._num_files = 0
        self._written: dict[str, StoredFile] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store a logical tensor."""
        flat = tensor.detach().float().reshape(-1)
        for start in range(0, flat.numel(), self._limit):
            part = flat[start : start + self._limit]
            if sum(map(torch.numel, self._tensors.values())) + part.numel() > self._limit:
                self._write()
            self._hold(name, tuple(tensor.shape), start, part)

    def finish(self, config_yaml: str, base: BaseModel | None = None) -> None:
        """Write what is left, the config and the manifest; the tokenizer's copy must be there already.

        Args:
            config_yaml: the config.
            base: of an adaptation, whose trained tensors alone were stored.
        """
        self._write()
        (self._directory / "config.yaml").write_text(config_yaml)
        fields = {
            "progress": asdict(Progress()),
            "optimizer": {"name": "none", "step": 0},
            "loss_scaler": None,
            "layout": {"tp_size": 1, "pp_size": 1, "dp_size": 1, "zero_stage": 0},
            "base": None if base is None else {"path": str(base.path), "weights_hash": base.weights_hash},
        }
        seal(self._directory, fields, self._written)

    def _hold(self, name: str, shape: tuple[int, ...], start: int, part: torch.Tensor) -> None:
        key = f"{PARAMETER}/{name}"
        self._tensors[key] = part
        self._pieces.append(
            Piece(
                kind=PARAMETER,
                name=name,
                shape=shape,
                tp_dim=None,
                tp_stride=1,
                tp_rank=0,
                tp_size=1,
                start=start,
                end=start + part.numel(),
                file=f"rank-{self._num_files:05d}.safetensors",
                key=key,
            )
        )

    def _write(self) -> None:
        if not self._tensors:
            return
        file = self._directory / self._pieces[0].file
        shapes = {key: (part.numel(),) for key, part in self._tensors.items()}
        written = write_tensors(file, shapes, self._tensors.values())
        self._written[file.name] = StoredFile(written.num_bytes, written.sha256)
        file.with_suffix(".json").write_text(json.dumps([asdict(piece) for piece in self._pieces]))
        self._tensors, self._pieces, self._num_files = {}, [], self._num_files + 1
