"""The base of an adaptation: which checkpoint it is, told by the content of its weights, whatever layout wrote it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader


@dataclass(frozen=True)
class BaseModel:
    """A base model's checkpoint and the hash of its weights."""

    path: Path
    weights_hash: str


def hash_weights(reader: CheckpointReader) -> str:
    """Hash the weights of a checkpoint: SHA-256 over names, shapes and fp32 values of the logical tensors.

    Checkpoints of the same weights have the same hash, whatever layout wrote them. Ranks share the tensors, and each holds
    one at a time.

    Collectives: a gather over all ranks, where there are several.
    """
    is_distributed = dist.is_initialized() and dist.get_world_size() > 1
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)
    shapes = reader.shapes()
    mine = {name: _hash_tensor(reader, name) for name in sorted(shapes)[rank::world_size]}
    parts: list[dict[str, str]] = [mine]
    if is_distributed:
        parts = [{} for _ in range(world_size)]
        dist.all_gather_object(parts, mine)
    digests = {name: digest for part in parts for name, digest in part.items()}
    lines = [f"{name} {shapes[name]} {digests[name]}\n" for name in sorted(shapes)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hash_tensor(reader: CheckpointReader, name: str) -> str:
    return hashlib.sha256(reader.logical(PARAMETER, name).contiguous().numpy()).hexdigest()
