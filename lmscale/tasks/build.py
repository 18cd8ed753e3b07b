"""Build a task from its section and files."""

from __future__ import annotations

import os
from dataclasses import replace

from lmscale.config.objective import CausalLMConfig
from lmscale.config.run import RunConfig
from lmscale.config.task import TaskConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError
from lmscale.tasks.base import Task
from lmscale.tasks.head_rows import Frame
from lmscale.tasks.head_task import build_head_task
from lmscale.tasks.splits import read_entries, read_files, read_labels
from lmscale.tasks.text_task import Codec, build_text_task

_last_built: tuple[str, Task] | None = None
"""A run is checked before it starts and is then built: the same task, read and tokenized once."""


def build_task(config: RunConfig, tokenizer: Tokenizer, room: int = 0) -> Task:
    """Read the files of a run's task and make its splits; asked again for the same of the same files, return the same.

    Args:
        config: of a run with the section `task`.
        tokenizer: of the run.
        room: places at the front of each row of the encoder, or of gpt, that the caller fills: rows are data.seq_length -
            room long, and places in labels count from behind them.

    Raises:
        DataError: if a file is wrong, with its name and line, or the tokenizer lacks a token that the task needs.
        ConfigError: if keys contradict the files, or the rows leave no room.
    """
    global _last_built
    if config.task is None:
        raise ConfigError("is required and missing", field="task")
    key = _key(config, config.task, room)
    if _last_built is None or _last_built[0] != key:
        _last_built = key, _build(config, config.task, tokenizer, room)
    return _last_built[1]


def _key(config: RunConfig, task: TaskConfig, room: int) -> str:
    """Tell apart whatever decides a task's rows: keys, and the files as they are now."""
    stamps = []
    for path in (task.train, task.dev, *(test.path for test in task.test)):
        if path is not None and os.path.exists(path):
            status = os.stat(path)
            stamps.append((path, status.st_size, status.st_mtime_ns))
    parts = (task.model_dump_json(), config.lengths, config.model.architecture, repr(config.tokenizer), room, stamps)
    return repr(parts)


def _build(config: RunConfig, task: TaskConfig, tokenizer: Tokenizer, room: int) -> Task:
    architecture = config.model.architecture
    width = config.lengths.encoder - room
    if width < 1:
        raise ConfigError(
            f"leaves no place behind the {room} that the method takes",
            field="data.seq_length",
            value=config.data.seq_length,
            remedy=f"give more than {room}",
        )
    if room and task.packed:
        raise ConfigError(
            "puts several examples into a row, and the method's tokens are at the begin of the row, where one sees them",
            field="task.packed",
            value=True,
            remedy="leave it out",
        )
    files = read_files(task)
    labels = read_labels(task, files)
    if task.output_of(architecture) == "head":
        built = build_head_task(task, files, labels, tokenizer, Frame.of(architecture, tokenizer, width))
    else:
        has_prefix = isinstance(config.objective, CausalLMConfig) and config.objective.prefix_lm
        codec = Codec.of(architecture, tokenizer, width, config.lengths.decoder, has_prefix)
        built = build_text_task(task, architecture, files, labels, codec)
    entries = read_entries(task, files)
    splits = {name: split.with_entries(entries[name]) if entries else split for name, split in built.splits.items()}
    return replace(built, splits=splits)
