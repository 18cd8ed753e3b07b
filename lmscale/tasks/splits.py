"""The files of a task, read: examples of train, dev and each test set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lmscale.config.task import Domain, TaskConfig, label_name
from lmscale.errors import ConfigError, DataError
from lmscale.tasks.fields import text_of, words_of
from lmscale.tasks.files import Example, read_examples
from lmscale.tasks.items import Names, label_of
from lmscale.tasks.labels import Labels
from lmscale.tasks.metrics import is_bio
from lmscale.tasks.texts import Ints


@dataclass(frozen=True)
class Files:
    """Examples by the name of their split.

    Attributes:
        examples: in the order of train, dev, test sets.
        domains: of each.
    """

    examples: dict[str, list[Example]]
    domains: dict[str, Domain]


def read_files(task: TaskConfig) -> Files:
    """Read all files of a task.

    Raises:
        DataError: if one is missing or broken.
    """
    named: list[tuple[str, str, str, Domain]] = [("train", task.train, "task.train", "in")]
    if task.dev is not None:
        named.append(("dev", task.dev, "task.dev", "in"))
    named += [(test.name, test.path, f"task.test.{number}.path", test.domain) for number, test in enumerate(task.test)]
    examples = {name: read_examples(path, field, task.limit_of(name)) for name, path, field, _ in named}
    return Files(examples, {name: domain for name, _, _, domain in named})


def read_labels(task: TaskConfig, files: Files) -> Labels | None:
    """Return the classes of a task: those that the config lists, or those of the training examples; None of other tasks.

    Raises:
        DataError: if a label is missing, or all are equal.
        ConfigError: if the metric that decides is of other classes.
    """
    names = Names.of(task.columns)
    if task.kind == "classification":
        seen = {label_of(example, names.label) for example in files.examples["train"]}
    elif task.kind == "token_classification":
        seen = {tag for example in files.examples["train"] for tag in words_of(example, names.tags)}
    else:
        return None
    labels = Labels(map(label_name, task.labels), is_listed=True) if task.labels is not None else Labels.seen(seen)
    if task.kind == "classification" and task.metric == "f1" and len(labels.names) != 2:
        raise ConfigError(
            f"is of two classes, and there are {len(labels.names)}",
            field="task.metric",
            value="f1",
            remedy="use macro_f1",
        )
    if task.metric == "span_f1" and not is_bio(labels.names):
        raise ConfigError(
            "is of classes B-X, I-X and O, and there are others",
            field="task.metric",
            value="span_f1",
            remedy="use token_f1",
        )
    return labels


def read_entries(task: TaskConfig, files: Files) -> dict[str, Ints]:
    """Return the number of each example's adaptation, by split: int64 [examples]; nothing where there is one for all.

    Raises:
        DataError: if a name is missing, or is not known.
    """
    if task.columns.entry is None:
        return {}
    names = {name: number for number, name in enumerate(entry_names(task, files))}
    found = {}
    for split, examples in files.examples.items():
        numbers = []
        for example in examples:
            name = text_of(example, task.columns.entry)
            if name not in names:
                raise DataError(
                    f"column {task.columns.entry!r} is {name!r}, which trains nothing",
                    field=example.place,
                    remedy="known are " + ", ".join(list(names)[:20]),
                )
            numbers.append(names[name])
        found[split] = np.array(numbers, np.int64)
    return found


def entry_names(task: TaskConfig, files: Files) -> list[str]:
    """Return the names of the adaptations: those that the config lists, or those of the training examples, sorted."""
    column = task.columns.entry
    assert column is not None
    return task.entries or sorted({text_of(example, column) for example in files.examples["train"]})
