"""Directories as runs leave them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmscale.config.io import parse_run, show
from tests.distributed.runs import run_keys

TOKENS_PER_STEP = 8 * 32
LAYOUT = {"world_size": 2, "tp_size": 1, "pp_size": 1, "dp_size": 2, "zero_stage": 1}


def record(step: int, **values: Any) -> dict[str, Any]:
    """Make a record; / in a tag is written __."""
    tags = {name.replace("__", "/"): value for name, value in values.items()}
    return {"step": step, "consumed_samples": 8 * step, "consumed_tokens": TOKENS_PER_STEP * step, **tags}


def plain_records(steps: range, loss: float = 6.0) -> list[dict[str, Any]]:
    """Make records of a run in which nothing happens, with a held-out loss every tenth step."""
    return [
        record(
            step,
            train__lm_loss=loss - 0.01 * step,
            train__grad_norm=1.0 + 0.5 / step,
            train__lr=1.0e-3,
            train__global_batch_size=8,
            perf__tokens_per_second=1000.0 + step,
            perf__step_time_s=0.25,
            memory__peak_bytes=2.0**30,
            **({"valid__wiki__lm_loss": loss - 0.005 * step} if step % 10 == 0 else {}),
        )
        for step in steps
    ]


def write_run(
    directory: Path, records: list[dict[str, Any]], manifest: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """Write config.yaml, manifest.json and metrics.jsonl; `changes` as of `run_keys`."""
    directory.mkdir(parents=True)
    keys = run_keys("corpus", directory, **{"train__train_tokens": TOKENS_PER_STEP * 40, **changes})
    keys["deepspeed"] = {"zero_optimization": {"stage": 1}}
    (directory / "config.yaml").write_text(show(parse_run(keys)))
    first = {
        "started_at": "2026-01-01T00:00:00+00:00",
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "git": {"lmscale": "abc123"},
        "layout": LAYOUT,
        "device": {"type": "cpu"},
        "hosts": ["node-a", "node-b"],
        "command": ["pretrain.py", "--config", "run.yaml"],
        "data": {"corpus": "0123"},
        "resume_step": 0,
        "restarts": [],
        "earlier_starts": [],
    }
    (directory / "manifest.json").write_text(json.dumps({**first, **(manifest or {})}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return directory
