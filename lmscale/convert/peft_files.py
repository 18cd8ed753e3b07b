"""PEFT's two files: adapter_config.json, read with care, and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lmscale.convert.hf_config import read_json
from lmscale.errors import ConversionError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]

_DESCRIPTIVE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "encoder_hidden_size",  # of a network that is gone
        "ephemeral_gpu_offload",
        "eva_config",
        "exclude_modules",  # the tensors' names say what was chosen
        "fan_in_fan_out",  # how the base keeps its weights; A and B are the same
        "inference_mode",
        "init_lora_weights",
        "init_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "qalora_group_size",  # read with use_qalora only
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""Keys that change nothing of what the tensors compute."""
_NEUTRAL = (None, False, "", 0)


def read_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Raises:
        ConversionError: if it is not there or no JSON object.
    """
    return dict(read_json(directory / CONFIG))


def check_keys(keys: Mapping[str, Any], honoured: set[str]) -> None:
    """Refuse keys that change the arithmetic and that we do not read; one that is off, empty or null changes nothing.

    Raises:
        ConversionError: naming the first.
    """
    for key in sorted(keys.keys() - honoured - _DESCRIPTIVE):
        value = keys[key]
        if value not in _NEUTRAL and value not in ({}, []):
            raise ConversionError("changes the arithmetic, and cannot be taken", field=f"{CONFIG}: {key}", value=value)


def read_tensors(directory: Path) -> Tensors:
    """Read adapter_model.safetensors, in fp32.

    Raises:
        ConversionError: if it is not there or damaged.
    """
    file = directory / WEIGHTS
    try:
        return {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        remedy = "save it with safe_serialization" if (directory / "adapter_model.bin").exists() else None
        raise ConversionError(f"cannot be read: {error}", field=str(file), remedy=remedy) from None


def write(directory: Path, keys: Mapping[str, Any], tensors: Tensors) -> None:
    """Write both files."""
    (directory / CONFIG).write_text(json.dumps(dict(keys), indent=2, sort_keys=True) + "\n")
    copies = {name: tensor.detach().float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, directory / WEIGHTS, metadata={"format": "pt"})
