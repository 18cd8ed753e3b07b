"""The runs of a comparison: each method with each seed, its own keys over those of all."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lmscale.config.adapt import METHODS, LoraConfig
from lmscale.errors import ConfigError
from lmscale.launcher.method_runs import method_runs
from tests.finetune_runs import task_keys


@pytest.fixture
def run(tmp_path: Path) -> str:
    keys = task_keys("classes", "absent", tmp_path, tmp_path / "out", {"method": "lora", "rank": 3})
    keys["model"] |= {"preset": "bert-base", "vocab_size": 420}
    keys["tokenizer"] = {"path": "absent"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def test_each_method_is_trained_with_each_seed_in_a_directory_of_its_own(run: str, tmp_path: Path) -> None:
    runs = method_runs(run, ["full", "lora"], [1, 2], tmp_path)
    assert [(each.name, each.seed) for each in runs] == [("full", 1), ("full", 2), ("lora", 1), ("lora", 2)]
    assert [each.config.train.seed for each in runs] == [1, 2, 1, 2]
    assert len({each.config.output_dir for each in runs}) == 4
    assert runs[1].config.output_dir == str(tmp_path / "full" / "seed-2")


def test_the_files_own_section_holds_for_its_own_method_only(run: str, tmp_path: Path) -> None:
    lora, adapter = method_runs(run, ["lora", "adapter"], [1], tmp_path)
    assert isinstance(lora.config.adapt, LoraConfig)
    assert lora.config.adapt.rank == 3
    assert adapter.config.adapt is not None
    assert adapter.config.adapt.method == "adapter"


def test_keys_of_a_method_lie_over_those_of_all(run: str, tmp_path: Path) -> None:
    one, two = method_runs(run, ["lora,optim.lr=0.5", "thin=lora,adapt.rank=1"], [1], tmp_path, ["optim.lr=0.25"])
    assert (one.config.optim.lr, two.config.optim.lr) == (0.5, 0.25)
    assert (one.name, two.name) == ("lora", "thin")
    assert isinstance(two.config.adapt, LoraConfig)
    assert two.config.adapt.rank == 1


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_config_by_its_name(method: str, run: str, tmp_path: Path) -> None:
    (only,) = method_runs(run, [method], [1], tmp_path)
    assert only.config.adapt is not None
    assert only.config.adapt.method == method


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lorra"], "--method = 'lorra': is no method; did you mean 'lora'?"),
        (["lora", "lora"], "--method = 'lora': is named twice"),
        (["lora,adapt.rnk=1"], "adapt.rnk: unknown key"),
    ],
)
def test_what_is_no_method_is_refused(methods: list[str], message: str, run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        method_runs(run, methods, [1], tmp_path)
    assert message in str(caught.value)


def test_a_run_without_a_task_is_refused(run: str, tmp_path: Path) -> None:
    keys = yaml.safe_load(Path(run).read_text())
    del keys["task"]
    Path(run).write_text(yaml.safe_dump(keys))
    with pytest.raises(ConfigError, match="task: is required to compare methods"):
        method_runs(run, ["lora"], [1], tmp_path)
