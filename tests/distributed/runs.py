"""Whole runs on ranks: `lmscale.pretrain` as a cluster runs it, its metrics read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from lmscale.config.checkpoint_paths import find_checkpoint
from tests.distributed.ranks import run_ranks

Keys = dict[str, Any]

GPT: Keys = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "max_position_embeddings": 32,
}
LLAMA: Keys = {
    **GPT,
    "num_query_groups": 2,
    "ffn_hidden_size": 48,
    "position_embedding": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "linear_bias": False,
    "tied_head": False,
}


def write_corpus(prefix: Path, rng: np.random.Generator, num_tokens: int) -> None:
    """Write a .bin/.idx of skewed random tokens, each document ended by token 0."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    written = 0
    while written < num_tokens:
        length = int(rng.integers(1, 200))
        tokens = np.append(1 + (499 * rng.random(length) ** 3).astype(np.int64), 0)
        builder.add_document(tokens, [len(tokens)])
        written += len(tokens)
    builder.finalize(f"{prefix}.idx")


def run_keys(corpus: str, output_dir: Path, **changes: Any) -> Keys:
    """Make the config of a small run; `changes` are dotted keys with __ in the place of the dot."""
    keys: Keys = {
        "model": dict(GPT),
        "data": {"train": [{"prefix": corpus}], "split": "90,10,0", "seq_length": 32, "num_workers": 0},
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"name": "adamw", "lr": 1.0e-3, "lr_warmup_tokens": 512},
        "train": {"train_tokens": 8 * 32 * 6, "log_interval": 1, "eval_interval": 0, "eval_batches": 2},
        "checkpoint": {"save_interval": 0},
        "monitor": {"tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "output_dir": str(output_dir),
    }
    for path, value in changes.items():
        section = keys
        *parents, last = path.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return keys


def pretrain_on_ranks(
    world_size: int, keys: Keys, timeout_s: float = 240.0, pipeline: bool | None = None
) -> list[Keys]:
    """Train a run on forked ranks and return the records of its metrics.jsonl; `pipeline` as of `pretrain`."""
    assert run_ranks(world_size, pretrain_in_rank, keys, pipeline, timeout_s=timeout_s) == [0] * world_size
    return records(keys)


def records(keys: Keys) -> list[Keys]:
    """Read a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(keys["output_dir"], "metrics.jsonl").read_text().splitlines()]


def fresh(keys: Keys) -> Keys:
    """Remove what a run has written and return its keys."""
    shutil.rmtree(keys["output_dir"], ignore_errors=True)
    return keys


def pretrain_in_rank(keys: Keys, pipeline: bool | None = None) -> int:
    """Train a run on this rank of a pool and return its exit status."""
    import gc

    from lmscale.config.io import parse_run
    from lmscale.pretrain import pretrain

    status = pretrain(parse_run(keys), pipeline=pipeline)
    gc.collect()
    return status


def losses(run: list[Keys]) -> list[float]:
    """The training loss of each step."""
    return [record["train/lm_loss"] for record in run]


def norms(run: list[Keys]) -> list[float]:
    """The gradient norm of each step."""
    return [record["train/grad_norm"] for record in run]


def final_state(keys: Keys) -> dict[str, Any]:
    """Read the bytes of a run's last checkpoint: master weights and moments as stored, and every counter."""
    checkpoint = find_checkpoint(Path(keys["output_dir"], "checkpoints"))
    assert checkpoint is not None
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    state = {key: manifest[key] for key in ("progress", "optimizer", "loss_scaler", "layout")}
    files = {path.name: path.read_bytes() for path in sorted(checkpoint.glob("rank-*"))}
    assert files
    return {**state, **files}


def largest_difference(ours: list[float], reference: list[float]) -> float:
    """The largest relative difference between two series of the same length."""
    assert len(ours) == len(reference)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))
