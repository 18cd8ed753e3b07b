"""Adaptations to and from PEFT's directories: adapter_config.json and adapter_model.safetensors.

Written and read by ourselves: PEFT need not be there.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmscale.config.adapt import AdaptConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig, PTuningV2Config
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.io import load_run, show
from lmscale.config.model import ModelConfig
from lmscale.convert import peft_lora, peft_prompts
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.mapping import Entry
from lmscale.convert.native import NativeWriter
from lmscale.convert.output import check_free, new_directory
from lmscale.convert.peft_files import CONFIG, Tensors, read_config, read_tensors, write
from lmscale.convert.registry import family_to_export
from lmscale.errors import ConversionError
from lmscale.plan.names import parameter_shapes
from lmscale.train.adapted import StoredAdaptation, check_whole, open_adaptation
from lmscale.train.base import BaseModel, hash_weights
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

_TASK_TYPES = {"gpt": "CAUSAL_LM", "bart": "SEQ_2_SEQ_LM", "t5": "SEQ_2_SEQ_LM"}


@dataclass(frozen=True)
class Exchanged:
    """What an export or import did.

    Attributes:
        method: ours.
        num_parameters: of the tensors written.
        notes: what was left out or could not be expressed, one line each.
    """

    method: str
    num_parameters: int
    notes: list[str]


def export_peft(checkpoint: str | Path, target: Path) -> Exchanged:
    """Write an adaptation as PEFT does, for PeftModel.from_pretrained on the exported base (lmscale export-hf).

    Args:
        checkpoint: of the adaptation; PATH#N for one of several.
        target: a new directory.

    Raises:
        ConversionError: if PEFT has nothing that computes the same, or the target exists.
        RunError: if the directory cannot be written.
    """
    check_free(target)
    stored, _ = open_adaptation(checkpoint)
    model, adapt = stored.adaptation.model, stored.adaptation.adapt
    assert adapt is not None
    if stored.adaptation.head is not None:
        raise ConversionError("has a task's head, which the exported base has not", field=str(stored.reader.path))
    keys, tensors = _to_peft(stored, adapt)
    # PEFT gives its prompts to a lone encoder in this task alone; beside LoRA it would take away the head.
    otherwise = None if isinstance(adapt, LoraConfig) else "FEATURE_EXTRACTION"
    shared = {
        "task_type": _TASK_TYPES.get(model.architecture, otherwise),
        "base_model_name_or_path": None,
        "inference_mode": True,
    }
    with new_directory(target) as partial:
        write(partial, {**shared, **keys}, tensors)
    return Exchanged(adapt.method, _count(tensors), _notes(adapt))


def _to_peft(stored: StoredAdaptation, adapt: AdaptConfig) -> tuple[dict[str, Any], Tensors]:
    model = stored.adaptation.model
    if isinstance(adapt, LoraConfig):
        if "embedding" in adapt.targets:
            peft_lora.check_has_embedding(model)
        trained = stored.shapes.keys() & parameter_shapes(model).keys()
        return peft_lora.to_peft(model, adapt, _table(model), stored.read, trained)
    if isinstance(adapt, PrefixTuningConfig | PTuningV2Config):
        return peft_prompts.prefix_to_peft(model, adapt, stored.read)
    if isinstance(adapt, PromptTuningConfig):
        return peft_prompts.prompt_to_peft(model, adapt, stored.read)
    raise ConversionError(
        "PEFT has no such method: there are lora, prefix_tuning, p_tuning_v2 and prompt_tuning",
        field="adapt.method",
        value=adapt.method,
    )


def _notes(adapt: AdaptConfig) -> list[str]:
    if isinstance(adapt, PTuningV2Config):
        return ["p_tuning_v2 is prefix tuning without a network in PEFT"]
    return []


def import_peft(source: Path, target: Path, base: Path) -> Exchanged:
    """Write an adaptation's checkpoint of what PEFT wrote.

    Args:
        source: adapter_config.json and adapter_model.safetensors.
        target: the checkpoint's directory, a new one.
        base: the base's checkpoint, or its run's directory.

    Raises:
        ConversionError: if a key that changes the arithmetic is not known, a tensor is not of this base, or the target
            exists.
        RunError: if the checkpoint cannot be written.
    """
    check_free(target)
    reader = CheckpointReader(resolve_checkpoint(base))
    check_whole(reader)
    config = load_run(reader.path / "config.yaml")
    keys = read_config(source)
    adapt, tensors = _from_peft(keys, read_tensors(source), config.model, reader)
    model = config.model.model_copy(update={"init_from": str(reader.path.absolute())})
    adapted = config.model_copy(update={"model": model, "adapt": adapt})
    with new_directory(target) as partial:
        if (reader.path / "tokenizer").is_dir():
            shutil.copytree(reader.path / "tokenizer", partial / "tokenizer")
        writer = NativeWriter(partial)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(show(adapted), BaseModel(reader.path.absolute(), hash_weights(reader)))
    return Exchanged(adapt.method, _count(tensors), [])


def _from_peft(
    keys: dict[str, Any], tensors: Tensors, model: ModelConfig, base: CheckpointReader
) -> tuple[AdaptConfig, Tensors]:
    kind = keys.get("peft_type")
    if kind == "LORA":

        def read_base(name: str) -> torch.Tensor:
            return base.logical(PARAMETER, name)

        copies = family_to_export(model).copies
        return peft_lora.from_peft(keys, tensors, model, _table(model), copies, read_base)
    if kind == "PREFIX_TUNING":
        return peft_prompts.prefix_from_peft(keys, tensors, model)
    if kind == "PROMPT_TUNING":
        return peft_prompts.prompt_from_peft(keys, tensors, model)
    raise ConversionError(
        "cannot be taken: there are LORA, PREFIX_TUNING and PROMPT_TUNING", field=f"{CONFIG}: peft_type", value=kind
    )


def _table(model: ModelConfig) -> list[Entry]:
    family = family_to_export(model)
    return family.table(model, HfConfig(family.to_hf(model, {})))


def _count(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
