"""A checkpoint of any layout to a Hugging Face directory: config, weights and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.io import load_run
from lmscale.config.model import ModelConfig
from lmscale.config.objective import CausalLMConfig
from lmscale.config.presets import with_defaults
from lmscale.config.run import RunConfig
from lmscale.convert.family import Family, Ids
from lmscale.convert.hf_config import FILE, HfConfig
from lmscale.convert.hf_shards import DTYPES, ShardWriter
from lmscale.convert.importing import Converted
from lmscale.convert.mapping import Entry
from lmscale.convert.output import check_free, new_directory
from lmscale.convert.registry import family_to_export
from lmscale.convert.sentencepiece_to_hf import write_hf_tokenizer
from lmscale.convert.shapes import logical_shape
from lmscale.convert.tokenizer_files import SPECIAL, copy_to_hf, special_ids
from lmscale.data.tokenizer import MODEL_FILE, SentencePieceTokenizer, sentencepiece_file
from lmscale.errors import CheckpointError, ConversionError
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

_NOT_COMPARED = {"preset", "init", "init_from", "ffn_hidden_size", "num_query_groups", "head_dim"}
_RESOLVED = ("ffn_size", "query_groups", "head_size")


def export_hf(checkpoint: Path, target: Path, precision: str = "fp32") -> Converted:
    """Write a directory that transformers' from_pretrained loads.

    Args:
        checkpoint: a checkpoint's directory, or a run's, of which the newest is taken.
        target: a new directory.
        precision: fp32, bf16 or fp16, of the weights written; the checkpoint's are fp32.

    Raises:
        CheckpointError: if there is no whole checkpoint.
        ConversionError: if transformers has no architecture for the model, or the target exists.
        OutputError: if the directory cannot be written.
    """
    check_free(target)
    path = resolve_checkpoint(checkpoint)
    reader, config = CheckpointReader(path), load_run(path / "config.yaml")
    family = family_to_export(config.model)
    ids = _special_ids(config, path)
    keys = family.to_hf(config.model, ids)
    hf = HfConfig(keys)
    table = family.table(config.model, hf)
    notes = _lost(family, hf, table, config)
    _check_tensors(reader, table, config.model)
    num_parameters = 0
    with new_directory(target) as partial:
        _write_configs(partial, family, keys, precision)
        notes += _write_tokenizer(config, path, partial)
        shapes = _their_shapes(table, config.model)
        writer = ShardWriter(partial, shapes, precision)
        for one in table:
            for name, tensor in zip(one.theirs, one.to_theirs(reader.logical(PARAMETER, one.ours)), strict=True):
                writer.add(name, tensor)
                num_parameters += tensor.numel()
        writer.finish()
    return Converted(family.model_type, num_parameters, notes)


class _Planned:
    """The names of tensors that are about to be written."""

    def __init__(self, table: list[Entry]):
        self.names = {name for one in table for name in one.theirs}

    def read(self, name: str) -> torch.Tensor:
        """Never called: configs that we write leave nothing to be found out from values."""
        raise NotImplementedError(name)


def _lost(family: Family, hf: HfConfig, table: list[Entry], config: RunConfig) -> list[str]:
    """Read the config that will be written, and compare: what does not come back is refused, dropouts are noted."""
    model = config.model
    back = ModelConfig.model_validate(with_defaults(family.to_model(hf, _Planned(table))))
    notes = []
    for key in [*(name for name in ModelConfig.model_fields if name not in _NOT_COMPARED), *_RESOLVED]:
        ours, theirs = getattr(model, key), getattr(back, key)
        if ours == theirs:
            continue
        if "dropout" not in key:
            raise ConversionError(
                f"cannot be exported: transformers' {family.model_type} has {theirs!r}",
                field=f"model.{key}",
                value=ours,
            )
        notes.append(f"model.{key} = {ours} becomes {theirs} in {FILE}")
    if isinstance(config.objective, CausalLMConfig) and config.objective.prefix_lm:
        notes.append("trained with objective.prefix_lm: transformers will let no token see those behind it")
    return notes


def _check_tensors(reader: CheckpointReader, table: list[Entry], model: ModelConfig) -> None:
    stored = reader.shapes()
    wanted = {one.ours: logical_shape(model, one.ours) for one in table}
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            there, here = stored.get(name, "absent"), wanted.get(name, "absent")
            raise CheckpointError(
                f"{name} is {there} in its files and {here} by its config.yaml",
                field="checkpoint",
                value=str(reader.path),
            )


def _their_shapes(table: list[Entry], model: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for one in table:
        shapes |= zip(one.theirs, one.their_shapes(logical_shape(model, one.ours)), strict=True)
    return shapes


def _tokenizer_copy(config: RunConfig, path: Path) -> Path | None:
    copy = path / "tokenizer"
    return copy if config.tokenizer is not None and copy.is_dir() else None


def _special_ids(config: RunConfig, path: Path) -> Ids:
    copy = _tokenizer_copy(config, path)
    if copy is None or config.tokenizer is None:
        return {f"{name}_token_id": None for name in SPECIAL}
    if config.tokenizer.type == "hf":
        return special_ids(copy)
    tokenizer = SentencePieceTokenizer(_model_file(config, copy))
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL}


def _model_file(config: RunConfig, copy: Path) -> Path:
    assert config.tokenizer is not None
    file = copy / Path(config.tokenizer.path).name
    return file if file.is_file() else sentencepiece_file(copy)


def _write_configs(partial: Path, family: Family, keys: dict[str, Any], precision: str) -> None:
    architecture = keys.pop("architectures", family.architectures[:1])
    whole = {
        "architectures": list(architecture),
        "model_type": family.model_type,
        "dtype": str(DTYPES[precision]).removeprefix("torch."),
        **keys,
    }
    _write_json(partial / FILE, whole)
    if family.generates:
        ids = {key: value for key, value in keys.items() if key.endswith("_token_id") and value is not None}
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **ids})


def _write_json(file: Path, keys: dict[str, Any]) -> None:
    file.write_text(json.dumps(keys, indent=2) + "\n")


def _write_tokenizer(config: RunConfig, path: Path, partial: Path) -> list[str]:
    copy = _tokenizer_copy(config, path)
    if copy is None or config.tokenizer is None:
        return ["without a tokenizer: the checkpoint holds none"]
    if config.tokenizer.type == "hf":
        copy_to_hf(copy, partial)
        return []
    file = _model_file(config, copy)
    if write_hf_tokenizer(file, partial, config.model.architecture):
        return []
    shutil.copyfile(file, partial / MODEL_FILE)
    return ["the tokenizer is copied as tokenizer.model: read it with sentencepiece, AutoTokenizer cannot"]
