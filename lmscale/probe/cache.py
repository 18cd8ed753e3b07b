"""Features on disk: computed once, and read again as long as the model, the rows and the pooling are the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lmscale.config.run import RunConfig
from lmscale.plan.probing import Pooling
from lmscale.probe.units import Units

_FEATURES, _KEY = "features", "key"


class FeatureCache:
    """The features of a run's splits.

    Each file carries the hash of all that decides what is in it: the base's weights, the model's config, the arithmetic,
    the tokens that the model reads, the layer and the pooling. Labels are not among it.

    Args:
        directory: of the files.
        config: of the run.
        base_hash: of the base's weights.
        pooling: what is kept of a row.
    """

    def __init__(self, directory: Path, config: RunConfig, base_hash: str, pooling: Pooling):
        self._directory, self._base_hash, self._pooling = directory, base_hash, pooling
        self._model = config.model.model_dump_json(exclude={"init_from", "preset"})
        self._precision = config.precision

    def path(self, split: str, layer: int) -> Path:
        """Return the file of a split's features."""
        return self._directory / f"{split}-layer-{layer:02d}-{self._pooling}.safetensors"

    def has(self, split: str, layer: int, units: Units) -> bool:
        """Tell whether the features are there, and those of this model and these rows."""
        try:
            with safe_open(self.path(split, layer), "pt") as opened:
                return (opened.metadata() or {}).get(_KEY) == self._key(layer, units)
        except (OSError, SafetensorError):
            return False

    def write(self, split: str, layer: int, units: Units, features: torch.Tensor) -> None:
        """Keep features, in the place of former ones."""
        self._directory.mkdir(parents=True, exist_ok=True)
        temporary = self._directory / f".writing-{os.getpid()}.tmp"
        try:
            save_file({_FEATURES: features.contiguous()}, temporary, metadata={_KEY: self._key(layer, units)})
            temporary.replace(self.path(split, layer))
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, split: str, layer: int) -> torch.Tensor:
        """Return features: fp32 [u, h], or [u, s, h] of whole sequences."""
        return load_file(self.path(split, layer))[_FEATURES]

    def _key(self, layer: int, units: Units) -> str:
        parts = (self._base_hash, self._model, self._precision, units.digest, layer, self._pooling)
        return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
