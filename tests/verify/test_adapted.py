"""`lmscale verify` of runs that adapt: each method on layouts of each kind, on corpora and on tasks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.io import parse_run
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import own_shapes
from lmscale.verify.comparison import plan_verification
from tests.distributed import test_objectives
from tests.finetune_runs import pretrain_base, task_keys, write_tasks
from tests.launcher.runs import run_keys, write_corpus
from tests.verify.test_verify import verify

prepared = test_objectives.prepared
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "layer_decay": 0.8},
    "lora": {"method": "lora", "targets": ["query", "proj", "fc1", "fc2", "embedding"], "dropout": 0.1},
    "adapter": {"method": "adapter", "init": "normal", "width": 12},
    "bitfit": {"method": "bitfit"},
    "prefix_tuning": {"method": "prefix_tuning", "init": "text", "init_text": "one", "length": 4},
    "p_tuning_v2": {"method": "p_tuning_v2", "length": 4},
    "prompt_tuning": {"method": "prompt_tuning", "length": 20},
}
LAYOUTS = "tp2-sp,pp2-zero1,dp2-zero3"


@pytest.fixture(autouse=True)
def workspaces_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def base(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    home = tmp_path_factory.mktemp("bases")
    write_tasks(home)
    return {name: pretrain_base(name, prepared, home) for name in ("bert", "t5", "prefix-lm")}, home


def corpus_keys(home: Path, base: str, adapt: dict[str, Any]) -> dict[str, Any]:
    write_corpus(home / "corpus", [7, 30, 2, 90, 11] * 40)
    keys = run_keys(home)
    keys["data"]["seq_length"] = 28
    return {**keys, "model": {"init_from": base}, "adapt": adapt}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in ("lora", "prompt_tuning") else [pytest.mark.slow]) for m in METHODS]
)
def test_layouts_adapt_to_a_corpus_alike(method: str, base: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    keys = corpus_keys(tmp_path, base[0]["prefix-lm"], METHODS[method])
    if method == "prefix_tuning":
        keys["adapt"] = {"method": "prefix_tuning", "length": 4}
    verification, results = verify(parse_run(keys), LAYOUTS)
    assert [result.verdict for result in results] == ["reference", *["same"] * 3]
    assert verification.directory is None


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "architecture", "task"),
    [
        ("prefix_tuning", "bert", "classes"),
        ("bitfit", "bert", "tags"),
        pytest.param("p_tuning_v2", "bert", "questions", marks=pytest.mark.slow),
        pytest.param("adapter", "t5", "texts", marks=pytest.mark.slow),
        pytest.param("prompt_tuning", "t5", "classes", marks=pytest.mark.slow),
        pytest.param("lora", "prefix-lm", "texts", marks=pytest.mark.slow),
        pytest.param("full", "bert", "values", marks=pytest.mark.slow),
    ],
)
def test_layouts_adapt_to_a_task_alike(
    method: str, architecture: str, task: str, base: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    adapt = {**METHODS[method], **({"length": 3} if "length" in METHODS[method] else {})}
    keys = task_keys(task, base[0][architecture], base[1], tmp_path / "run", adapt)
    keys["data"]["seq_length"] = 28
    verification, results = verify(parse_run(keys), LAYOUTS)
    assert verification.data == "the task's first examples"
    assert [result.verdict for result in results] == ["reference", *["same"] * 3]
    assert "from a base of random weights" in verification.plan.notes


def test_the_copy_adapts_as_the_run_does(base: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    config = parse_run(corpus_keys(tmp_path, base[0]["prefix-lm"], METHODS["lora"]))
    small = plan_verification(config, LAYOUTS).small
    assert config.adapt is not None
    assert small.adapt is not None
    assert {name.split(".lora.")[1] for name in own_shapes(small.model, small.adapt)} == {
        name.split(".lora.")[1] for name in own_shapes(config.model, config.adapt)
    }
    assert small.adapt.model_dump() == {**config.adapt.model_dump(), "rank": 4, "dropout": 0.0}


def test_several_adaptations_are_verified_on_layouts_with_zero_0(
    base: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    adapt = {"method": "bitfit", "entries": 3}
    keys = task_keys("texts", base[0]["prefix-lm"], base[1], tmp_path / "run", adapt)
    keys["task"] |= {"columns": {"entry": "text"}, "test": []}
    keys["optim"]["max_grad_norm"] = 0.0
    names = sorted({line.split('"')[3] for line in Path(keys["task"]["train"]).read_text().splitlines()})
    keys["adapt"]["entries"] = len(names)
    plan = plan_verification(parse_run(keys), max_ranks=2)
    assert {candidate.zero_stage for candidate in plan.candidates} == {0}
    assert {candidate.zero_stage for candidate in plan.left_out} == {1, 2, 3}


def test_probing_is_refused(base: tuple[dict[str, str], Path], tmp_path: Path) -> None:
    keys = task_keys("tags", base[0]["bert"], base[1], tmp_path / "run", {"method": "probing"})
    with pytest.raises(ConfigError, match=r"adapt.method = 'probing': trains nothing on the ranks"):
        plan_verification(parse_run(keys))
