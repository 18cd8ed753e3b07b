"""Adapt a pretrained model: `deepspeed ... --module lmscale.finetune --config RUN.yaml [key=value ...]`.

A run with `task:` trains on the task's files and measures its metrics; one with `adapt:` alone goes on with the objective on
the run's corpora.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lmscale.config.adapt import ProbingConfig, prompt_length
from lmscale.config.checkpoint_paths import step_directory
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import load_tokenizer
from lmscale.evaluate.task import TaskEvaluation
from lmscale.feed.task_rows import build_row_loader, count_row_tokens
from lmscale.launcher.environment import adopt_rank
from lmscale.launcher.status import run_rank
from lmscale.launcher.validate import validate_run
from lmscale.monitor.results import write_results
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.groups import num_trainable
from lmscale.pretrain import Work, corpus_work, train_run
from lmscale.pretrain import main as run_main
from lmscale.probe.run import probe_run
from lmscale.tasks.base import Task
from lmscale.tasks.build import build_task
from lmscale.train.best import Best, point_best
from lmscale.train.checkpoint import load_checkpoint
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.engine import Engine
from lmscale.train.initial import Givens
from lmscale.train.loop import Run
from lmscale.train.progress import Progress

_DEV = "dev"


def finetune(config: RunConfig, *, pipeline: bool | None = None) -> int:
    """Adapt a model on the ranks that were started, and return the exit status.

    Args:
        config: the run.
        pipeline: take DeepSpeed's pipeline engine; left out, where there are several stages.

    Raises:
        LmscaleError: if the input is wrong or the run cannot go on.
    Collectives: every rank must call.
    """
    plan = validate_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    if isinstance(plan.config.adapt, ProbingConfig):
        return probe_run(plan, pipeline=pipeline)
    return train_run(plan, corpus_work if config.task is None else task_work, pipeline=pipeline)


def task_work(config: RunConfig, engine: Engine, progress: Progress) -> Work:
    """Train on a task's rows, measure its dev set on the way, and in the end, with the best weights, all it has."""
    assert config.task is not None
    assert config.tokenizer is not None
    tokenizer, topology = load_tokenizer(config.tokenizer), engine.topology
    task = build_task(config, tokenizer, prompt_length(config.adapt))
    evaluation = TaskEvaluation(engine, task, config, tokenizer)
    best = None
    if _DEV in task.splits:
        best = Best(tag(_DEV, task.metric), config.task.patience)
        best.replay(Path(config.output_dir) / "metrics.jsonl", progress.step)
    return Work(
        loader=functools.partial(build_row_loader, config, task.splits["train"], topology.dp_rank, topology.dp_size),
        evaluate=lambda: measure_dev(task, evaluation),
        best=best,
        finish=lambda run: report(run, task, evaluation),
        givens=Givens(
            config.tokenizer,
            functools.partial(count_row_tokens, task.splits["train"], config.model.vocab_size),
            [(config.task.label_words or {}).get(label, label) for label in task.labels],
        ),
    )


def tag(split: str, metric: str) -> str:
    """Return the tag of a task's metric."""
    return f"valid/{split}/{metric}"


def measure_dev(task: Task, evaluation: TaskEvaluation) -> dict[str, float]:
    """Measure the dev set, where there is one: values by tag."""
    if _DEV not in task.splits:
        return {}
    return {tag(_DEV, name): value for name, value in evaluation.measure(task.splits[_DEV]).items()}


def report(run: Run, task: Task, evaluation: TaskEvaluation) -> None:
    """Measure every split but train with the best weights; show a table and write results.json.

    Collectives: every rank must call.
    """
    config = run.config
    if run.best is not None and run.best.step not in (None, run.progress.step):
        assert run.best.step is not None
        load_checkpoint(run.engine, CheckpointReader(step_directory(run.checkpoints, run.best.step)))
    measured = {name: evaluation.measure(split) for name, split in task.splits.items() if name != "train"}
    trainable, total = num_trainable(config.model, config.optim, adaptation_of(config))
    step = run.progress.step if run.best is None or run.best.step is None else run.best.step
    results: dict[str, Any] = {
        "method": None if config.adapt is None else config.adapt.method,
        "seed": config.train.seed,
        "metric": task.metric,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "steps": run.progress.step,
        "best_step": step,
        "peak_bytes": run.engine.maximum(run.engine.peak_bytes()),
        "seconds": run.engine.maximum(run.throughput.trained_s),
        "splits": {
            name: {"domain": task.splits[name].domain, "examples": task.splits[name].num_examples, **values}
            for name, values in measured.items()
        },
    }
    if dist.get_rank() == 0:
        write_results(Path(config.output_dir), results)
        if run.best is not None and run.best.step is not None:
            point_best(run.checkpoints, run.best.step)
    names = list(dict.fromkeys(name for values in measured.values() for name in values))
    rows = [
        (name, task.splits[name].domain, *(f"{values[each]:.4f}" if each in values else "" for each in names))
        for name, values in measured.items()
    ]
    run.console.table(f"Task, with the weights of step {step}", ["set", "domain", *names], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this rank and return its exit status."""
    return run_main(arguments, finetune)


if __name__ == "__main__":
    adopt_rank()
    sys.exit(run_rank(main))
