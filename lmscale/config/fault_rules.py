"""Rules of the fault policy: what cannot be watched, or not be done, is refused before a rank starts."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.faults import OverflowStormPolicy, SpikePolicy
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError


def _storms_are_of_fp16(config: RunConfig) -> None:
    if config.faults.overflow_storm is not None and config.precision != "fp16":
        raise ConfigError(
            f"counts the overflows of fp16, and precision is {config.precision}",
            field="faults.overflow_storm",
            remedy="drop the section: gradients that are not finite are faults.non_finite",
        )


def _windows_hold_what_is_asked(config: RunConfig) -> None:
    for kind, policy in config.faults.policies().items():
        if isinstance(policy, SpikePolicy) and policy.min_steps > policy.window:
            raise ConfigError(
                f"must be at most faults.{kind}.window = {policy.window}",
                field=f"faults.{kind}.min_steps",
                value=policy.min_steps,
            )
        if isinstance(policy, OverflowStormPolicy) and policy.overflows > policy.span:
            raise ConfigError(
                f"must be at most faults.{kind}.of_steps = {policy.of_steps}",
                field=f"faults.{kind}.overflows",
                value=policy.overflows,
            )


def _rewinds_find_a_checkpoint(config: RunConfig) -> None:
    for kind, policy in config.faults.policies().items():
        if policy.action != "rewind" and policy.steps_before:
            raise ConfigError(
                f"is read with faults.{kind}.action: rewind only",
                field=f"faults.{kind}.steps_before",
                value=policy.steps_before,
            )
        if policy.action == "rewind" and not (config.checkpoint.save_interval or config.checkpoint.ephemeral_minutes):
            raise ConfigError(
                "goes back to a checkpoint, and checkpoint.save_interval = 0 saves none on the way",
                field=f"faults.{kind}.action",
                value="rewind",
                remedy="set checkpoint.save_interval, or use skip or stop",
            )


FAULT_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _storms_are_of_fp16,
    _windows_hold_what_is_asked,
    _rewinds_find_a_checkpoint,
)
