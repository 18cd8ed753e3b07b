"""An adaptation into its base and out of it again: a checkpoint of a whole model, one logical tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lmscale.adapt.merge import check_can_merge, lora_delta, merged_places
from lmscale.config.adapt import LoraConfig
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.io import load_run, show
from lmscale.config.run import RunConfig
from lmscale.convert.native import NativeWriter
from lmscale.convert.output import check_free, new_directory
from lmscale.errors import CheckpointError
from lmscale.plan.adaptation import Adaptation
from lmscale.plan.names import parameter_shapes
from lmscale.train.adapted import StoredAdaptation, is_adaptation, name_in_base, open_adaptation, open_base
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader

Change = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        method: of the adaptation.
        num_changed: tensors of the base that it changed.
    """

    method: str
    num_changed: int


def merge_adaptation(checkpoint: str | Path, target: Path, base: Path | None = None) -> Merged:
    """Write the whole model that an adaptation makes of its base: W + scale B A for lora, in fp32, and trained biases.

    Args:
        checkpoint: of the adaptation; PATH#N for one of several.
        target: a new directory.
        base: the base's checkpoint; None takes where it was.

    Raises:
        CheckpointError: if the base is not the adaptation's own.
        ConfigError: if the method cannot be merged.
        ConversionError: if the target exists.
        RunError: if the checkpoint cannot be written.
    """
    check_free(target)
    stored, config = _mergeable(checkpoint)
    source = open_base(stored.reader, base)
    places = _changed(stored)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in stored.shapes:
            return stored.read(name)
        return tensor + _delta(stored, name) if name in places else tensor

    in_base = source.shapes()
    names = {name: name_in_base(name, in_base) for name in _names(stored.adaptation)}
    _write(source, names, change, target, _whole(config), stored.reader.path)
    return Merged(_method(stored), len(places | (stored.shapes.keys() & in_base)))


def unmerge_adaptation(checkpoint: str | Path, merged: Path, target: Path, base: Path | None = None) -> Merged:
    """Write the base again that an adaptation was merged into: W - scale B A, in fp32, within rounding.

    Biases that were trained are taken from the base, which is read for them only.

    Args:
        checkpoint: of the adaptation.
        merged: what `merge_adaptation` made of it.
        target: a new directory.
        base: as in `merge_adaptation`.

    Raises: as `merge_adaptation`; CheckpointError: if the merged model is not one of this base.
    """
    check_free(target)
    stored, _ = _mergeable(checkpoint)
    path = resolve_checkpoint(merged)
    source, config = CheckpointReader(path), load_run(path / "config.yaml")
    if is_adaptation(source) or config.model.model_dump(exclude=_WHEREFROM) != stored.adaptation.model.model_dump(
        exclude=_WHEREFROM
    ):
        raise CheckpointError(
            f"is not what {stored.reader.path} was merged into: another architecture",
            field="checkpoint",
            value=str(path),
        )
    replaced, places = stored.shapes.keys() & parameter_shapes(stored.adaptation.model).keys(), _changed(stored)
    original = open_base(stored.reader, base) if replaced else None

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if original is not None and name in replaced:
            return original.logical(PARAMETER, name)
        return tensor - _delta(stored, name) if name in places else tensor

    names = {name: name for name in source.shapes()}
    _write(source, names, change, target, config, path)
    return Merged(_method(stored), len(places | replaced))


_WHEREFROM = {"preset", "init_from", "init"}


def _mergeable(checkpoint: str | Path) -> tuple[StoredAdaptation, RunConfig]:
    stored, config = open_adaptation(checkpoint)
    assert stored.adaptation.adapt is not None
    check_can_merge(stored.adaptation.adapt)
    return stored, config


def _method(stored: StoredAdaptation) -> str:
    assert stored.adaptation.adapt is not None
    return str(stored.adaptation.adapt.method)


def _changed(stored: StoredAdaptation) -> set[str]:
    adapt = stored.adaptation.adapt
    return set(merged_places(stored.adaptation.model, adapt)) if isinstance(adapt, LoraConfig) else set()


def _delta(stored: StoredAdaptation, name: str) -> torch.Tensor:
    model, adapt = stored.adaptation.model, stored.adaptation.adapt
    assert isinstance(adapt, LoraConfig)
    return lora_delta(model, adapt, merged_places(model, adapt)[name], stored.read)


def _names(adaptation: Adaptation) -> list[str]:
    """List the tensors of the whole model; a task's head stays in the place of the language model's."""
    return list(replace(adaptation, adapt=None).shapes())


def _whole(config: RunConfig) -> RunConfig:
    """Make the config of the whole model; a section task stays, which says what its head is."""
    model, task = config.model.model_copy(update={"init_from": None}), config.task
    if task is not None:  # no column tells adaptations apart any more
        task = task.model_copy(update={"entries": None, "columns": task.columns.model_copy(update={"entry": None})})
    return config.model_copy(update={"model": model, "adapt": None, "task": task})


def _write(
    source: CheckpointReader, names: dict[str, str], change: Change, target: Path, config: RunConfig, kept: Path
) -> None:
    """Write tensors, each by its name and its name in the source, changed; and the tokenizer that lies in `kept`."""
    in_source = source.shapes()
    with new_directory(target) as partial:
        tokenizer = next((path / "tokenizer" for path in (kept, source.path) if (path / "tokenizer").is_dir()), None)
        if tokenizer is not None:
            shutil.copytree(tokenizer, partial / "tokenizer")
        writer = NativeWriter(partial)
        for name, former in names.items():
            blank = torch.empty(0)
            tensor = source.logical(PARAMETER, former) if former in in_source else blank
            writer.add(name, change(name, tensor))
        writer.finish(show(config))
