"""Prefixes and prompts in PEFT's one tensor, prompt_embeddings.

A prefix is a row for each of its k keys: of layer 0 the key and the value, of layer 1, and so on, [k, 2 L g d]. A prompt is
[k, h].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lmscale.config.adapt import PrefixTuningConfig, PromptTuningConfig, PTuningV2Config
from lmscale.config.model import ModelConfig
from lmscale.convert.peft_files import CONFIG, Tensors, check_keys
from lmscale.errors import ConversionError
from lmscale.plan.adaptation import attentions, own_shapes

TENSOR = "prompt_embeddings"
Read = Callable[[str], torch.Tensor]
_SIZES = {"num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"}


def check_has_prefix(model: ModelConfig) -> None:
    """Check that PEFT's prefix reaches all that ours does.

    Raises:
        ConversionError: if the model has an encoder and a decoder.
    """
    if model.has_decoder_stack:
        raise ConversionError(
            "PEFT's prefix reaches neither the encoder nor the cross attention",
            field="model.architecture",
            value=model.architecture,
        )


def prefix_to_peft(
    model: ModelConfig, adapt: PrefixTuningConfig | PTuningV2Config, read: Read
) -> tuple[dict[str, Any], Tensors]:
    """Make the keys of adapter_config.json and the tensor of a prefix."""
    check_has_prefix(model)
    layers = [read(f"{place}.prefix.table") for place, _, _ in attentions(model)]  # [k, 2, g, d] each
    return _keys(model, "PREFIX_TUNING", adapt.length) | {
        "token_dim": model.query_groups * model.head_size,
        "num_attention_heads": model.query_groups,
        "prefix_projection": False,
        "encoder_hidden_size": model.query_groups * model.head_size,
    }, {TENSOR: torch.cat(layers, dim=1).flatten(1)}


def prompt_to_peft(model: ModelConfig, adapt: PromptTuningConfig, read: Read) -> tuple[dict[str, Any], Tensors]:
    """Make the keys of adapter_config.json and the tensor of a prompt."""
    (name,) = own_shapes(model, adapt)
    keys = _keys(model, "PROMPT_TUNING", adapt.length) | {"prompt_tuning_init": "RANDOM"}
    return keys, {TENSOR: read(name)}


def _keys(model: ModelConfig, kind: str, length: int) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "num_virtual_tokens": length,
        "token_dim": model.hidden_size,
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_transformer_submodules": 1,
        "modules_to_save": None,
    }


def prefix_from_peft(keys: dict[str, Any], tensors: Tensors, model: ModelConfig) -> tuple[PrefixTuningConfig, Tensors]:
    """Make the method and our tables of PEFT's files. prefix_projection says how it was trained; the tensor is its result.

    Raises:
        ConversionError: if the tensor is no prefix of this base.
    """
    check_has_prefix(model)
    check_keys(keys, _SIZES | {"prefix_projection"})
    groups, width = model.query_groups, model.head_size
    flat = _tensor(keys, tensors, 2 * model.num_layers * groups * width)
    adapt = PrefixTuningConfig(length=flat.size(0), projection=None)
    layers = flat.view(-1, model.num_layers, 2, groups, width).unbind(dim=1)
    places = [f"{place}.prefix.table" for place, _, _ in attentions(model)]
    return adapt, dict(zip(places, layers, strict=True))


def prompt_from_peft(keys: dict[str, Any], tensors: Tensors, model: ModelConfig) -> tuple[PromptTuningConfig, Tensors]:
    """Make the method and our tensor of PEFT's files. For two stacks PEFT may keep as many rows again, which nothing reads.

    Raises:
        ConversionError: if the tensor is no prompt of this base.
    """
    check_keys(keys, _SIZES)
    table = _tensor(keys, tensors, model.hidden_size)[: int(keys["num_virtual_tokens"])]
    adapt = PromptTuningConfig(length=table.size(0))
    (name,) = own_shapes(model, adapt)
    return adapt, {name: table}


def _tensor(keys: dict[str, Any], tensors: Tensors, width: int) -> torch.Tensor:
    other = sorted(tensors.keys() - {TENSOR})
    if other or TENSOR not in tensors:
        raise ConversionError(f"must hold {TENSOR} alone", field="adapter_model.safetensors", value=other[:1])
    tensor, length = tensors[TENSOR], int(keys["num_virtual_tokens"])
    stacks = int(keys.get("num_transformer_submodules") or 1)
    if tensor.dim() != 2 or tensor.size(1) != width or tensor.size(0) not in (length, length * stacks):
        raise ConversionError(
            f"has the shape {tuple(tensor.shape)}, and by this base and {CONFIG} ({length}, {width})", field=TENSOR
        )
    return tensor
