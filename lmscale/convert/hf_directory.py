"""The weights of a Hugging Face directory, one tensor at a time and without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lmscale.convert.hf_config import read_json
from lmscale.errors import ConversionError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")
"""What fp32 holds exactly."""
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names that TensorFlow's checkpoints of BERT brought along; transformers still reads them."""


class HfDirectory:
    """The tensors of a directory, by name; one file or sharded with an index.

    Args:
        path: the directory.
        prefix: what the names begin with in a model with a head, as "transformer."; names of a model that was saved
            without one get it.

    Raises:
        ConversionError: if there are no safetensors, or a shard or a tensor of the index is missing or torn.
    """

    def __init__(self, path: Path, prefix: str = ""):
        self.path = path
        self._files: dict[str, Any] = {}
        stored = self._locate()
        is_bare = bool(prefix) and not any(name.startswith(prefix) for name in stored)
        self._places = {_canonical(name, prefix if is_bare else ""): (file, name) for name, file in stored.items()}

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return tuple(self._slice(name).get_shape())

    def check_dtype(self, name: str) -> None:
        """Refuse what fp32 does not hold exactly."""
        dtype = self._slice(name).get_dtype()
        if dtype not in _DTYPES:
            raise ConversionError(
                f"has the dtype {dtype}",
                field=f"{self.path}: {name}",
                remedy="save the model in fp32, bf16 or fp16; quantized weights cannot be taken",
            )

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, as fp32."""
        file, stored = self._places[name]
        tensor: torch.Tensor = self._open(file).get_tensor(stored)
        return tensor.float()

    def _slice(self, name: str) -> Any:
        file, stored = self._places[name]
        return self._open(file).get_slice(stored)

    def _locate(self) -> dict[str, str]:
        """Find the file of each tensor."""
        if (self.path / INDEX).is_file():
            places = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise ConversionError("has no weight_map", field=str(self.path / INDEX))
            for name, file in places.items():
                if name not in self._open(file).keys():  # noqa: SIM118 (a file of safetensors is no mapping)
                    raise ConversionError(f"lacks {name}, which {INDEX} places there", field=str(self.path / file))
            return places
        if (self.path / WEIGHTS).is_file():
            return dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)
        if any(self.path.glob("*.bin")):
            raise ConversionError(
                "holds its weights as pickles (*.bin), which are not read",
                field=str(self.path),
                remedy="convert them: load them with transformers and call save_pretrained",
            )
        raise ConversionError(f"holds no {WEIGHTS} and no {INDEX}", field=str(self.path))

    def _open(self, file: str) -> Any:
        if file not in self._files:
            if Path(file).name != file:
                raise ConversionError("must be the name of a file in the directory", field=INDEX, value=file)
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except FileNotFoundError:
                raise ConversionError(f"{file} is missing", field=str(self.path), remedy="download it again") from None
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"cannot be read: {error}", field=str(self.path / file)) from None
        return self._files[file]


def _canonical(name: str, prefix: str) -> str:
    for old, new in _OLD_SUFFIXES.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return prefix + name
