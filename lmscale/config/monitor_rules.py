"""Rules of the section `monitor`: what cannot be written, or nobody would see, is refused before a rank starts."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.adapt import ProbingConfig
from lmscale.config.monitor import MonitorConfig
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError


def _somebody_sees_it(config: RunConfig) -> None:
    monitor = config.monitor
    if monitor.tensorboard or monitor.wandb:
        return
    for key, is_asked in (("histogram_interval", monitor.histogram_interval), ("samples", monitor.samples)):
        if is_asked:
            remedy = "set monitor.tensorboard or monitor.wandb"
            raise ConfigError("goes to TensorBoard or W&B, and both are off", field=f"monitor.{key}", remedy=remedy)


def _samples_can_be_written(config: RunConfig) -> None:
    samples, field = config.monitor.samples, "monitor.samples"
    if samples is None:
        return
    if config.task is not None:
        raise ConfigError("is read without a task only", field=field, remedy="leave it out: the task is measured")
    if config.model.architecture != "gpt":
        architecture = config.model.architecture
        raise ConfigError(f"needs a model that goes on writing, and {architecture} does not", field=field)
    if config.tokenizer is None:
        raise ConfigError("needs the tokenizer", field=field, remedy="add the section tokenizer")
    if samples.max_new_tokens >= config.lengths.encoder:
        raise ConfigError(
            f"must leave room for a prompt in the {config.lengths.encoder} tokens of a sample",
            field=f"{field}.max_new_tokens",
            value=samples.max_new_tokens,
        )
    if not all(samples.prompts):
        raise ConfigError("must not be empty texts", field=f"{field}.prompts")


def _host_has_a_port(config: RunConfig) -> None:
    monitor = config.monitor
    if monitor.prometheus_port is None and monitor.prometheus_host != MonitorConfig().prometheus_host:
        remedy = "set it, or leave the host out"
        raise ConfigError("is read with monitor.prometheus_port only", field="monitor.prometheus_host", remedy=remedy)


def _probing_has_steps_to_watch(config: RunConfig) -> None:
    """Refuse what looks into training steps where the model takes none: probing trains classifiers on rank 0 alone."""
    if not isinstance(config.adapt, ProbingConfig):
        return
    monitor = config.monitor
    for key, value in (
        ("step_times", monitor.step_times),
        ("trace", monitor.trace),
        ("histogram_interval", monitor.histogram_interval),
    ):
        if value:
            raise ConfigError("is not read by adapt.method: probing", field=f"monitor.{key}", remedy="leave it out")


def check_traced_ranks(config: RunConfig, world_size: int) -> None:
    """Check that the ranks that are to record are there.

    Raises:
        ConfigError: if one is not.
    """
    trace = config.monitor.trace
    if trace is not None and trace.ranks and max(trace.ranks) >= world_size:
        remedy = f"the run has {world_size}, from 0 on"
        raise ConfigError(
            "names a rank that is not there", field="monitor.trace.ranks", value=trace.ranks, remedy=remedy
        )


MONITOR_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _somebody_sees_it,
    _samples_can_be_written,
    _host_has_a_port,
    _probing_has_steps_to_watch,
)
