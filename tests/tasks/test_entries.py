"""Rows of several adaptations: each names its own, in every split and for every candidate."""

from __future__ import annotations

import numpy as np
import pytest

from lmscale.batch import ADAPTER_IDS
from lmscale.config.check import check_run
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.data.tokenizer import SentencePieceTokenizer
from lmscale.errors import LmscaleError
from lmscale.tasks.build import build_task
from lmscale.tasks.resolve import resolve_task
from tests.tasks.conftest import MakeRun

TRAIN = [
    {"text": "the cat", "label": "x", "user": "bob"},
    {"text": "a dog", "label": "y", "user": "ann"},
    {"text": "the dog", "label": "x", "user": "bob"},
]
DEV = [{"text": "a cat", "label": "y", "user": "ann"}]


def run_of(make_run: MakeRun, architecture: str = "bert", entries: int = 2, **keys: object) -> RunConfig:
    columns = {"entry": "user"} if "columns" not in keys else keys.pop("columns")
    config = make_run(architecture, "classification", keys.pop("train", TRAIN), DEV, columns=columns, **keys)
    model = config.model.model_copy(update={"init_from": "base"})
    adapt = {"method": "lora", "entries": entries}
    return RunConfig.model_validate({**config.model_dump(), "model": model.model_dump(), "adapt": adapt})


def test_each_row_names_the_adaptation_of_its_example(make_run: MakeRun, tokenizer: SentencePieceTokenizer) -> None:
    config = resolve_task(run_of(make_run))
    assert config.task is not None
    assert config.task.entries == ["ann", "bob"]
    task = build_task(config, tokenizer)
    assert task.splits["train"].arrays(np.array([0, 1, 2, -1]))[ADAPTER_IDS.name].tolist() == [1, 0, 1, 1]
    assert task.splits["dev"].arrays(np.array([0]))[ADAPTER_IDS.name].tolist() == [0]


def test_candidates_name_it_too(make_run: MakeRun, tokenizer: SentencePieceTokenizer) -> None:
    task = build_task(resolve_task(run_of(make_run, "gpt")), tokenizer)
    rows = task.splits["train"].candidates()
    assert rows.arrays(np.arange(6))[ADAPTER_IDS.name].tolist() == [1, 1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"entries": 3}, "adapt.entries = 3: column 'user' of task.train has 2 names"),
        ({"columns": {}}, "task.columns.entry: is required by adapt.entries = 2"),
        ({"entries": 1}, "task.columns.entry = 'user': is read with adapt.entries above 1 only"),
        ({"train": [*TRAIN, {"text": "a", "label": "x"}]}, "has no column 'user'"),
    ],
)
def test_what_does_not_fit_is_refused(make_run: MakeRun, keys: dict, message: str) -> None:
    config = run_of(make_run, **keys)
    with pytest.raises(LmscaleError) as caught:
        check_run(resolve_task(config), ZeroChoice(), 1)
    assert message in str(caught.value)


def test_an_unknown_name_is_refused_with_its_line(make_run: MakeRun, tokenizer: SentencePieceTokenizer) -> None:
    config = run_of(make_run)
    task = config.task.model_copy(update={"entries": ["ann", "eve"]})  # type: ignore[union-attr]
    with pytest.raises(LmscaleError, match=r"train.jsonl:1: column 'user' is 'bob', which trains nothing"):
        build_task(config.model_copy(update={"task": task}), tokenizer)
