"""Rules of the section `task`: it has files of its own in the place of corpora, and each of its keys is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lmscale.config.adapt import ProbingConfig, num_adaptations
from lmscale.config.data import DataConfig
from lmscale.config.objective import CausalLMConfig
from lmscale.config.run import RunConfig
from lmscale.config.task import COLUMNS_OF, METRICS_OF, TaskColumns, TaskConfig, label_name
from lmscale.config.validation import nearest
from lmscale.errors import ConfigError

_RESERVED = ("train", "dev")


def _task_or_corpora(config: RunConfig) -> None:
    data = config.data
    if config.task is None:
        if not data.train:
            raise ConfigError(
                "is required and missing",
                field="data.train",
                remedy="name a corpus, or the section task to adapt to one",
            )
        return
    for key in ("train", "valid", "seq_length_stages", "reset_attention_mask", "split"):
        if getattr(data, key) != DataConfig.model_fields[key].default:
            raise ConfigError(
                "is of corpora, and the run has a task, with files of its own",
                field=f"data.{key}",
                value=_short(getattr(data, key)),
                remedy="leave it out",
            )
    if config.tokenizer is None:
        raise ConfigError("is required by a task", field="tokenizer", remedy="add the section")


def _short(value: Any) -> Any:
    """Show the first of a list of sections, not their repr."""
    first = value[0] if isinstance(value, list) and value else value
    return getattr(first, "prefix", first)


def _output_fits(config: RunConfig) -> None:
    task, architecture = config.task, config.model.architecture
    if task is None:
        return
    output = task.output_of(architecture)
    if output == "text":
        if config.model.is_encoder_only:
            raise ConfigError(f"{architecture} writes no text", field="task.output", value=output, remedy="use head")
        if task.kind == "token_classification":
            raise ConfigError(
                f"needs a head over each word, and {architecture} writes text",
                field="task.kind",
                value=task.kind,
                remedy="use bert or roberta",
            )
        return
    if architecture in ("t5", "bart") and not isinstance(config.adapt, ProbingConfig):
        raise ConfigError(
            f"{architecture} takes no head but to probe its encoder",
            field="task.output",
            value=output,
            remedy="use text",
        )
    if task.kind == "generation":
        raise ConfigError(
            f"writes text, and {architecture} with a head does not",
            field="task.kind",
            value=task.kind,
            remedy="use gpt, t5 or bart with task.output: text",
        )
    if isinstance(config.objective, CausalLMConfig) and config.objective.prefix_lm:
        raise ConfigError(
            "says what text is written behind, and a head writes none",
            field="objective.prefix_lm",
            value=True,
            remedy="set it to false, or use task.output: text",
        )
    if isinstance(config.adapt, ProbingConfig):
        return
    if architecture == "gpt" and task.kind not in ("classification", "regression"):
        raise ConfigError(
            "gpt, whose tokens do not see what follows, takes a head for classification and regression only",
            field="task.output",
            value=output,
            remedy="use bert or roberta, or task.output: text",
        )


def _task_keys_are_read(config: RunConfig) -> None:
    task = config.task
    if task is None:
        return
    for key, reader in _unread(task, task.output_of(config.model.architecture) == "text", config.model.architecture):
        value = getattr(task, key)
        if value != TaskConfig.model_fields[key].default:
            raise ConfigError(f"is read with {reader} only", field=f"task.{key}", value=value, remedy="leave it out")


def _unread(task: TaskConfig, is_text: bool, architecture: str) -> Iterator[tuple[str, str]]:
    """Yield (key, what would read it) of the keys that nothing reads."""
    kind = task.kind
    is_chat = task.columns.messages is not None
    if not is_text or is_chat:
        yield from ((key, "task.output: text and without columns.messages") for key in ("template", "target_template"))
    if kind not in ("classification", "token_classification"):
        yield "labels", "task.kind: classification or token_classification"
    if kind != "classification" or not is_text:
        yield "label_words", "task.kind: classification and task.output: text"
    if not is_chat:
        yield "roles", "task.columns.messages"
    if not is_text or kind == "classification":
        yield "max_new_tokens", "task.output: text, where text is written,"
    if kind != "generation":
        yield "label_smoothing", "task.kind: generation"
    if not is_text or architecture not in ("gpt", "t5"):
        yield "packed", "task.output: text of gpt and t5"
    if is_text or kind != "extractive_qa":
        yield from ((key, "task.kind: extractive_qa and a head") for key in ("window_step", "max_answer_tokens"))
    if task.dev is None:
        yield from ((key, "task.dev") for key in ("patience", "metric", "dev_limit"))
    if not task.test:
        yield "test_limit", "task.test"


def _columns_are_read(config: RunConfig) -> None:
    task = config.task
    if task is None:
        return
    columns = task.columns
    for key in TaskColumns.model_fields:
        value = getattr(columns, key)
        if value is None:
            continue
        if key not in COLUMNS_OF[task.kind]:
            raise ConfigError(
                f"is not of task.kind: {task.kind}",
                field=f"task.columns.{key}",
                value=value,
                remedy="it has " + ", ".join(COLUMNS_OF[task.kind]),
            )
        if columns.messages is not None and key in ("text", "target"):
            raise ConfigError(
                "is given beside columns.messages, which stands in its place",
                field=f"task.columns.{key}",
                value=value,
                remedy="leave out one of the two",
            )


def _entries_are_told_apart(config: RunConfig) -> None:
    task, count = config.task, num_adaptations(config.adapt)
    if task is None:
        return
    entry = task.columns.entry
    if entry is None and count > 1:
        raise ConfigError(
            f"is required by adapt.entries = {count}: it says whose adaptation a row trains", field="task.columns.entry"
        )
    if entry is not None and count == 1:
        raise ConfigError("is read with adapt.entries above 1 only", field="task.columns.entry", value=entry)
    if entry is not None and task.packed:
        raise ConfigError("puts rows of several adaptations into one", field="task.packed", value=True)
    if task.entries is None:
        return
    if entry is None:
        raise ConfigError("is read with task.columns.entry only", field="task.entries", value=task.entries)
    if len(task.entries) != count or len(set(task.entries)) != count:
        raise ConfigError(
            f"must be as many different names as adapt.entries = {count}", field="task.entries", value=task.entries
        )


def _metric_is_of_kind(config: RunConfig) -> None:
    task = config.task
    if task is None or task.metric is None:
        return
    names = METRICS_OF[task.kind]
    if task.metric not in names:
        raise ConfigError(
            f"is no metric of task.kind: {task.kind}",
            field="task.metric",
            value=task.metric,
            remedy=nearest(task.metric, names),
        )


def _sets_are_distinct(config: RunConfig) -> None:
    if config.task is None:
        return
    names = [test.name for test in config.task.test]
    for number, name in enumerate(names):
        if name in _RESERVED or name in names[:number]:
            raise ConfigError("is the name of another set", field=f"task.test.{number}.name", value=name)


def _labels_are_distinct(config: RunConfig) -> None:
    task = config.task
    if task is None or task.labels is None:
        return
    names = [label_name(label) for label in task.labels]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("is given twice", field="task.labels", value=name)


TASK_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _task_or_corpora,
    _output_fits,
    _entries_are_told_apart,
    _columns_are_read,
    _task_keys_are_read,
    _metric_is_of_kind,
    _sets_are_distinct,
    _labels_are_distinct,
)
