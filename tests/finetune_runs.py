"""Small tasks, models to adapt to them, and runs on ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, records
from tests.distributed.test_objectives import _document, keys_of

NUMBERS = ("one", "two", "three")


def write_tasks(home: Path) -> None:
    """Write classification, regression, tagging, question answering and generation over the same sentences."""
    for name, first, count in (("train", 0, 24), ("dev", 100, 10), ("test", 200, 9)):
        lines: dict[str, list[Keys]] = {kind: [] for kind in ("classes", "values", "tags", "questions", "texts")}
        for number in range(first, first + count):
            text = " ".join(_document(number).split()[: 5 + number % 4])
            words = text.split()
            start = text.index(words[2])
            lines["classes"].append({"text": text, "label": NUMBERS[number % 3]})
            lines["values"].append({"text": text, "target": len(words) / 4})
            lines["tags"].append({"tokens": words, "tags": ["B-X" if len(word) > 4 else "O" for word in words]})
            answers = {"text": [words[2]], "answer_start": [start]}
            lines["questions"].append({"question": "what", "context": text, "answers": answers})
            lines["texts"].append({"text": words[0], "target": " ".join(words[1:3])})
        for kind, rows in lines.items():
            (home / f"{kind}-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


TASKS: dict[str, Keys] = {
    "classes": {"kind": "classification"},
    "values": {"kind": "regression"},
    "tags": {"kind": "token_classification"},
    "questions": {"kind": "extractive_qa"},
    "texts": {"kind": "generation", "max_new_tokens": 3},
}


def task_keys(task: str, base: str, home: Path, output_dir: Path, adapt: Keys, **changes: Any) -> Keys:
    """Make the config of a run that adapts a base to a task."""
    files = {name: str(home / f"{task}-{name}.jsonl") for name in ("train", "dev")}
    keys: Keys = {
        "model": {"init_from": base},
        "data": {"seq_length": 32, "num_workers": 0},
        "task": {
            **TASKS[task],
            **files,
            "test": [{"name": "far", "path": str(home / f"{task}-test.jsonl"), "domain": "out"}],
        },
        "adapt": adapt,
        "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "optim": {"lr": 1.0e-2, "lr_warmup_fraction": 0.1},
        "train": {"epochs": 1, "log_interval": 1, "eval_interval": 2},
        "checkpoint": {"save_interval": 0},
        "monitor": {"tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "output_dir": str(output_dir),
    }
    for path, value in changes.items():
        section = keys
        *parents, last = path.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return keys


def pretrain_base(objective: str, prepared: tuple[str, str], home: Path) -> str:
    """Train a model for two steps and return the path of its checkpoint."""
    keys = keys_of(objective, prepared, home / f"base-{objective}", train__stop_at_step=2)
    from tests.distributed.runs import pretrain_on_ranks

    pretrain_on_ranks(1, keys)
    return str(Path(keys["output_dir"]) / "checkpoints" / "step-00000002")


def finetune_on_ranks(world_size: int, keys: Keys, timeout_s: float = 240.0) -> tuple[list[Keys], Keys]:
    """Adapt on forked ranks; return the records of metrics.jsonl and results.json."""
    assert run_ranks(world_size, finetune_in_rank, keys, timeout_s=timeout_s) == [0] * world_size
    return records(keys), json.loads(Path(keys["output_dir"], "results.json").read_text())


def finetune_in_rank(keys: Keys) -> int:
    """Adapt on this rank of a pool and return its exit status."""
    import gc

    from lmscale.config.io import parse_run
    from lmscale.finetune import finetune

    status = finetune(parse_run(keys))
    gc.collect()
    return status
