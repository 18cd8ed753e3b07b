"""Rules between the sections that say how a run is optimized: batch, optimizer, schedules, loss scale."""

from __future__ import annotations

import re
from collections.abc import Callable

from lmscale.config.optim import REGEX_PREFIX, OptimConfig
from lmscale.config.run import RunConfig
from lmscale.config.schedule_rules import SCHEDULE_RULES
from lmscale.errors import ConfigError


def _loss_scale_needs_fp16(config: RunConfig) -> None:
    scale = config.loss_scale
    if scale is None:
        return
    if config.precision != "fp16":
        raise ConfigError(
            f"scales the loss of fp16, and precision is {config.precision}",
            field="loss_scale",
            remedy="drop the section, or set precision: fp16",
        )
    if scale.initial & (scale.initial - 1):
        raise ConfigError("must be a power of two", field="loss_scale.initial", value=scale.initial)
    if scale.minimum > scale.initial:
        raise ConfigError(
            f"must be at most loss_scale.initial = {scale.initial}", field="loss_scale.minimum", value=scale.minimum
        )


def _optimizer_options_are_read(config: RunConfig) -> None:
    optim = config.optim
    if optim.adam_eps_mode == "raw" and not optim.adam_bias_correction:
        raise ConfigError(
            "is read with optim.adam_bias_correction: true only", field="optim.adam_eps_mode", value="raw"
        )
    if optim.sgd_nesterov and not optim.sgd_momentum:
        raise ConfigError("is read with optim.sgd_momentum above 0 only", field="optim.sgd_nesterov", value=True)
    for prefix, names in _OPTIONS.items():
        for key, field in OptimConfig.model_fields.items():
            if optim.name not in names and key.startswith(prefix) and getattr(optim, key) != field.default:
                raise ConfigError(
                    f"is read with optim.name: {' or '.join(names)} only",
                    field=f"optim.{key}",
                    value=getattr(optim, key),
                )


def _groups_are_sound(config: RunConfig) -> None:
    optim = config.optim
    decays = bool(optim.weight_decay or optim.weight_decay_end)
    if optim.decay_biases_and_norms and not decays:
        raise ConfigError(
            "is read with optim.weight_decay above 0 only", field="optim.decay_biases_and_norms", value=True
        )
    names = ["decay", "no_decay", "muon"]
    for index, group in enumerate(optim.groups):
        field = f"optim.groups.{index}"
        if group.name in names:
            raise ConfigError("is the name of another group", field=f"{field}.name", value=group.name)
        names.append(group.name)
        for key in ("lr_multiplier", "weight_decay_multiplier"):
            if group.frozen and getattr(group, key) != 1.0:
                raise ConfigError("is read with frozen: false only", field=f"{field}.{key}", value=getattr(group, key))
        if group.weight_decay_multiplier != 1.0 and not decays:
            raise ConfigError(
                "is read with optim.weight_decay above 0 only",
                field=f"{field}.weight_decay_multiplier",
                value=group.weight_decay_multiplier,
            )
        if group.match.startswith(REGEX_PREFIX):
            try:
                re.compile(group.match.removeprefix(REGEX_PREFIX))
            except re.error as error:
                rule = f"is no regular expression: {error}"
                raise ConfigError(rule, field=f"{field}.match", value=group.match) from None


_OPTIONS = {
    "adam_": ("adamw", "adam", "muon"),
    "adafactor_": ("adafactor",),
    "sgd_": ("sgd",),
    "lion_": ("lion",),
    "muon_": ("muon",),
}
"""Which optimizers read the keys that begin so."""


OPTIM_RULES: tuple[Callable[[RunConfig], None], ...] = (
    *SCHEDULE_RULES,
    _loss_scale_needs_fp16,
    _optimizer_options_are_read,
    _groups_are_sound,
)
