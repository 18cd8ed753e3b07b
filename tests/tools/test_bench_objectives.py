"""The measurement of the objectives, with settings too small for its figures to mean anything."""

from __future__ import annotations

import importlib
import json
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.table import Table

TOOLS = Path(__file__).resolve().parents[2] / "tools"

pytestmark = pytest.mark.filterwarnings("ignore")  # of the library that is measured


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    module = importlib.import_module("bench_objectives")
    monkeypatch.setattr(module, "BATCH_SIZE", 4)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty modules of the standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    return path


@pytest.fixture
def corpus(bench: ModuleType, text: Path) -> Any:
    return bench.make_corpus(text, 1000)


def rows_of(table: Table) -> dict[str, list[str]]:
    return {name: figures for name, *figures in zip(*(column.cells for column in table.columns), strict=True)}


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


def test_every_objective_and_every_peer_has_a_row_of_figures(bench: ModuleType, corpus: Any) -> None:
    cores = os.sched_getaffinity(0)
    rates, tokens = bench.objective_rates(corpus, rounds=1, seconds=0.01)
    assert os.sched_getaffinity(0) == cores
    assert not dist.is_initialized()
    assert rates[bench.CUT_TOO] < rates["bert"]
    rows = rows_of(bench.objectives_table(rates, tokens))
    assert set(rows) == set(rates) == {*bench.OBJECTIVES, *bench.MASKED_AT_ONCE, bench.CUT_TOO}
    for name, (rate, filled, ratio, goal) in rows.items():
        assert number(rate) > 0
        assert filled == "" if name == bench.CUT_TOO else 1 < number(filled) <= 512
        assert (ratio == "") == (name.split(",")[0] in ("roberta", "bart", "causal_lm"))
        is_goalless = name in bench.MASKED_AT_ONCE or name.startswith("causal_lm")
        assert goal == "" if is_goalless else number(goal) in (5000, 3000, 2000)
    assert rows["megatron-core T5"][2] == "1.0"
    assert rows["causal_lm, prefix_lm"][1] == "512"


def test_loaders_with_a_worker_have_rows_of_figures(bench: ModuleType, corpus: Any) -> None:
    rows = rows_of(bench.worker_table(bench.worker_rates(corpus, rounds=1, seconds=0.01)))
    assert list(rows) == ["megatron-core BERT", "lmscale"]
    assert all(number(rate) > 0 for rate, _ in rows.values())
    assert rows["megatron-core BERT"][1] == "1.0"


@pytest.mark.slow
def test_a_run_tells_how_long_its_steps_wait(bench: ModuleType, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WAIT_LAYERS", 2)
    monkeypatch.setattr(bench, "WAIT_STEPS", 2)
    monkeypatch.setattr(bench, "WAIT_BATCH_SIZE", 1)
    seconds, share = bench.waits(corpus, "t5, spans")
    assert seconds > 0
    assert 0 < share < 1


def test_waits_stand_beside_their_goal(bench: ModuleType) -> None:
    assert set(bench.WAITING) <= set(bench.OBJECTIVES)
    assert rows_of(bench.waits_table({"bert": (3.127, 0.00006)})) == {"bert": ["3.13", "0.006%", "< 1%"]}


def test_samples_are_filled_where_they_are_not_padding(bench: ModuleType) -> None:
    ours = {"document_ids": np.array([[0, 0, 0, -1], [0, 1, 1, 1], [0, -1, -1, -1], [0, 0, -1, -1]])}
    theirs = {"padding_mask": torch.tensor([[1, 1, 1, 0]] * 4)}
    assert bench.filled(ours) == 2.5
    assert bench.filled(theirs) == 3
    assert bench.filled({"tokens": np.zeros((4, 512))}) == 512
