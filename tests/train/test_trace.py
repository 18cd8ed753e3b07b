"""Timelines of some steps, read back as Perfetto reads them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import losses, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def names(path: Path) -> list[str]:
    return [event.get("name", "") for event in events(path)]


def test_the_steps_and_ranks_that_are_asked_for_are_recorded(corpus: str, tmp_path: Path) -> None:
    trace = {"start_step": 3, "num_steps": 2, "ranks": [1]}
    run = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "run", monitor__trace=trace))
    [path] = (tmp_path / "run" / "traces").iterdir()
    assert path.name == "rank-0001-steps-3-4.json.gz"
    found = names(path)
    assert len({name for name in found if name.startswith("ProfilerStep#")}) == 2
    assert any(name.startswith("aten::") for name in found)
    assert any("gloo:all_reduce" in name for name in found)
    assert losses(run) == losses(pretrain_on_ranks(2, run_keys(corpus, tmp_path / "quiet")))
    assert not (tmp_path / "quiet" / "traces").exists()


def trace_in_rank(directory: str, num_steps: int, steps: list[int]) -> list[str]:
    """Record from step 50 on while the steps go by; return the warnings and the names of the files."""
    import torch

    from lmscale.config.monitor import TraceConfig
    from lmscale.train import trace as traced

    told: list[str] = []
    warn, traced._log.warning = traced._log.warning, lambda text, *values: told.append(text % values)
    try:
        config = TraceConfig(start_step=50, num_steps=num_steps)
        trace = traced.Trace(config, Path(directory), 0, torch.device("cpu"), steps[0] - 1)
        for step in steps:
            trace.before(step)
            torch.ones(2).sum()
            trace.after(step)
        trace.close()
    finally:
        traced._log.warning = warn
    return [*told, *sorted(path.name for path in Path(directory).glob("traces/*"))]


@pytest.mark.parametrize(
    ("num_steps", "steps", "found"),
    [
        (3, [48, 50, 51, 52, 53], ["rank-0000-steps-50-52.json.gz"]),  # the step before is skipped
        (3, [48, 51, 52, 53], ["rank-0000-steps-51-52.json.gz"]),  # the first too
        (2, [48, 49, 52, 53], ["monitor.trace: none of the steps 50 to 51 was trained"]),
        (3, [49, 50, 53, 54], ["rank-0000-steps-50-50.json.gz"]),
        (3, [47, 48], ["monitor.trace: none of the steps 50 to 52 was trained"]),
        (3, [49, 48, 49, 50, 51, 52], ["rank-0000-steps-50-52.json.gz"]),  # rewound before it
        (9, [49, 50, 51, 47, 48, 49, 50, 51], ["rank-0000-steps-50-51.json.gz"]),  # rewound within
        (2, [51, 52], []),  # resumed behind its start
    ],
)
def test_skipped_and_rewound_steps_are_not_mistaken(
    tmp_path: Path, num_steps: int, steps: list[int], found: list[str]
) -> None:
    assert run_ranks(1, trace_in_rank, str(tmp_path), num_steps, steps) == [found]


def test_a_run_that_ends_within_the_steps_writes_what_it_has(corpus: str, tmp_path: Path) -> None:
    trace = {"start_step": 1, "num_steps": 50}
    pretrain_on_ranks(1, run_keys(corpus, tmp_path / "run", monitor__trace=trace, train__stop_at_step=2))
    [path] = (tmp_path / "run" / "traces").iterdir()
    assert path.name == "rank-0000-steps-1-2.json.gz"
    assert any(name.startswith("aten::") for name in names(path))
