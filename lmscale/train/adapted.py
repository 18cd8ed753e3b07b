"""Checkpoints of adaptations, opened together with the base that they belong to.

What is read is what the adapted model holds: keys and values that a network makes while they are trained come as the
table that it makes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmscale.adapt.prefix import NETWORK_PARAMETERS, fixed, make_table, network_key
from lmscale.config.adapt import PrefixTuningConfig, PTuningV2Config, num_adaptations
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.io import load_run
from lmscale.config.run import RunConfig
from lmscale.errors import CheckpointError, ConfigError
from lmscale.plan.adaptation import POOLER, Adaptation, adaptation_of, attentions, own_shapes, row_bias_of
from lmscale.plan.names import Shape
from lmscale.train.base import hash_weights
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader, tp_slice
from lmscale.train.fragments import LogicalTensor

_PREFIXES = (PrefixTuningConfig, PTuningV2Config)


@dataclass(frozen=True)
class StoredAdaptation:
    """What a checkpoint of an adaptation holds, by logical name.

    Attributes:
        reader: the checkpoint.
        adaptation: what it does to its base, its keys and values being tables.
        trained: as it was trained.
        entry: which of several that stand side by side in the checkpoint; None where it holds one.
    """

    reader: CheckpointReader
    adaptation: Adaptation
    trained: Adaptation
    entry: int | None = None

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of the tensors that the adapted model has in the place of the base's, or beside them."""
        return _trained_shapes(self.adaptation)

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor, fp32 on the CPU."""
        if name in self._kinds:
            network = [self._stored(f"{network_key(self._kinds[name])}.{part}") for part in NETWORK_PARAMETERS]
            layer = [self._stored(f"{name.removesuffix('table')}{part}") for part in ("weight", "bias")]
            return make_table(*network, *layer, self.adaptation.model)
        return self._stored(name)

    def choose(self, entry: int | None) -> StoredAdaptation:
        """Return one of several that stand side by side, from 0; None where there is one.

        Raises:
            ConfigError: if there are several and none is named, or the checkpoint has no such entry.
        """
        number = num_adaptations(self.trained.adapt)
        if entry is None:
            check_one(self)
            return self
        if not 0 <= entry < number:
            raise ConfigError(
                f"the checkpoint holds {number}, from #0",
                field=f"{self.reader.path}#",
                value=entry,
                remedy="name another",
            )
        if number == 1:
            return self
        alone = self.adaptation.adapt.model_copy(update={"entries": 1})  # type: ignore[union-attr]
        return replace(self, adaptation=replace(self.adaptation, adapt=alone), entry=entry)

    def slice_of(self, tensor: LogicalTensor, tp_rank: int, tp_size: int) -> torch.Tensor:
        """Read a tensor-parallel rank's part of a tensor."""
        return tp_slice(self.read(tensor.name), tensor.tp_dim, tensor.tp_stride, tp_rank, tp_size)

    def _stored(self, name: str) -> torch.Tensor:
        if self.entry is None:
            return self.reader.logical(PARAMETER, name)
        name = row_bias_of(name) if row_bias_of(name) in self._side_by_side else name
        tensor = self.reader.logical(PARAMETER, name)
        return tensor[self.entry] if name in self._side_by_side else tensor

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        """Of tables that a network makes: which attentions' it is."""
        adapt = self.trained.adapt
        is_made = isinstance(adapt, _PREFIXES) and adapt.projection is not None
        tables = attentions(self.adaptation.model) if is_made else []
        return {f"{name}.prefix.table": kind for name, kind, _ in tables}

    @functools.cached_property
    def _side_by_side(self) -> dict[str, Shape]:
        assert self.trained.adapt is not None
        return own_shapes(self.trained.model, self.trained.adapt)


def split_entry(name: str) -> tuple[Path, str | None]:
    """Read PATH, or PATH#ENTRY for one of the adaptations that stand side by side in a checkpoint."""
    path, mark, entry = name.rpartition("#")
    return (Path(path), entry) if mark and entry and not Path(name).exists() else (Path(name), None)


def open_adaptation(checkpoint: str | Path) -> tuple[StoredAdaptation, RunConfig]:
    """Open a checkpoint of an adaptation: a directory of a checkpoint or a run.

    Args:
        checkpoint: the path; with #N for one of several, from 0, or #NAME where its task names them.

    Raises:
        CheckpointError: if it is none.
        ConfigError: if it holds several and none of them is named.
    """
    path, entry = split_entry(str(checkpoint))
    path = resolve_checkpoint(path)
    config = load_run(path / "config.yaml")
    stored = stored_adaptation(CheckpointReader(path), config)
    return stored.choose(None if entry is None else _number_of(entry, config, path)), config


def _number_of(entry: str, config: RunConfig, path: Path) -> int:
    names = (config.task.entries if config.task is not None else None) or []
    if entry in names:
        return names.index(entry)
    if not entry.isdecimal():
        known = f"one of {', '.join(names)}" if names else "a number from 0"
        raise ConfigError("is none of its adaptations", field=f"{path}#", value=entry, remedy=f"give {known}")
    return int(entry)


def is_adaptation(reader: CheckpointReader) -> bool:
    """Tell whether a checkpoint holds an adaptation alone."""
    return reader.manifest.get("base") is not None


def stored_adaptation(reader: CheckpointReader, config: RunConfig) -> StoredAdaptation:
    """Describe what a checkpoint of an adaptation holds.

    Raises:
        CheckpointError: if it is none, or its tensors are not those of its config.
    """
    trained = adaptation_of(config)
    if not is_adaptation(reader) or trained is None or trained.adapt is None:
        raise CheckpointError(
            "is a whole model, and no adaptation of one",
            field="checkpoint",
            value=str(reader.path),
            remedy="name a checkpoint whose config.yaml has an adapt section other than full",
        )
    check_same_tensors(reader, _trained_shapes(trained))
    made = fixed(trained.adapt) if isinstance(trained.adapt, _PREFIXES) else trained.adapt
    return StoredAdaptation(reader, replace(trained, adapt=made), trained)


def check_one(stored: StoredAdaptation) -> None:
    """Check that a checkpoint holds one adaptation, not several side by side.

    Raises:
        ConfigError: if there are several.
    """
    number = num_adaptations(stored.adaptation.adapt)
    if number > 1:
        raise ConfigError(
            f"holds {number} adaptations side by side",
            field="checkpoint",
            value=str(stored.reader.path),
            remedy="load its base with adapters={name: 'PATH#0'}; #0 is the first",
        )


def open_base(reader: CheckpointReader, base: Path | None = None) -> CheckpointReader:
    """Open the base of an adaptation and check that it is the one.

    Args:
        reader: the adaptation's checkpoint.
        base: a checkpoint, or a run's directory; None takes the path that the adaptation was trained from.

    Raises:
        CheckpointError: if the base is not there, is an adaptation itself, or has other weights.
    Collectives: as of `hash_weights`.
    """
    recorded = Path(reader.manifest["base"]["path"])
    if base is None and not recorded.is_dir():
        raise CheckpointError(
            f"belongs to the base {recorded}, which is not there",
            field="checkpoint",
            value=str(reader.path),
            remedy="say where it is: base=PATH in Python, --base PATH on the command line",
        )
    opened = CheckpointReader(resolve_checkpoint(base or recorded))
    check_whole(opened)
    check_base(reader, opened, hash_weights(opened))
    return opened


def check_whole(base: CheckpointReader) -> None:
    """Check that a base is a whole model.

    Raises:
        CheckpointError: if it is an adaptation.
    """
    if is_adaptation(base):
        raise CheckpointError(
            "is an adaptation itself, and no base",
            field="base",
            value=str(base.path),
            remedy="merge it first (lmscale adapter merge)",
        )


def check_base(reader: CheckpointReader, base: CheckpointReader, weights_hash: str) -> None:
    """Check that an adaptation belongs to a base, whose weights have a hash.

    Raises:
        CheckpointError: naming both, if it does not.
    """
    wanted: dict[str, Any] = reader.manifest["base"]
    if wanted["weights_hash"] != weights_hash:
        raise CheckpointError(
            f"belongs to another base: {wanted['path']}, weights {wanted['weights_hash'][:12]}; "
            f"{base.path} has weights {weights_hash[:12]}",
            field="checkpoint",
            value=str(reader.path),
            remedy="name its own base",
        )


def name_in_base(name: str, stored: dict[str, Shape]) -> str:
    """Return what a parameter is called in the base: a task's pooler is that of next-sentence prediction, if it has one."""
    former = name.replace(POOLER, "masked_head.pooler", 1) if name.startswith(POOLER) else name
    return former if former in stored else name


def check_same_tensors(reader: CheckpointReader, wanted: dict[str, Shape]) -> None:
    """Check that a checkpoint holds certain tensors, and no others.

    Raises:
        CheckpointError: with the first difference.
    """
    stored = reader.shapes()
    for name in sorted(stored.keys() | wanted.keys()):
        if stored.get(name) != wanted.get(name):
            there, here = stored.get(name, "absent"), wanted.get(name, "absent")
            raise CheckpointError(
                f"{name} is {there} in its files and {here} by its config.yaml",
                field="checkpoint",
                value=str(reader.path),
            )


def _trained_shapes(adaptation: Adaptation) -> dict[str, Shape]:
    return {name: shape for name, shape in adaptation.shapes().items() if adaptation.trains(name)}
