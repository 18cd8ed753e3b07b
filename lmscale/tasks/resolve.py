"""What a run's config leaves to the files of its task: the classes, and the length of the run.

What reads files is imported where there is a task: `lmscale preview` of a run without one needs no numpy.
"""

from __future__ import annotations

import math

from lmscale.config.adapt import num_adaptations
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError


def resolve_task(config: RunConfig, room: int = 0) -> RunConfig:
    """List the classes of a task, and say in tokens how long a run and its warm-up are.

    A run of E epochs over R rows takes ceil(E R / B) steps of B = batch.global_batch_size rows, each of the nominal length.

    Args:
        config: of a run.
        room: as of `build_task`.

    Returns:
        The same config where it says everything already.

    Raises:
        DataError: if a file of the task is wrong.
        ConfigError: if a length is given twice, or in epochs without a task.
    """
    if config.task is not None and config.task.kind in ("classification", "token_classification"):
        from lmscale.tasks.splits import read_files, read_labels

        labels = read_labels(config.task, read_files(config.task))
        assert labels is not None
        config = config.model_copy(update={"task": config.task.model_copy(update={"labels": list(labels.names)})})
    config = _with_entries(config)
    if config.train.epochs is not None:
        tokens = _tokens_of(config, config.train.epochs, room)
        if config.train.train_tokens not in (0, tokens):
            raise ConfigError(
                f"train.epochs = {config.train.epochs:g} come to {tokens}",
                field="train.train_tokens",
                value=config.train.train_tokens,
                remedy="give one of them",
            )
        config = config.model_copy(update={"train": config.train.model_copy(update={"train_tokens": tokens})})
    return _with_warmup(config)


def _with_entries(config: RunConfig) -> RunConfig:
    """List the names of several adaptations."""
    task, count = config.task, num_adaptations(config.adapt)
    if task is None or task.columns.entry is None or count == 1:
        return config
    from lmscale.tasks.splits import entry_names, read_files

    names = entry_names(task, read_files(task))
    if len(names) != count:
        raise ConfigError(
            f"column {task.columns.entry!r} of task.train has {len(names)} names", field="adapt.entries", value=count
        )
    return config.model_copy(update={"task": task.model_copy(update={"entries": names})})


def _tokens_of(config: RunConfig, epochs: float, room: int) -> int:
    if config.task is None or config.tokenizer is None:
        raise ConfigError("is of tasks", field="train.epochs", value=epochs, remedy="give train.train_tokens")
    if config.batch.ramp is not None or config.batch.stages:
        raise ConfigError(
            "counts steps of one size, and the batch grows",
            field="train.epochs",
            value=epochs,
            remedy="give train.train_tokens",
        )
    from lmscale.data.tokenizer import load_tokenizer
    from lmscale.tasks.build import build_task

    rows = build_task(config, load_tokenizer(config.tokenizer), room).splits["train"].num_rows
    steps = max(1, math.ceil(epochs * rows / config.batch.global_batch_size))
    return steps * config.batch.global_batch_size * config.lengths.nominal


def _with_warmup(config: RunConfig) -> RunConfig:
    fraction = config.optim.lr_warmup_fraction
    if fraction is None:
        return config
    tokens = round(fraction * config.train.train_tokens)
    if config.optim.lr_warmup_tokens not in (0, tokens):
        raise ConfigError(
            f"optim.lr_warmup_fraction = {fraction:g} comes to {tokens}",
            field="optim.lr_warmup_tokens",
            value=config.optim.lr_warmup_tokens,
            remedy="give one of them",
        )
    return config.model_copy(update={"optim": config.optim.model_copy(update={"lr_warmup_tokens": tokens})})
