"""Timelines of some steps, read back as Perfetto reads them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

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


def test_a_run_that_ends_within_the_steps_writes_what_it_has(corpus: str, tmp_path: Path) -> None:
    trace = {"start_step": 1, "num_steps": 50}
    pretrain_on_ranks(1, run_keys(corpus, tmp_path / "run", monitor__trace=trace, train__stop_at_step=2))
    [path] = (tmp_path / "run" / "traces").iterdir()
    assert path.name == "rank-0000-steps-1-2.json.gz"
    assert any(name.startswith("aten::") for name in names(path))
