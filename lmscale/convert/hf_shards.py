"""Writing the weights of a Hugging Face directory: one file, or shards with an index."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from lmscale.convert.hf_directory import INDEX, WEIGHTS
from lmscale.errors import ConversionError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHARD_BYTES = 5 * 10**9
"""As save_pretrained cut them for years."""


class ShardWriter:
    """Writes tensors one after another; which file each goes to is settled before the first.

    Args:
        directory: where to write.
        shapes: of all tensors, in the order in which they will come.
        precision: fp32, bf16 or fp16.
        shard_bytes: most bytes of tensors in a file; a larger tensor has one of its own.
    """

    def __init__(
        self, directory: Path, shapes: dict[str, tuple[int, ...]], precision: str, shard_bytes: int = _SHARD_BYTES
    ):
        self._directory, self._dtype = directory, DTYPES[precision]
        self._sizes = {name: torch.Size(shape).numel() * self._dtype.itemsize for name, shape in shapes.items()}
        self._shards = _cut(self._sizes, shard_bytes)
        self._held: dict[str, torch.Tensor] = {}
        self._num_written = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor.

        Raises:
            ConversionError: if fp16 cannot hold its values.
        """
        # A copy: the parts of one tensor of ours would share their memory, which safetensors refuses.
        cast = torch.empty(tensor.shape, dtype=self._dtype).copy_(tensor)
        if self._dtype == torch.float16 and not torch.equal(cast.isfinite(), tensor.isfinite()):
            raise ConversionError("is out of fp16's range", field=name, remedy="use --dtype bf16 or fp32")
        self._held[name] = cast
        if len(self._held) == len(self._shards[self._num_written]):
            save_file(self._held, self._directory / self._file(self._num_written), metadata={"format": "pt"})
            self._held, self._num_written = {}, self._num_written + 1

    def finish(self) -> None:
        """Write the index, if there is more than one file."""
        if len(self._shards) == 1:
            return
        places = {name: self._file(number) for number, shard in enumerate(self._shards) for name in shard}
        index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": dict(sorted(places.items()))}
        (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, number: int) -> str:
        count = len(self._shards)
        return WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _cut(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Cut names, in order, into lists of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if used + size > limit and shards[-1]:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards
