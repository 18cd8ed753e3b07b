"""Adaptations by name: which files they are in, and that they belong to the base."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from lmscale.adapt.table import AdapterTable
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.config.model import ModelConfig
from lmscale.errors import CheckpointError, ConfigError
from lmscale.models.build import SequentialModel
from lmscale.models.context import ModelContext
from lmscale.train.adapted import StoredAdaptation, check_base, is_adaptation, open_adaptation, split_entry
from lmscale.train.base import hash_weights
from lmscale.train.checkpoint_reader import CheckpointReader

DEFAULT_SLOTS = 64
_WHEREFROM = {"preset", "init_from", "init"}


class Shelf:
    """The checkpoints of adaptations of one base. Their manifests are read at once, the rest when they are opened.

    Raises:
        CheckpointError: if one is missing, a whole model, or of another base.
    Collectives: as of `hash_weights`.
    """

    def __init__(self, base: CheckpointReader, model: ModelConfig, adapters: Mapping[str, str | Path]):
        self._model, self._paths = model, {name: str(path) for name, path in adapters.items()}
        weights_hash = hash_weights(base)
        for path in self._paths.values():
            reader = CheckpointReader(resolve_checkpoint(split_entry(path)[0]))
            if not is_adaptation(reader):
                raise CheckpointError("is a whole model, and no adaptation of one", field="adapters", value=path)
            check_base(reader, base, weights_hash)

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return tuple(self._paths)

    def open(self, name: str) -> StoredAdaptation:
        """Open an adaptation.

        Raises:
            ConfigError: if no adaptation has the name, or it has a task's head.
            CheckpointError: if it is of another model.
        """
        self.check(name)
        stored, _ = open_adaptation(self._paths[name])
        if stored.adaptation.model.model_dump(exclude=_WHEREFROM) != self._model.model_dump(exclude=_WHEREFROM):
            raise CheckpointError("is of another model than the base", field=f"adapter {name}", value=self._paths[name])
        if stored.adaptation.head is not None:
            raise ConfigError(
                "has a task's head, and no language model's", field=f"adapter {name}", value=self._paths[name]
            )
        return stored

    def check(self, name: str) -> None:
        """Check that there is an adaptation of a name.

        Raises:
            ConfigError: naming the nearest.
        """
        if name not in self._paths:
            near = difflib.get_close_matches(name, self._paths, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(self._paths)[:5])}"
            raise ConfigError("there is no such adaptation", field="adapter", value=name, remedy=hint)


def open_table(module: SequentialModel, context: ModelContext, shelf: Shelf, slots: int) -> AdapterTable:
    """Make the table of a base that was built, over the adaptations of a shelf."""
    return AdapterTable(module, context, shelf.open, shelf.check, slots)
