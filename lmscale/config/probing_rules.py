"""Rules of `adapt: {method: probing}`: there is a base and a task to probe it with, and each key is read."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.adapt import ProbingConfig
from lmscale.config.run import RunConfig
from lmscale.config.task import TaskConfig
from lmscale.errors import ConfigError

_KINDS = ("classification", "regression", "token_classification", "extractive_qa")
_LEARNED = {
    "token_classification": "averages over a sequence, and token_classification has a class for each word",
    "extractive_qa": "averages over a sequence, and extractive_qa asks each token whether an answer begins there",
}
_NO_CLASSES = {"regression": "regression has no classes", "extractive_qa": "extractive_qa has no classes"}


def _probing_reads_a_base_and_a_task(config: RunConfig) -> None:
    if not isinstance(config.adapt, ProbingConfig):
        return
    for field, value in (("task", config.task), ("model.init_from", config.model.init_from)):
        if value is None:
            raise ConfigError("is required by adapt.method: probing", field=field, remedy="add it")
    assert config.task is not None
    if config.checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            "names a checkpoint, and probing has none: what it keeps are features, which are found by themselves",
            field="checkpoint.resume",
            value=config.checkpoint.resume,
            remedy="leave it out",
        )
    if config.task.kind not in _KINDS:
        raise ConfigError(
            "is no task of classes, numbers or places, which probing is for",
            field="task.kind",
            value=config.task.kind,
            remedy="use " + ", ".join(_KINDS) + ", or another adapt.method",
        )
    if config.task.output_of(config.model.architecture) == "text":
        raise ConfigError(
            "probing trains a classifier on hidden states, and this task is answered by the language-model head",
            field="task.output",
            value="text",
            remedy="use task.output: head",
        )


def _pooling_is_read(config: RunConfig) -> None:
    adapt, task = config.adapt, config.task
    if not isinstance(adapt, ProbingConfig) or task is None:
        return
    reads_tokens = task.kind in _LEARNED
    if reads_tokens and adapt.head == "attention":
        raise ConfigError(
            _LEARNED[task.kind],
            field="adapt.head",
            value=adapt.head,
            remedy="use linear or mlp",
        )
    if adapt.pooling != ProbingConfig.model_fields["pooling"].default:
        if reads_tokens or adapt.head == "attention":
            reader = _what_pools(task)
            raise ConfigError(
                f"is not read: {reader}", field="adapt.pooling", value=adapt.pooling, remedy="leave it out"
            )
        if adapt.pooling == "cls" and config.model.architecture in ("gpt", "t5"):
            raise ConfigError(
                f"{config.model.architecture} has no token that stands for the whole text",
                field="adapt.pooling",
                value="cls",
                remedy="use last, mean or first",
            )


def _what_pools(task: TaskConfig) -> str:
    if task.kind == "token_classification":
        return "a word's class is told from its first piece"
    if task.kind == "extractive_qa":
        return "every token is asked whether the answer begins or ends there"
    return "adapt.head: attention learns what it averages over"


def _layers_are_there(config: RunConfig) -> None:
    adapt = config.adapt
    if not isinstance(adapt, ProbingConfig) or not isinstance(adapt.layers, list):
        return
    last = config.model.num_layers
    if not adapt.layers:
        raise ConfigError("names no layer", field="adapt.layers", value=[], remedy="leave it out for the last one")
    for layer in adapt.layers:
        if not 0 <= layer <= last:
            raise ConfigError(
                f"must lie between 0, the embeddings, and model.num_layers = {last}",
                field="adapt.layers",
                value=layer,
            )
        if adapt.layers.count(layer) > 1:
            raise ConfigError("is given twice", field="adapt.layers", value=layer)


def _control_has_labels(config: RunConfig) -> None:
    adapt = config.adapt
    if isinstance(adapt, ProbingConfig) and adapt.control and config.task and config.task.kind in _NO_CLASSES:
        raise ConfigError(
            f"compares accuracies, and {_NO_CLASSES[config.task.kind]}",
            field="adapt.control",
            value=True,
            remedy="leave it out",
        )


PROBING_RULES: tuple[Callable[[RunConfig], None], ...] = (
    _probing_reads_a_base_and_a_task,
    _pooling_is_read,
    _layers_are_there,
    _control_has_labels,
)
