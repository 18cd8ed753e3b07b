"""Trained classifiers as files: a .safetensors of the weights and a .json of what they are for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lmscale.errors import CheckpointError
from lmscale.monitor.atomic import replaced
from lmscale.probe.heads import ProbeHead


@dataclass(frozen=True)
class ProbeInfo:
    """What a classifier reads and says.

    Attributes:
        layers: whose hidden states it reads, 0 the embeddings; several of a mix.
        pooling: cls, first, last, mean; words: of the first piece of each word; sequence: of all tokens.
        head: linear, mlp or attention.
        kind: of the task.
        labels: the classes, in the order of the outputs; none of regression.
        base: hash of the weights of the model that the features are of.
    """

    layers: list[int]
    pooling: str
    head: str
    kind: str
    labels: list[str]
    base: str


@dataclass(frozen=True)
class Probe:
    """A trained classifier. Made by `load_probe`."""

    info: ProbeInfo
    head: ProbeHead

    @torch.no_grad()
    def predict(self, features: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
        """Compute a score for each class, or a number.

        Args:
            features: [u, h], [u, s, h] with info.pooling sequence; of a mix with a dimension of layers behind the first.
            is_token: bool [u, s], where there is no padding, for info.pooling sequence; left out, everywhere.

        Returns:
            fp32 [u, c]; [u, s, 2], of each token as the first and as the last of the answer, for extractive_qa.
        """
        return self.head(features.float(), is_token)


def save_probe(path: Path, info: ProbeInfo, head: ProbeHead) -> None:
    """Write PATH.safetensors and PATH.json."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    for suffix, content in ((".safetensors", save(tensors)), (".json", json.dumps(asdict(info), indent=1).encode())):
        with replaced(path.with_suffix(suffix)) as file:
            file.write(content)


def load_probe(path: str | Path) -> Probe:
    """Read a classifier that a run of probing has trained.

    Args:
        path: either of its files, as output_dir/probes/layer-03.safetensors.

    Raises:
        CheckpointError: if there is none, or one of the files is damaged.
    """
    path = Path(path)
    try:
        keys: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = load_file(path.with_suffix(".safetensors"))
        head = ProbeHead({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        head.load_state_dict(tensors)
        return Probe(ProbeInfo(**keys), head.eval())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"is no whole probe: {error}", field="probe", value=str(path)) from None
