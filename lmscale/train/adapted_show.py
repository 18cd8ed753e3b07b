"""What `lmscale adapter inspect` shows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lmscale.config.adapt import num_adaptations
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.io import load_run
from lmscale.train.adapted import split_entry, stored_adaptation
from lmscale.train.checkpoint_reader import CheckpointReader


def describe(checkpoint: str | Path) -> dict[str, Any]:
    """Describe a checkpoint of an adaptation: method, base, sizes, progress.

    Raises:
        CheckpointError: if it is none.
    """
    path = resolve_checkpoint(split_entry(str(checkpoint))[0])
    reader, config = CheckpointReader(path), load_run(path / "config.yaml")
    stored = stored_adaptation(reader, config)
    adapt = stored.trained.adapt
    assert adapt is not None
    base, progress = reader.manifest["base"], reader.progress
    settings = adapt.model_dump(exclude={"method", "entries"}, exclude_defaults=True)
    return {
        "checkpoint": str(path),
        "method": adapt.method,
        "settings": ", ".join(f"{key}: {value}" for key, value in settings.items()) or "the defaults",
        "adaptations": num_adaptations(adapt),
        "base": base["path"],
        "base_weights": base["weights_hash"],
        "parameters": sum(math.prod(shape) for shape in reader.shapes().values()),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "steps": progress.step,
        "samples": progress.consumed_samples,
        "tokens": progress.consumed_tokens,
    }
