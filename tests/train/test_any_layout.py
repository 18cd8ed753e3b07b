"""What any layout has saved, any layout resumes: the tool's matrix, a cover of its pairs by default, all of them slow."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmscale.verify.layouts import Candidate
from tests.distributed.ranks import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
tool: Any = importlib.import_module("reshape_matrix")

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, Candidate] = {layout.name: layout for layout in tool.all_layouts()}
PAIRS = [
    ("zero0", "tp2-zero1"),
    ("tp2-zero1", "pp2-zero0"),
    ("pp2-zero0", "dp2-zero3"),
    ("dp2-zero3", "tp2-pp2-zero1"),
    ("tp2-pp2-zero1", "tp2-dp2-zero2"),
    ("tp2-dp2-zero2", "pp2-dp2-zero1"),
    ("pp2-dp2-zero1", "dp2-zero3"),
    ("pp2-dp2-zero1", "pp1-zero0"),
    ("pp1-zero0", "zero0"),
    ("dp2-zero3", "pp2-zero0"),
    ("tp2-dp2-zero2", "tp2-zero1"),
]


class OnDemand:
    """The tool's matrix; a layout is trained when it is first asked for."""

    def __init__(self, directory: Path):
        self.matrix = tool.Matrix([], directory, run_ranks=run_ranks)

    def cells(self, pairs: list[tuple[str, str]]) -> list[Any]:
        wanted = {name for pair in pairs for name in pair} - self.matrix.references.keys()
        self.matrix.layouts = [LAYOUTS[name] for name in sorted(wanted)]
        assert len(list(self.matrix.train_all())) == len(wanted)
        return list(self.matrix.cells([(LAYOUTS[source], LAYOUTS[target]) for source, target in pairs]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> OnDemand:
    return OnDemand(tmp_path_factory.mktemp("matrix"))


def assert_good(cell: Any) -> None:
    assert cell.reason == ""
    assert cell.is_exact
    assert cell.loss_difference <= tool.LIMIT


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_state_is_the_saved_one_and_losses_go_on(source: str, target: str, trained: OnDemand) -> None:
    (cell,) = trained.cells([(source, target)])
    assert_good(cell)


@pytest.mark.slow
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_resumes_what_any_has_saved(target: str, trained: OnDemand) -> None:
    for cell in trained.cells([(source, target) for source in LAYOUTS]):
        assert_good(cell)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "lion", "muon"])
def test_every_optimizers_state_comes_over(optimizer: str, tmp_path: Path) -> None:
    names = ("dp2-zero3", "tp2-pp2-zero1", "tp2-dp2-zero2")
    matrix = tool.Matrix([LAYOUTS[name] for name in names], tmp_path, optimizer, run_ranks=run_ranks)
    assert len(list(matrix.train_all())) == len(names)
    cells = list(matrix.cells([(LAYOUTS[a], LAYOUTS[b]) for a in names for b in names if a != b]))
    for cell in cells:
        assert cell.is_exact, cell.reason  # of losses, their own tests say how near they come


def test_a_single_other_bit_shows(trained: OnDemand) -> None:
    (cell,) = trained.cells([("zero0", "tp2-zero1")])
    assert_good(cell)
    path = trained.matrix._state(LAYOUTS["zero0"])
    kept = path.read_bytes()
    state = dict(np.load(path))
    key = "exp_avg_sq/layers.3.mlp.linear_fc1.weight"
    state[key].reshape(-1).view(np.uint32)[-1] ^= 1
    np.savez(path, **state)
    (cell,) = trained.cells([("zero0", "tp2-zero1")])
    path.write_bytes(kept)
    assert not cell.is_good
    assert cell.reason == f"{key} differs"
