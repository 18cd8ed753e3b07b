"""A Hugging Face directory to a checkpoint: config, weights and tokenizer, one tensor in memory at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmscale.config.check import CROSS_SECTION_RULES
from lmscale.config.io import parse_run, show
from lmscale.config.model import VOCAB_MULTIPLE, ModelConfig
from lmscale.config.run import RunConfig
from lmscale.convert.family import Family
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.hf_directory import HfDirectory
from lmscale.convert.mapping import Entry
from lmscale.convert.native import NativeWriter
from lmscale.convert.output import check_free, new_directory
from lmscale.convert.registry import family_to_import
from lmscale.convert.shapes import logical_shape
from lmscale.convert.tokenizer_files import copy_from_hf, count_entries
from lmscale.errors import ConversionError

_LONGEST_SAMPLE = 4096
_NO_CORPUS = "none: these weights were imported"


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        model_type: their architecture.
        num_parameters: of the model, at the logical vocabulary, tied ones once.
        notes: what was left out or could not be expressed, one line each.
    """

    model_type: str
    num_parameters: int
    notes: list[str]


def import_hf(source: Path, target: Path) -> Converted:
    """Write a checkpoint from a directory of transformers' save_pretrained.

    Nothing is written before config, names, shapes and tokenizer are found right.

    Args:
        source: config.json, safetensors and, if there are any, the tokenizer's files.
        target: the checkpoint's directory, a new one.

    Raises:
        ConversionError: if the model is none that lmscale can build, if a tensor is missing, left over or of a wrong
            shape, if the tokenizer is of another vocabulary, or if the target exists.
        RunError: if the checkpoint cannot be written.
    """
    check_free(target)
    if not source.is_dir():
        raise ConversionError("is no directory", field="HF_DIR", value=str(source), remedy="download the model first")
    hf = HfConfig.read(source)
    family = family_to_import(hf)
    weights = HfDirectory(source, family.prefix)
    keys = family.to_model(hf, weights)
    entries = count_entries(source)
    config = _run_config(keys, target if entries else None)
    table = family.table(config.model, hf)
    notes = _check_tensors(family, weights, table, config.model)
    notes += _dropout_notes(family, hf, config.model) + _tokenizer_notes(source, entries, config.model)
    with new_directory(target) as partial:
        if entries:
            copy_from_hf(source, partial / "tokenizer", hf.keys)
        writer = NativeWriter(partial)
        for one in table:
            writer.add(one.ours, one.to_ours([weights.read(name) for name in one.theirs]))
        writer.finish(show(config))
    num_parameters = sum(torch.Size(weights.shape(name)).numel() for one in table for name in one.theirs)
    return Converted(family.model_type, num_parameters, notes)


def _run_config(model: dict[str, Any], with_tokenizer: Path | None) -> RunConfig:
    """Make the config of a run around a model: what loading and evaluation read; the rest is a placeholder."""
    tokenizer = None if with_tokenizer is None else {"type": "hf", "path": str(with_tokenizer / "tokenizer")}
    config = parse_run(
        {
            "model": model,
            "tokenizer": tokenizer,
            "data": {
                "train": [{"prefix": _NO_CORPUS}],
                "seq_length": min(model["max_position_embeddings"], _LONGEST_SAMPLE),
            },
            "batch": {"micro_batch_size": 1, "global_batch_size": 1},
            "optim": {"lr": 1e-4},
            "train": {"train_tokens": 1},
            "output_dir": ".",
        }
    )
    for rule in CROSS_SECTION_RULES:
        rule(config)
    return config


def _check_tensors(family: Family, weights: HfDirectory, table: list[Entry], model: ModelConfig) -> list[str]:
    """Compare the directory's tensors with the table: names, copies, shapes, dtypes; return what is left out."""
    wanted = {name for one in table for name in one.theirs}
    missing = sorted(wanted - weights.names)
    if missing:
        raise ConversionError(f"lacks {_some(missing)}", field=str(weights.path))
    left_out, unknown = [], []
    for name in sorted(weights.names - wanted):
        if name in family.copies:
            _check_copy(weights, name, family.copies[name])
        elif _matches(name, family.left_out):
            left_out.append(name)
        elif not _matches(name, family.buffers):
            unknown.append(name)
    if unknown:
        raise ConversionError(
            f"holds {_some(unknown)}, which a {family.model_type} of lmscale has not",
            field=str(weights.path),
            remedy=f"save it as {family.architectures[0]}",
        )
    for one in table:
        for name, shape in zip(one.theirs, one.their_shapes(logical_shape(model, one.ours)), strict=True):
            if weights.shape(name) != shape:
                raise ConversionError(
                    f"has the shape {weights.shape(name)}, and by config.json {shape}", field=f"{weights.path}: {name}"
                )
            weights.check_dtype(name)
    return [f"left out: {name}, which no objective trains" for name in left_out]


def _check_copy(weights: HfDirectory, copy: str, original: str) -> None:
    if not torch.equal(weights.read(copy).flatten(), weights.read(original).flatten()):
        raise ConversionError(
            f"differs from {original}, and config.json or the architecture says that they are one",
            field=f"{weights.path}: {copy}",
        )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _dropout_notes(family: Family, hf: HfConfig, model: ModelConfig) -> list[str]:
    """Say which dropouts do not come back as they were: ours are fewer than theirs."""
    back = family.to_hf(model, {})
    keys = (key for key in back if "drop" in key and hf.get(key, back[key]) != back[key])
    return [f"{key} = {hf.get(key)} becomes {back[key]}" for key in keys]


def _tokenizer_notes(source: Path, entries: int | None, model: ModelConfig) -> list[str]:
    if entries is None:
        return ["without a tokenizer: the directory holds none"]
    if not 0 <= model.vocab_size - entries < VOCAB_MULTIPLE:
        raise ConversionError(
            f"its tokenizer has {entries} ids, and config.json says vocab_size = {model.vocab_size}",
            field=str(source),
            remedy="put the model's own tokenizer there, or none",
        )
    if model.vocab_size in (entries, -(-entries // VOCAB_MULTIPLE) * VOCAB_MULTIPLE):
        return []
    return [
        f"the tokenizer has {entries} ids, the table {model.vocab_size} rows: train with model.vocab_size={entries}"
    ]
