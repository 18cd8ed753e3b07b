"""What a sweep may vary, as one flat table: model, optimizer, batch, layout, objective."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lmscale.config.run import RunConfig

HParam = bool | int | float | str
_SECTIONS = ("model", "objective", "parallel", "precision", "batch", "optim", "train", "adapt", "deepspeed")
_TRAIN_KEYS = ("train.train_tokens", "train.epochs", "train.seed")
"""Of the section `train` the others change no result."""


def hparams_of(config: RunConfig) -> dict[str, HParam]:
    """List the keys of a config that decide what a run comes to, by their dotted names; lists and what is left out are not."""
    values = config.model_dump(mode="json", include=set(_SECTIONS))
    return {
        key: value
        for section in _SECTIONS
        for key, value in _flat(values[section], section)
        if section != "train" or key in _TRAIN_KEYS
    }


def _flat(value: Any, key: str) -> Iterator[tuple[str, HParam]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}")
    elif isinstance(value, bool | int | float | str):
        yield key, value
