"""Which rank is slow, and how much of a pipeline stands idle, measured on ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, losses, pretrain_in_rank, pretrain_on_ranks, records, run_keys

pytestmark = pytest.mark.distributed

SLOW_RANK, SLEEP_S = 1, 0.5


def slow_in_rank(keys: Keys) -> int:
    """Train a run, one of whose ranks sleeps in each step before its first collective."""
    from lmscale.train.engine import Engine

    original = Engine.train_step

    def train_step(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == SLOW_RANK:
            time.sleep(SLEEP_S)
        return original(engine, *args, **kwargs)

    Engine.train_step = train_step  # type: ignore[method-assign]
    try:
        return pretrain_in_rank(keys)
    finally:
        Engine.train_step = original  # type: ignore[method-assign]


def wait_is_torchs_own() -> bool:
    """Tell whether this rank's Work.wait is the one that torch made."""
    return type(dist.Work.wait).__name__ == "instancemethod"


def step_times(keys: Keys) -> Keys:
    return json.loads((Path(keys["output_dir"]) / "step_times.json").read_text())


def test_the_rank_that_the_others_wait_for_is_named(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path / "run", monitor__step_times=True, deepspeed__zero_optimization__stage=1)
    assert run_ranks(2, slow_in_rank, keys) == [0, 0]
    found = step_times(keys)
    first, second = found["ranks"]
    assert (found["step"], found["steps"]) == (6, 5)  # the first step warms up
    assert first["rank"] == SLOW_RANK
    assert first["own_s"] >= SLEEP_S
    assert second["waiting_s"] > first["waiting_s"]
    for rank in found["ranks"]:
        assert rank["own_s"] + rank["waiting_s"] == pytest.approx(rank["step_s"])
        assert rank["host"]
        assert rank["bubble_fraction"] is None
    first_record, *others = records(keys)
    # A record is of one step here, and in one or two of them the other rank may stand for as long: the machine is shared.
    assert [record["perf/slowest_rank"] for record in others].count(SLOW_RANK) >= 3
    assert all(record["perf/own_time_max_s"] >= SLEEP_S for record in others)
    assert "perf/slowest_rank" not in first_record
    assert "perf/bubble_fraction" not in others[-1]


def test_a_pipeline_reports_its_bubble_beside_the_ideal_one(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path / "run", monitor__step_times=True, parallel__pp_size=2)
    run = pretrain_on_ranks(2, keys)
    found = step_times(keys)
    assert found["ideal_bubble_fraction"] == pytest.approx(1 / 5)  # 2 stages, 4 micro batches
    bubbles = [rank["bubble_fraction"] for rank in found["ranks"]]
    assert all(0 < bubble < 1 for bubble in bubbles)
    assert found["bubble_fraction"] == pytest.approx(sum(bubbles) / 2)
    assert 0 < run[-1]["perf/bubble_fraction"] < 1
    assert run_ranks(2, wait_is_torchs_own) == [True, True]
    quiet = run_keys(corpus, tmp_path / "quiet", parallel__pp_size=2)
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "step_times.json").write_text("{}")  # as a former start leaves it
    assert losses(pretrain_on_ranks(2, quiet)) == losses(run)
    assert not (tmp_path / "quiet" / "step_times.json").exists()
