"""Tasks with a head: splits, and metrics of what the head gave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lmscale.config.task import HEADS, METRICS_OF, TaskConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.tasks import metrics
from lmscale.tasks.base import Measure, Predictions, Rows, Split, Task
from lmscale.tasks.files import Example
from lmscale.tasks.head_rows import Frame, SentenceRows, WordRows
from lmscale.tasks.items import Names, read_question, read_sentence, read_words
from lmscale.tasks.labels import Labels
from lmscale.tasks.span_rows import SpanRows
from lmscale.tasks.splits import Files


def read_items(task: TaskConfig, labels: Labels | None) -> Callable[[Example], Any]:
    """Return what makes an item of an example of a task."""
    names = Names.of(task.columns)
    if task.kind == "token_classification":
        assert labels is not None
        known = labels
        return lambda example: read_words(example, names, known)
    if task.kind == "extractive_qa":
        return lambda example: read_question(example, names)
    return lambda example: read_sentence(example, names, labels)


def build_head_task(task: TaskConfig, files: Files, labels: Labels | None, tokenizer: Tokenizer, frame: Frame) -> Task:
    """Make the splits of a task with a head.

    Raises:
        DataError: if an example is wrong.
        ConfigError: if the rows leave no room.
    """
    read = read_items(task, labels)
    items = {name: [read(example) for example in examples] for name, examples in files.examples.items()}
    makers = {name: _maker(task, each, tokenizer, frame) for name, each in items.items()}
    splits = {
        name: Split(name, files.domains[name], Rows(maker, len(items[name])), _references(items[name]), maker)
        for name, maker in makers.items()
    }
    names = () if labels is None else labels.names
    outputs = {"span": 2, "value": 1}.get(HEADS[task.kind], len(names))
    metric = task.metric or _default_metric(task, names)
    measure = _measure(task, names, items, frame)
    return Task(HEADS[task.kind], outputs, names, metric, 0, splits, measure)


def _maker(task: TaskConfig, items: list[Any], tokenizer: Tokenizer, frame: Frame) -> Any:
    if task.kind == "token_classification":
        return WordRows(items, tokenizer, frame)
    if task.kind == "extractive_qa":
        return SpanRows(items, tokenizer, frame, task)
    return SentenceRows(items, tokenizer, frame, task.kind == "regression")


def _references(items: list[Any]) -> list[list[str]]:
    return [[text for text, _ in getattr(item, "answers", [])] or [] for item in items]


def _default_metric(task: TaskConfig, labels: tuple[str, ...]) -> str:
    if task.kind == "token_classification" and not metrics.is_bio(labels):
        return "token_f1"
    return METRICS_OF[task.kind][0]


def _measure(task: TaskConfig, labels: tuple[str, ...], items: Mapping[str, list[Any]], frame: Frame) -> Measure:
    may_be_absent = task.kind == "extractive_qa" and any(not item.answers for item in items["train"])

    def classes(split: Split, predictions: Predictions) -> dict[str, float]:
        logits = metrics.shaped(predictions, split.num_rows, 1, len(labels))
        return metrics.classification(split.gold.gold.astype(np.int64), logits[:, 0].argmax(-1), len(labels))

    def value(split: Split, predictions: Predictions) -> dict[str, float]:
        numbers = metrics.shaped(predictions, split.num_rows, 1, 1)[:, 0, 0]
        return metrics.regression(split.gold.gold, numbers.astype(np.float64))

    def words(split: Split, predictions: Predictions) -> dict[str, float]:
        logits = metrics.shaped(predictions, split.num_rows, frame.width, len(labels))
        rows: WordRows = split.gold
        chosen = logits[rows.word_rows, rows.word_places].argmax(-1)
        borders = np.cumsum(rows.counts)[:-1]
        gold, ours = (
            [[labels[number] for number in part] for part in np.split(numbers, borders)]
            for numbers in (rows.gold, chosen)
        )
        return metrics.token_classification(gold, ours, labels)

    def span(split: Split, predictions: Predictions) -> dict[str, float]:
        scores = metrics.shaped(predictions, split.num_rows, 2, frame.width)
        rows: SpanRows = split.gold
        references = [[text for text, _ in item.answers] or [""] for item in rows.items]
        return metrics.question_answering(rows.answers(scores, may_be_absent), references)

    return {"classes": classes, "value": value, "token_classes": words, "span": span}[HEADS[task.kind]]
