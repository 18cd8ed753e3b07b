"""Runs of probing, from files to results: every kind of task on every architecture, their records, and how they are stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmscale.errors import EXIT_INTERRUPTED_AND_SAVED
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, records
from tests.finetune_runs import finetune_in_rank
from tests.probe.runs import probe_on_ranks, probing_keys

pytestmark = pytest.mark.distributed

Base = Callable[[str], str]
METRICS = {"classes": "accuracy", "values": "pearson", "tags": "span_f1", "questions": "f1"}
QUICK = {("bert", "questions"), ("prefix-lm", "tags"), ("t5", "questions"), ("bart", "values")}
CASES = [
    pytest.param(objective, task, marks=[] if (objective, task) in QUICK else [pytest.mark.slow])
    for objective in ("bert", "roberta", "prefix-lm", "t5", "bart")
    for task in METRICS
]


@pytest.mark.parametrize(("objective", "task"), CASES)
def test_each_kind_of_task_probes_each_architecture(
    objective: str, task: str, base: Base, tasks: Path, tmp_path: Path
) -> None:
    keys = probing_keys(task, base(objective), tasks, tmp_path, {"layers": [0, 2], "head": "mlp"})
    keys["task"]["output"] = "head"
    results = probe_on_ranks(1, keys)
    assert results["metric"] == METRICS[task]
    for values in results["splits"].values():
        assert METRICS[task] in values


def test_places_are_learned(base: Base, tasks: Path, tmp_path: Path) -> None:
    long = {"train__epochs": 60, "train__eval_interval": 0, "optim__lr": 3.0e-2}
    keys = probing_keys("questions", base("bert"), tasks, tmp_path, {"head": "mlp"}, **long)
    probe_on_ranks(1, keys)
    losses = [record["train/lm_loss"] for record in records(keys)]
    assert losses[-1] < 0.5 * losses[0]


def test_records_are_those_of_a_run_with_a_name_for_each_classifier(base: Base, tasks: Path, tmp_path: Path) -> None:
    changes: Keys = {"monitor__tensorboard": True, "train__epochs": 2, "train__eval_interval": 3}
    keys = probing_keys("tags", base("bert"), tasks, tmp_path / "one", **changes)
    probe_on_ranks(1, keys)
    run = records(keys)
    assert [record["step"] for record in run] == [1, 2, 3, 4, 5, 6]
    assert [record["consumed_samples"] for record in run] == [8, 16, 24, 32, 40, 48]
    assert all({"train/lm_loss", "train/grad_norm", "train/lr"} <= record.keys() for record in run)
    assert ["valid/dev/token_accuracy" in record for record in run] == [False, False, True, False, False, True]
    assert list((tmp_path / "one" / "tensorboard").iterdir())

    keys = probing_keys("tags", base("bert"), tasks, tmp_path / "two", {"layers": [1, 3], "control": True})
    probe_on_ranks(1, keys)
    tags = {tag for record in records(keys) for tag in record}
    for name in ("layer-01/", "layer-03/", "layer-01/control/"):
        assert f"{name}train/lm_loss" in tags
    assert "train/lm_loss" not in tags


def stop_on_the_way(keys: Keys, at_record: int) -> int:
    """Probe on this rank; the signal TERM comes when so many records are written."""
    import os
    import signal

    import torch.distributed as dist

    from lmscale.monitor.jsonl_writer import JsonlWriter

    write, written = JsonlWriter.write, [0]

    def and_kill(self: Any, record: Any) -> None:
        write(self, record)
        written[0] += 1
        if written[0] == at_record and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    JsonlWriter.write = and_kill  # type: ignore[method-assign]
    try:
        return finetune_in_rank(keys)
    finally:
        JsonlWriter.write = write  # type: ignore[method-assign]
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_ends_every_rank_and_the_same_command_goes_on_from_the_features(
    base: Base, tasks: Path, tmp_path: Path
) -> None:
    layout: Keys = {"parallel__pp_size": 2}
    keys = probing_keys("classes", base("bert"), tasks, tmp_path / "stopped", {"layers": "all"}, **layout)
    assert run_ranks(2, stop_on_the_way, keys, 5) == [EXIT_INTERRUPTED_AND_SAVED] * 2
    assert len(records(keys)) == 5
    assert not (tmp_path / "stopped" / "results.json").exists()
    assert (tmp_path / "stopped" / "probes" / "layer-00.safetensors").exists()
    assert not list((tmp_path / "stopped").rglob("*.tmp"))
    resumed = probe_on_ranks(2, keys)
    whole = probe_on_ranks(
        2, probing_keys("classes", base("bert"), tasks, tmp_path / "whole", {"layers": "all"}, **layout)
    )
    assert json.dumps(resumed["layers"]) == json.dumps(whole["layers"])
