"""What verification does with runs that adapt: a small adaptation of a small base, on the first examples of a task."""

from __future__ import annotations

from typing import Any

from lmscale.config.adapt import prompt_length
from lmscale.config.run import RunConfig
from lmscale.config.task import TaskConfig

NUM_EXAMPLES = 64
_MOST = {"rank": 4, "width": 8, "length": 4, "projection": 16}
"""Sizes of the small adaptation."""


def shrink_adaptation(config: RunConfig, num_layers: int) -> dict[str, Any] | None:
    """Make a small copy of an adaptation that makes the same choices, without dropout.

    Initial values that are taken from the base, by tokens of a text, are kept where the copy has the run's tokenizer.

    Args:
        config: the user's run.
        num_layers: of the copy.
    """
    if config.adapt is None:
        return None
    keys = config.adapt.model_dump()
    for key, most in _MOST.items():
        if keys.get(key) is not None:
            keys[key] = min(keys[key], most)
    if keys.get("top_layers") is not None:
        keys["top_layers"] = min(keys["top_layers"], num_layers)
    if keys.get("dropout"):
        keys["dropout"] = 0.0
    if "init_text" in keys and not _keeps_tokenizer(config):
        keys |= {"init": "uniform_sym" if prompt_length(config.adapt) else "random", "init_text": None}
    return keys


def first_examples(task: TaskConfig) -> dict[str, Any]:
    """Return what changes of a task: its first examples are learned, and nothing is measured."""
    limit = min(task.train_limit or NUM_EXAMPLES, NUM_EXAMPLES)
    unread = dict.fromkeys(("dev", "metric", "patience", "dev_limit", "test_limit"))
    return {**unread, "test": [], "train_limit": limit, "labels": task.labels, "entries": task.entries}


def notes_of_adaptation(config: RunConfig) -> list[str]:
    """Say what the copy does otherwise than a run that adapts."""
    notes = ["from a base of random weights"] if config.model.init_from is not None else []
    keys = {} if config.adapt is None else config.adapt.model_dump()
    smaller = [f"{key} {most}" for key, most in _MOST.items() if (keys.get(key) or 0) > most]
    notes += [f"with a small adaptation: {', '.join(smaller)}"] if smaller else []
    notes += ["without the adaptation's dropout"] if keys.get("dropout") else []
    if config.task is not None:
        notes.append(f"on the first {NUM_EXAMPLES} examples at most")
    return notes


def base_of(small: RunConfig) -> RunConfig:
    """Describe the run that would have made the base of a shrunk one: its weights are never trained."""
    keys = small.model_dump()
    keys["model"]["init_from"] = None
    keys |= {"adapt": None, "task": None, "precision": "fp32", "loss_scale": None, "deepspeed": {}}
    keys["parallel"] = {}
    keys["optim"] = {"name": "sgd", "lr": small.optim.lr, "weight_decay": 0.0}
    return RunConfig.model_validate(keys)


def _keeps_tokenizer(config: RunConfig) -> bool:
    return config.tokenizer is not None and (config.task is not None or config.objective.name != "causal_lm")
