"""A trained tokenizer, small bases and tasks, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.test_objectives import prepared  # noqa: F401 (a fixture)
from tests.finetune_runs import pretrain_base, write_tasks


@pytest.fixture(scope="package")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    write_tasks(home)
    return home


@pytest.fixture(scope="module")
def base(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:  # noqa: F811
    """The checkpoint of an objective's base, pretrained where it is asked for."""
    home = tmp_path_factory.mktemp("bases")
    made: dict[str, str] = {}

    def of(objective: str) -> str:
        if objective not in made:
            made[objective] = pretrain_base(objective, prepared, home)
        return made[objective]

    return of
