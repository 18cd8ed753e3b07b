"""Adaptations trained side by side, each by its own rows, are what they would be alone; without a row, nothing of them moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.optim.row_adam import ENTRY_STEPS, RowAdam
from lmscale.plan.adaptation import row_bias_of
from tests.distributed import test_objectives
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys, largest_difference, losses, norms
from tests.finetune_runs import finetune_on_ranks, pretrain_base, task_keys, write_tasks

TOLERANCE = 1.0e-5
"""Relative, fp32: batches of other sizes, summed in another order."""
RATE = 0.1
"""Of SGD, by which engines are compared: Adam would make steps of roundings, where a gradient is next to nothing."""
prepared = test_objectives.prepared
PLAN = [(0, 1, 0), (1, 1, 1), (0, 0, 1), (0, 1, 1)]
"""Whose the rows of each step are; the second step has none of adaptation 0."""
METHODS: dict[str, Keys] = {
    "lora": {"method": "lora", "rank": 4, "targets": ["qkv", "proj", "fc1", "fc2"]},
    "adapter": {"method": "adapter", "width": 4, "norms": False},
    "prefix_tuning": {"method": "prefix_tuning", "length": 3, "projection": 8},
    "p_tuning_v2": {"method": "p_tuning_v2", "length": 3, "dropout": 0.0},
    "prompt_tuning": {"method": "prompt_tuning", "length": 3, "init": "uniform_sym"},
    "bitfit": {"method": "bitfit"},
    "bitfit-query": {"method": "bitfit", "which": "query_fc1"},
}


def test_row_adam_is_torchs_adamw_of_each_row_by_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(3, 4, 5, generator=generator)
    together = torch.nn.Parameter(start.clone())
    alone = [torch.nn.Parameter(row.clone()) for row in start]
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1.0e-8, "weight_decay": 0.1}
    rows = RowAdam([together], lr=0.01, **settings)
    others = [torch.optim.AdamW([parameter], lr=0.01, **settings) for parameter in alone]
    for present in ([0, 2], [1], [0, 1, 2], [2]):
        together.grad = torch.randn(3, 4, 5, generator=generator)
        rows.present = torch.tensor([row in present for row in range(3)])
        before = together.detach().clone()
        rows.step()
        for row in range(3):
            if row not in present:
                assert torch.equal(together[row], before[row])
                continue
            alone[row].grad = together.grad[row].clone()
            others[row].step()
    torch.testing.assert_close(together, torch.stack(list(alone)), rtol=1.0e-6, atol=1.0e-7)
    assert rows.state[together][ENTRY_STEPS].tolist() == [2, 2, 3]


@pytest.fixture(scope="module")
def base(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    home = tmp_path_factory.mktemp("entries")
    write_tasks(home)
    for name in ("train", "dev", "test"):
        path = home / f"texts-{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        named = [{**row, "user": "ann" if number % 3 else "bob"} for number, row in enumerate(rows)]
        (home / f"users-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    return pretrain_base("prefix-lm", prepared, home), home


def users_keys(base: tuple[str, Path], output_dir: Path, adapt: Keys, **changes: Any) -> Keys:
    """Make the config of a run whose rows train two adaptations."""
    keys = task_keys("texts", base[0], base[1], output_dir, {**adapt, "entries": 2}, **changes)
    keys["data"]["seq_length"] = 28
    keys["optim"] |= {"max_grad_norm": 0.0}
    keys["task"] |= {name: str(base[1] / f"users-{name}.jsonl") for name in ("train", "dev")}
    keys["task"] |= {"columns": {"entry": "user"}, "test": []}
    return keys


@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_an_adaptation_trained_beside_another_is_what_it_is_alone(
    method: str, base: tuple[str, Path], tmp_path: Path
) -> None:
    keys = users_keys(base, tmp_path, METHODS[method])
    keys["optim"] |= {"name": "sgd", "weight_decay": 0.0}
    (together,) = run_ranks(1, _train_by_hand, keys, 2)
    (alone,) = run_ranks(1, _train_by_hand, keys, 1)
    assert together["moved without a row"] == 0.0
    assert together["moved"] > 1.0e-6
    for name, values in alone["values"].items():
        beside = name if name in together["values"] else row_bias_of(name)
        largest = (together["values"][beside] - values).abs().max()
        assert float(largest) < TOLERANCE * float(values.abs().max()), name


def _train_by_hand(keys: Keys, entries: int) -> Keys:
    """Train PLAN: all rows of both adaptations, or, alone, those of adaptation 0."""
    from lmscale.config.io import parse_run
    from lmscale.data.tokenizer import load_tokenizer
    from lmscale.launcher.validate import validate_run
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.tasks.build import build_task
    from lmscale.train.start import begin

    plan = validate_run(parse_run(keys), 1)
    whole = plan.config
    assert whole.tokenizer is not None
    assert whole.adapt is not None
    rows = build_task(whole, load_tokenizer(whole.tokenizer), getattr(whole.adapt, "length", 0) * _is_prompt(whole))
    config = whole
    if entries == 1:
        config = whole.model_copy(update={"adapt": whole.adapt.model_copy(update={"entries": 1})})
    engine = build_engine(config, init_topology(1, 1), plan.zero)
    from lmscale.plan.adaptation import adaptation_of

    begin(engine, config, adaptation_of(config))
    trained = {f.tensor.name: f.parameter for f in engine.fragments() if not f.is_frozen}
    moved_without = moved = 0.0
    for step, owners in enumerate(PLAN):
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        batches = _batches(rows.splits["train"], whole, step, owners, entries)
        if batches:
            engine.train_step(batches, len(batches), step + 1, RATE)
        if entries > 1:
            change = max(float((trained[name][0] - old[0]).abs().max()) for name, old in before.items())
            moved_without = max(moved_without, change) if 0 not in owners else moved_without
            moved = max(moved, change)
    values = {name: (p.detach()[0] if entries > 1 else p.detach()).clone() for name, p in trained.items()}
    return {"values": values, "moved": moved, "moved without a row": moved_without}


def _is_prompt(config: Any) -> bool:
    return config.adapt.method == "prompt_tuning"


def _batches(
    split: Any, config: Any, step: int, owners: tuple[int, ...], entries: int
) -> list[dict[str, torch.Tensor]]:
    """Make a micro batch of each row: another one in each step."""
    import numpy as np

    from lmscale.feed.task_rows import RowDataset

    made = []
    for place, owner in enumerate(owners):
        arrays = RowDataset(split, config, lambda numbers: numbers).arrays(np.array([3 * step + place]))
        batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        batch["adapter_ids"] = torch.tensor([owner])
        if entries > 1 or owner == 0:
            made.append(batch)
    return made


LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2-sp": (2, {"parallel__tp_size": 2, "parallel__sequence_parallel": True}),
    "pp2": (2, {"parallel__pp_size": 2}),
    "dp2": (2, {}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("method", "layout"),
    [
        pytest.param(method, layout, marks=[] if (method, layout) in quick else [pytest.mark.slow])
        for quick in [{("lora", "dp2"), ("adapter", "tp2-sp"), ("prompt_tuning", "pp2"), ("bitfit", "tp2-sp")}]
        for method in METHODS
        for layout in LAYOUTS
    ],
)
def test_layouts_train_several_adaptations_alike(
    method: str, layout: str, base: tuple[str, Path], tmp_path: Path
) -> None:
    ranks, changes = LAYOUTS[layout]
    reference, expected = finetune_on_ranks(1, users_keys(base, tmp_path / "one", METHODS[method]))
    run, results = finetune_on_ranks(ranks, users_keys(base, tmp_path / "many", METHODS[method], **changes))
    assert largest_difference(losses(run), losses(reference)) < TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < TOLERANCE
    assert results["splits"]["dev"]["rougeL"] == pytest.approx(expected["splits"]["dev"]["rougeL"])


@pytest.mark.distributed
def test_a_resumed_run_of_several_adaptations_repeats_the_uninterrupted_one(
    base: tuple[str, Path], tmp_path: Path
) -> None:
    whole, _ = finetune_on_ranks(1, users_keys(base, tmp_path / "whole", METHODS["lora"]))
    keys = users_keys(base, tmp_path / "parts", METHODS["lora"], train__stop_at_step=1)
    finetune_on_ranks(1, keys)
    keys["train"]["stop_at_step"] = None
    parts, _ = finetune_on_ranks(1, keys)
    assert losses(parts) == losses(whole)
    assert norms(parts) == norms(whole)
