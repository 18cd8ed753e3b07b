"""What examples/README.md says, command by command, at a size that takes seconds."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.cli.main import main
from lmscale.config.io import load_run
from lmscale.config.run import RunConfig
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "examples" / "README.md"
SECTIONS = {
    "nli": "Inference over two sentences",
    "qa": "Questions and answers",
    "table_to_text": "Tables as sentences",
}
SMALLER = {
    "pretrain.yaml": [
        *("model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4"),
        *("batch.micro_batch_size=4", "batch.global_batch_size=8", "train.train_tokens=1500", "train.eval_batches=1"),
        *("train.log_interval=1", "monitor.tensorboard=false"),
    ],
    "task": [
        *("batch.micro_batch_size=4", "batch.global_batch_size=8", "train.epochs=null", "train.train_tokens=1000"),
        *("train.log_interval=1", "task.dev_limit=6", "task.test_limit=6", "monitor.tensorboard=false"),
    ],
}
METRICS = {"nli": "accuracy", "qa": "f1", "table_to_text": "rougeL"}


def commands(section: str) -> list[list[str]]:
    """Read the commands of a section of the page."""
    text = PAGE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def smaller(arguments: list[str]) -> RunConfig:
    """Read the run of an `lmscale train`, made smaller."""
    run, *overrides = arguments
    overrides = overrides[: overrides.index("--devices")]
    less = SMALLER.get(Path(run).name, SMALLER["task"])
    return load_run(run, [*overrides, *less])


def train_in_rank(config: RunConfig) -> int:
    from lmscale.finetune import finetune
    from lmscale.pretrain import pretrain

    return pretrain(config) if config.task is None else finetune(config)


def train(arguments: list[str]) -> RunConfig:
    """Train the smaller run on as many ranks as the page says."""
    config, ranks = smaller(arguments), int(arguments[arguments.index("--devices") + 1])
    assert run_ranks(ranks, train_in_rank, config) == [0] * ranks
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a project in which the page's first section was typed, with fewer lines."""
    home = tmp_path_factory.mktemp("root")
    for name in ("examples", "ds_configs"):
        (home / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        make, *others = commands("Tasks, a tokenizer, tokens")
        fewer = ["--train", "300", "--held-out", "12"]
        subprocess.run([sys.executable, *make[1:], *fewer], check=True)
        for program, *arguments in others:
            assert program == "lmscale"
            assert main(arguments) == 0
    return home


@pytest.mark.parametrize(
    "example",
    [
        pytest.param("nli", marks=pytest.mark.slow),
        "qa",
        pytest.param("table_to_text", marks=pytest.mark.slow),
    ],
)
def test_an_example_runs_from_the_base_to_its_figures(
    example: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    config = None
    for program, command, *arguments in commands(SECTIONS[example]):
        assert program == "lmscale"
        if command == "train":
            config = train(arguments)
        else:
            _generate(arguments)
    assert config is not None
    results = json.loads(Path(config.output_dir, "results.json").read_text())
    assert results["metric"] == METRICS[example]
    assert {name: split["domain"] for name, split in results["splits"].items()} == {
        "dev": "in",
        "test": "in",
        "ood": "out",
    }
    assert all(0 <= split[METRICS[example]] <= 1 for split in results["splits"].values())
    assert (results["trainable_parameters"] == results["total_parameters"]) == (results["method"] == "full")


def _generate(arguments: list[str]) -> None:
    """Write with the checkpoint in a process of its own, as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "lmscale", "generate", *arguments], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_other_methods_and_layouts_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for section in ("Inference over two sentences", "Questions and answers"):
        if not Path(commands(section)[0][4].partition("=")[2], "checkpoints").exists():
            train(commands(section)[0][2:])
    bitfit, split = [train(arguments) for _, _, *arguments in commands("Other methods, other layouts")]
    assert bitfit.adapt is not None
    assert bitfit.adapt.method == "bitfit"
    assert split.parallel.tp_size == 2
