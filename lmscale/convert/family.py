"""What the module of an architecture says: names, tensors and configs, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lmscale.config.model import ModelConfig
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.mapping import Entry

Ids = dict[str, Any]
"""Special ids under their names: bos_token_id, eos_token_id, pad_token_id; an id that there is not is None."""


class Weights(Protocol):
    """The tensors beside a config.json."""

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, as fp32."""
        ...


@dataclass(frozen=True)
class Family:
    """An architecture of theirs.

    Attributes:
        model_type: its name in config.json.
        architectures: classes whose weights are taken.
        prefix: what its tensors begin with below a head.
        table: the tensors, of a model of ours and a config.json.
        to_model: keys of `model` from config.json and the weights beside it.
        to_hf: keys of config.json from a model of ours and the special ids. What it cannot express it passes over: the
            export reads it back by to_model and refuses a model that does not come back.
        copies: tensors that must equal another one, and are not kept: copy -> original.
        buffers: patterns of tensors that hold no weights, and are not kept.
        left_out: patterns of tensors that the model does not use, not kept and named to the user.
        generates: whether it writes text, and so gets a generation_config.json.
    """

    model_type: str
    architectures: tuple[str, ...]
    prefix: str
    table: Callable[[ModelConfig, HfConfig], list[Entry]]
    to_model: Callable[[HfConfig, Weights], dict[str, Any]]
    to_hf: Callable[[ModelConfig, Ids], dict[str, Any]]
    copies: Mapping[str, str] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    generates: bool = True
