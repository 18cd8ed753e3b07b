"""Small checkpoints for the tests of inference: written by hand from tensors, in the format that training writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lmscale.config.io import parse_run, show
from lmscale.train.checkpoint_files import MANIFEST, seal

Tensors = dict[str, torch.Tensor]


def run_keys(model: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """Make the config of a run that could have trained a model."""
    return {
        "model": model,
        "data": {"train": [{"prefix": "nowhere"}], "seq_length": model.get("max_position_embeddings", 64)},
        "batch": {"micro_batch_size": 2, "global_batch_size": 2},
        "optim": {"lr": 1e-3},
        "train": {"train_tokens": 1000},
        "output_dir": "nowhere",
        **sections,
    }


def write_checkpoint(directory: Path, keys: dict[str, Any], tensors: Tensors) -> Path:
    """Write logical tensors as the checkpoint of a one-rank run."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(show(parse_run(keys)))
    file = "rank-00000.safetensors"
    save_file({f"param/{name}": tensor.reshape(-1).float() for name, tensor in tensors.items()}, directory / file)
    pieces = [
        {
            "kind": "param",
            "name": name,
            "shape": list(tensor.shape),
            "tp_dim": None,
            "tp_stride": 1,
            "tp_rank": 0,
            "tp_size": 1,
            "start": 0,
            "end": tensor.numel(),
            "file": file,
            "key": f"param/{name}",
        }
        for name, tensor in tensors.items()
    ]
    (directory / "rank-00000.json").write_text(json.dumps(pieces))
    fields = {
        "progress": {"step": 1, "consumed_samples": 2, "consumed_tokens": 128, "skipped_steps": 0},
        "optimizer": {"name": "AdamW", "step": 1},
        "loss_scaler": None,
    }
    seal(directory, fields)
    return directory


def reseal(directory: Path, **changes: Any) -> None:
    """Write the manifest anew over files that were changed, with other values for some of its keys."""
    manifest = json.loads((directory / MANIFEST).read_text())
    own = {"format", "files", "checksum"}
    seal(directory, {key: value for key, value in manifest.items() if key not in own} | changes)
