"""Tasks, from their files to results: the same on every layout, stopped early, resumed, measured with the best weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import test_objectives
from tests.distributed.runs import Keys, largest_difference, losses, norms
from tests.finetune_runs import TASKS, finetune_on_ranks, pretrain_base, task_keys, write_tasks

pytestmark = pytest.mark.distributed
prepared = test_objectives.prepared

TOLERANCE = 1.0e-5
"""Relative, losses and gradient norms over the steps in fp32: sums in another order, nothing else."""
CASES = [
    ("bert", "classes"),
    ("bert", "values"),
    ("bert", "questions"),
    ("roberta", "tags"),
    ("roberta", "classes"),
    ("prefix-lm", "classes"),
    ("prefix-lm", "texts"),
    ("t5", "classes"),
    ("t5", "texts"),
    ("bart", "texts"),
    ("bart", "classes"),
]
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2-sp": (2, {"parallel__tp_size": 2, "parallel__sequence_parallel": True}),
    "pp2": (2, {"parallel__pp_size": 2}),
    "dp2-zero3": (2, {"deepspeed__zero_optimization__stage": 3}),
    "tp2-pp2-zero1": (
        4,
        {"parallel__tp_size": 2, "parallel__pp_size": 2, "deepspeed__zero_optimization__stage": 1},
    ),
}
QUICK = {
    ("bert", "questions", "tp2-sp"),
    ("roberta", "tags", "tp2-pp2-zero1"),
    ("prefix-lm", "texts", "pp2"),
    ("t5", "classes", "dp2-zero3"),
    ("bart", "texts", "tp2-pp2-zero1"),
}
LORA: Keys = {"method": "lora", "rank": 4}


class Bases:
    """A pretrained model of each objective, and the run of each task on one rank, made where they are asked for."""

    def __init__(self, prepared: tuple[str, str], home: Path):
        self._prepared, self.home = prepared, home
        self._paths: dict[str, str] = {}
        self._runs: dict[tuple[str, str], tuple[list[Keys], Keys]] = {}
        write_tasks(home)

    def keys(self, objective: str, task: str, output_dir: Path, **changes: object) -> Keys:
        """Make the config of a run."""
        if objective not in self._paths:
            self._paths[objective] = pretrain_base(objective, self._prepared, self.home)
        return task_keys(task, self._paths[objective], self.home, output_dir, LORA, **changes)

    def run(self, objective: str, task: str) -> tuple[list[Keys], Keys]:
        """Adapt on one rank."""
        if (objective, task) not in self._runs:
            keys = self.keys(objective, task, self.home / f"{objective}-{task}")
            self._runs[objective, task] = finetune_on_ranks(1, keys)
        return self._runs[objective, task]


@pytest.fixture(scope="module")
def bases(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(prepared, tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize(
    ("objective", "task", "layout"),
    [
        pytest.param(*case, layout, marks=[] if (*case, layout) in QUICK else [pytest.mark.slow])
        for case in CASES
        for layout in LAYOUTS
    ],
)
def test_layouts_adapt_and_predict_alike(objective: str, task: str, layout: str, bases: Bases, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    reference, expected = bases.run(objective, task)
    run, results = finetune_on_ranks(ranks, bases.keys(objective, task, tmp_path, **changes))
    assert largest_difference(losses(run), losses(reference)) < TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < TOLERANCE
    assert results["trainable_parameters"] == expected["trainable_parameters"] > 0
    for name, measured in expected["splits"].items():
        assert results["splits"][name].keys() == measured.keys()
        # Of a value the metrics follow the predictions continuously; of a class they are counts, and equal.
        tolerance = 1.0e-3 if TASKS[task]["kind"] == "regression" else TOLERANCE
        numbers = [key for key, value in measured.items() if isinstance(value, float)]
        assert [results["splits"][name][key] for key in numbers] == pytest.approx(
            [measured[key] for key in numbers], rel=tolerance, abs=1.0e-9
        )


def test_a_task_is_learned_and_measured_with_the_best_weights(bases: Bases, tmp_path: Path) -> None:
    # The tags follow from the words, which even a small model can learn by heart.
    changes: Keys = {"train__epochs": 40, "train__eval_interval": 10, "checkpoint__keep": 1}
    keys = bases.keys("roberta", "tags", tmp_path, **changes)
    keys["adapt"] = {"method": "full"}
    run, results = finetune_on_ranks(1, keys)
    tag = "valid/dev/span_f1"
    values = {record["step"]: record[tag] for record in run if tag in record}
    best = max(values, key=lambda step: (values[step], -step))
    assert results["best_step"] == best
    assert results["splits"]["dev"]["span_f1"] == pytest.approx(values[best])
    assert values[best] > 0.9
    assert results["splits"]["far"]["domain"] == "out"
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best:08d}", f"step-{run[-1]['step']:08d}"}
    assert (tmp_path / "checkpoints" / "best").read_text().strip() == f"step-{best:08d}"


def test_a_run_that_gets_no_better_stops_and_a_resumed_one_stops_there_too(bases: Bases, tmp_path: Path) -> None:
    changes: Keys = {"train__epochs": 8, "train__eval_interval": 1, "optim__lr": 1.0e-9, "task__patience": 3}
    run, results = finetune_on_ranks(1, bases.keys("bert", "classes", tmp_path / "whole", **changes))
    assert [record["step"] for record in run] == [1, 2, 3, 4]
    assert (results["best_step"], results["steps"]) == (1, 4)
    keys = bases.keys("bert", "classes", tmp_path / "parts", **changes, train__stop_at_step=2)
    finetune_on_ranks(1, keys)
    keys["train"]["stop_at_step"] = None
    resumed, again = finetune_on_ranks(1, keys)
    assert losses(resumed) == losses(run)
    assert (again["best_step"], again["steps"]) == (1, 4)


def test_label_smoothing_reaches_the_loss_of_training(bases: Bases, tmp_path: Path) -> None:
    plain, _ = bases.run("bart", "texts")
    smoothed, _ = finetune_on_ranks(
        1, bases.keys("bart", "texts", tmp_path, task__label_smoothing=0.5, train__stop_at_step=1)
    )
    # Of the same weights and rows; a smoothed loss has another gradient, too.
    assert abs(losses(smoothed)[0] / losses(plain)[0] - 1) > 100 * TOLERANCE
    assert abs(norms(smoothed)[0] / norms(plain)[0] - 1) > 0.1


def test_a_prefix_lm_reads_the_whole_prompt_at_once_in_training_and_in_writing(bases: Bases, tmp_path: Path) -> None:
    keys = bases.keys("prefix-lm", "texts", tmp_path)
    keys["objective"] = {"name": "causal_lm", "prefix_lm": True}
    run, results = finetune_on_ranks(1, keys)
    plain, _ = bases.run("prefix-lm", "texts")
    # Of the same weights and rows. They are short, and the base was trained for two steps: attention does little yet, but a
    # mask of the same meaning would change less by ten times.
    assert largest_difference(losses(run)[:1], losses(plain)[:1]) > 5.0e-6
    assert 0.0 <= results["splits"]["dev"]["rougeL"] <= 1.0


def test_the_resolved_config_lists_the_classes_and_the_length(bases: Bases, tmp_path: Path) -> None:
    from lmscale.config.io import load_run, parse_run
    from lmscale.launcher.compose import module_of
    from lmscale.launcher.validate import validate_run

    plan = validate_run(parse_run(bases.keys("bert", "classes", tmp_path)), 1)
    assert plan.config.task is not None
    assert plan.config.task.labels == ["one", "three", "two"]
    assert plan.config.train.train_tokens == 3 * 8 * 32
    assert plan.config.optim.lr_warmup_tokens == round(0.1 * 3 * 8 * 32)
    assert module_of(plan.config) == "lmscale.finetune"
    again = validate_run(load_run(_saved(plan.config, tmp_path)), 1)
    assert again.config == plan.config


def _saved(config: object, directory: Path) -> Path:
    from lmscale.config.io import show

    path = directory / "again.yaml"
    path.write_text(show(config))  # type: ignore[arg-type]
    return path


def test_results_are_a_file_that_a_machine_can_read(bases: Bases) -> None:
    _, results = bases.run("bert", "classes")
    assert json.loads(json.dumps(results)) == results
    assert results["method"] == "lora"
    assert results["splits"]["dev"]["examples"] == 10
    assert 0 < results["trainable_parameters"] < results["total_parameters"]
