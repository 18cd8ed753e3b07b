"""Every command of README, docs/ and the recipes: run at a small size, dry-run, or checked by the program's own parser.

The commands of the quick start's run are run, or dry-run where they would train, in a directory that has a small corpus, a
tokenizer and a checkpoint under the names of the pages. examples/README.md has a test of its own. A command that no rule
covers fails.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmscale.cli.main import COMMANDS, _load, main
from lmscale.config.check import check_run
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import load_run
from tests.distributed.ranks import run_ranks
from tests.documents import PAGES, PROGRAMS, ROOT, Shown, all_commands, read_command

sys.path.insert(0, str(ROOT / "tools"))

pytestmark = pytest.mark.distributed

QUICKSTART = "launch/runs/quickstart.yaml"
STEP = "quickstart/run/checkpoints/step-00000600"
# Names that stand for a user's own run, and the run that is taken for it.
OWN_RUNS = {"run.yaml": QUICKSTART, "nli.yaml": "examples/nli.yaml", "RUN.yaml": QUICKSTART, "planned.yaml": QUICKSTART}
# Of `podman run` and `docker run`, as far as the pages use them.
CONTAINER_OPTIONS = {"--rm", "--shm-size", "--workdir", "--device", "--gpus", "--cap-add", "--userns"}
ANY_BATCH = ["batch.micro_batch_size=1"]
# Sizes in the place of those of a checkpoint that is not there, by what its path begins or ends with.
PRESETS = {"roberta": "roberta-base", "bert": "bert-large", "bart": "bart-large", "t5": "t5-base", "gpt": "gpt3-350m"}


# The directory in which the commands are typed.


def write_text() -> None:
    """Write some of the quick start's text under its names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [json.dumps({"text": path.read_text(encoding="utf-8")}) for path in sorted(library.glob("*.py"))[:64]]
    parts = {"train-00": texts[:40], "train-01": texts[40:60], "valid": texts[60:64]}
    Path("quickstart/text").mkdir(parents=True)
    for name, lines in parts.items():
        Path("quickstart/text", f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_two_steps() -> int:
    """Train the first and the last of the quick start's 600 steps, and pass over the others."""
    from lmscale.pretrain import pretrain

    quick = [
        "train.skip_steps=['2-599']",
        "train.eval_interval=0",
        "train.log_interval=100",
        "monitor.tensorboard=false",
    ]
    return pretrain(load_run(QUICKSTART, quick))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory as after the quick start, but for the size of its corpus and the steps that were trained."""
    home = tmp_path_factory.mktemp("home")
    for name in ("launch", "ds_configs", "examples"):
        (home / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_text()
        for shown in filter(makes_the_corpus, all_commands()):
            assert main(shown.words[1:]) == 0, shown.line
        assert run_ranks(1, train_two_steps) == [0]
        for name, run in OWN_RUNS.items():
            shutil.copy(run, name)
        Path("hostfile").write_text("".join(f"node-{number} slots=8\n" for number in range(1, 129)))
        yield home


def makes_the_corpus(shown: Shown) -> bool:
    """Tell the commands that turn the quick start's text into what it trains on."""
    return shown.words[:2] in {("lmscale", "tokenizer"), ("lmscale", "tokenize")} and "quickstart/text" in shown.line


# What each command has to pass: by program, then by subcommand of lmscale.


def parse(shown: Shown) -> dict[str, Any]:
    """Read the arguments by the command's own parser, without running it."""
    name, *rest = shown.words[1:]
    assert name in COMMANDS, f"there is no lmscale {name}"
    command = _load(name, COMMANDS[name])
    while hasattr(command, "commands"):
        assert rest[:1], f"lmscale {name} wants a subcommand"
        name, *rest = rest
        assert name in command.commands, f"there is no {shown.line}"
        command = command.commands[name]
    parameters: dict[str, Any] = command.make_context(name, list(rest)).params
    return parameters


def runs(shown: Shown) -> None:
    """Run a command here."""
    assert main(shown.words[1:]) == 0


def is_made_by_the_fixture(shown: Shown) -> None:
    """The fixture has run it: see what it wrote."""
    output = Path(str(parse(shown)["output"]))
    assert output.is_dir() or output.with_suffix(".idx").is_file()


def check_tokenize(shown: Shown) -> None:
    (is_made_by_the_fixture if makes_the_corpus(shown) else parse)(shown)


def check_train(shown: Shown) -> None:
    """Dry-run a run whose corpus is here; check that of another as far as its config goes."""
    given = parse(shown)
    if given["help_config"]:
        runs(shown)
    elif OWN_RUNS.get(given["run"], given["run"]) == QUICKSTART:
        dry_run(shown)
    else:
        check_config(given["run"], given["overrides"] or (), given["devices"], given["deepspeed_config"])


def dry_run(shown: Shown) -> None:
    """Let `lmscale train` check everything and start nothing. Checkpoints of other directories than ours are left out."""
    elsewhere = {word for word in shown.words if word.startswith("checkpoint.resume=") and "quickstart" not in word}
    words = [word for word in shown.words[1:] if word not in elsewhere]
    # A layout that the page names without the number of its devices is of as many as it takes.
    sizes = [int(size) for word in words for size in re.findall(r"^parallel\.[tp]p_size=(\d+)", word)]
    enough = [] if "--devices" in words or not sizes else ["--devices", str(max(sizes))]
    if words[1] in OWN_RUNS and "8" in words:  # whose batch is not told
        enough.append("batch.micro_batch_size=1")
    assert main([*words, *enough, *([] if "--dry-run" in words else ["--dry-run"])]) == 0


def check_config(run: str, overrides: Any, devices: int | None, deepspeed: str | None = None) -> None:
    """Check a run's config for the devices of the command, or those that the recipe's header names."""
    path = Path(OWN_RUNS.get(run, run))
    config = load_run(path, [*overrides, *stand_ins(path.read_text()), *(ANY_BATCH if run in OWN_RUNS else [])])
    config = config if deepspeed is None else config.model_copy(update={"deepspeed": deepspeed})
    zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
    header = re.search(r"^# devices: (\d+)$", path.read_text(), re.MULTILINE)
    check_run(config, zero, devices or (int(header[1]) if header else 1))


def stand_ins(text: str) -> list[str]:
    """Give the size of a model that the run takes from a checkpoint, and the length that it takes from its task."""
    found = ["train.train_tokens=1000000000"] if re.search("^task:", text, re.MULTILINE) else []
    base = re.search(r"init_from: (\S+)", text)
    if base is not None and "preset:" not in text:
        found.append("model.preset=" + next(preset for name, preset in PRESETS.items() if name in base[1]))
    return found


def check_plan(shown: Shown) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if parse(shown)["simulate"] is not None:  # building ranks of 175B is of the planner's tests
            patch.setattr("lmscale.train.simulate.simulate_ranks", takes_ranks)
        runs(shown)


def takes_ranks(config: Any, world_size: int, ranks: list[int]) -> list[Any]:
    """Stand in for the simulation: the ranks are those of the run."""
    assert ranks
    assert all(0 <= rank < world_size for rank in ranks)
    return []


def check_on_a_checkpoint(shown: Shown) -> None:
    """Run what reads the quick start's checkpoint; parse what reads another."""
    given = parse(shown)
    is_here = str(given.get("checkpoint") or given.get("path")).startswith("quickstart/run")
    if is_here and "reshape" not in shown.words:  # which takes its time: tests/train/test_checkpoint_reshape.py
        runs(shown)


def check_verify(shown: Shown) -> None:
    load_run(parse(shown)["run"])  # trains for minutes: tests/verify runs it


def check_preview(shown: Shown) -> None:
    given = parse(shown)
    if Path(given["run"]).exists():
        runs(shown)


def check_parsed(shown: Shown) -> None:
    parse(shown)


LMSCALE: dict[str, Callable[[Shown], None]] = {
    "train": check_train,
    "preview": check_preview,
    "plan": check_plan,
    "tokenizer": check_tokenize,
    "tokenize": check_tokenize,
    "data": lambda shown: runs(shown) if "quickstart/train" in shown.words else check_parsed(shown),
    "generate": check_on_a_checkpoint,
    "evaluate": check_on_a_checkpoint,
    "checkpoint": check_on_a_checkpoint,
    "export-hf": check_on_a_checkpoint,
    "import-hf": check_parsed,  # of a model that would be downloaded: tests/convert
    "adapter": check_parsed,  # of adaptations that would be trained: tests/adapt
    "verify": check_verify,
    "report": lambda shown: runs(shown) if "quickstart/run" in shown.words else check_parsed(shown),
    "compare": check_parsed,  # of two runs: tests/report
    "doctor": check_parsed,  # what it finds is this machine's: tests/launcher
}


def check_lmscale(shown: Shown) -> None:
    rule = LMSCALE.get(shown.words[1])
    assert rule is not None, f"no rule covers lmscale {shown.words[1]}"
    rule(shown)


def check_ranks(module: str, arguments: list[str]) -> None:
    """Check the arguments of a module that ranks run."""
    assert hasattr(importlib.import_module(module), "main")
    config = arguments[arguments.index("--config") + 1]
    check_config(config, [word for word in arguments if "=" in word and not word.startswith("-")], None)


def check_deepspeed_line(shown: Shown) -> None:
    from deepspeed.launcher.runner import parse_args

    given = parse_args(list(shown.words[1:]))
    assert given.module
    check_ranks(given.user_script, given.user_args)


def check_torchrun(shown: Shown) -> None:
    from torch.distributed.run import parse_args

    given = parse_args(list(shown.words[1:]))
    assert given.module
    check_ranks(given.training_script, given.training_script_args)


def check_script(shown: Shown) -> None:
    """Run a script of launch/ up to the `lmscale train` that it ends in, and check that."""
    at = next(at for at, word in enumerate(shown.words) if word.startswith("launch/"))
    stand_in = Path("programs", "lmscale").absolute()
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environ = {**os.environ, "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}
    given = subprocess.run(["bash", *shown.words[at:]], env=environ, capture_output=True, text=True, check=True).stdout
    train = parse(Shown(shown.page, ("lmscale", *given.splitlines())))
    check_config(train["run"], train["overrides"] or (), train["devices"], train["deepspeed_config"])


def check_kubectl(shown: Shown) -> None:
    assert Path(shown.words[-1]).is_file()  # tests/launch/test_scripts.py holds it against Kubernetes' schemas


def check_make(shown: Shown) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert shown.words[1] in targets


def check_pip(shown: Shown) -> None:
    """Read the arguments by pip's own parser, and look the extras up."""
    from pip._internal.commands import create_command

    _, given = create_command(shown.words[1]).parse_args(list(shown.words[2:]))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in (name for word in given for found in re.findall(r"\[(.*)\]", word) for name in found.split(",")):
        assert extra in extras


def check_container(shown: Shown) -> None:
    """A build names its file and an argument of it; a run, behind the image's name, what lmscale is to do."""
    text = (ROOT / "launch/container/Containerfile").read_text()
    options = [word.partition("=") for word in shown.words[2:]]
    if shown.words[1] == "build":
        assert "launch/container/Containerfile" in shown.words
        given = [shown.words[at + 1].partition("=")[0] for at, word in enumerate(shown.words) if word == "--build-arg"]
        assert all(re.search(rf"^ARG {name}=", text, re.MULTILINE) for name in given)
        return
    assert shown.words[1] == "run"
    assert {name for name, _, _ in options if name.startswith("--")} <= CONTAINER_OPTIONS | {"--devices"}
    # Rootless podman gives the mounted directory to root inside, and the image's user could not write there.
    assert shown.program != "podman" or "-v" not in shown.words or "--userns" in {name for name, _, _ in options}
    image = next(at for at, word in enumerate(shown.words) if word in ("lmscale", "lmscale-cpu"))
    check_lmscale(Shown(shown.page, ("lmscale", *shown.words[image + 1 :])))


def check_venv(shown: Shown) -> None:
    assert shown.words[1:3] == ("-m", "venv")


def check_python(shown: Shown) -> None:
    """Run code that reads the quick start's checkpoint; look up the imports of other code, and the options of a script."""
    if shown.words[1] == "tools/cluster.py":
        check_cluster(shown)
        return
    if shown.words[1] != "-c":
        source = (ROOT / shown.words[1]).read_text()
        for option in (word for word in shown.words[2:] if word.startswith("--")):
            assert f'"{option}"' in source, option
        return
    tree = ast.parse(shown.words[2])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
    if STEP in shown.words[2]:
        exec(compile(tree, "README", "exec"), {})


def check_cluster(shown: Shown) -> None:
    """Read the arguments by the tool's own parser, and check what is to run on a host."""
    import typer

    app = importlib.import_module("cluster").app
    subcommand, *rest = shown.words[2:]
    command = typer.main.get_command(app).commands[subcommand]  # type: ignore[attr-defined]
    command.make_context(subcommand, list(rest))
    inside = shown.words[shown.words.index("--") + 1 :] if "--" in shown.words else ()
    if inside[:1] == ("lmscale",):
        given = parse(Shown(shown.page, inside))
        check_config(given["run"], given["overrides"] or (), given["devices"])


def check_tensorboard(shown: Shown) -> None:
    import argparse

    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    parser = argparse.ArgumentParser()
    CorePluginLoader().define_flags(parser)
    parser.parse_args(list(shown.words[1:]))


def check_through_ssh(shown: Shown) -> None:
    """Check what ssh is to run there: behind its options and the host."""
    at = shown.words.index("USER@HOST") + 1
    RULES[shown.words[at]](Shown(shown.page, shown.words[at:]))


def names_what_is_there(shown: Shown) -> None:
    """A program of the system's: the paths that it is given in our directories are there."""
    paths = [word for word in shown.words[1:] if word.startswith(("quickstart/", "launch/"))]
    assert paths
    assert all(Path(path).exists() or Path(path).parent.name == "logs" for path in paths)


def check_activation(shown: Shown) -> None:
    assert shown.words[1:] == (".venv/bin/activate",)


def check_py_spy(shown: Shown) -> None:
    assert shown.words[1:3] == ("dump", "--pid")


RULES: dict[str, Callable[[Shown], None]] = {
    "lmscale": check_lmscale,
    "deepspeed": check_deepspeed_line,
    "torchrun": check_torchrun,
    "sbatch": check_script,
    **{f"launch/{path.name}": check_script for path in (ROOT / "launch").glob("*.sh")},
    "kubectl": check_kubectl,
    "make": check_make,
    "pip": check_pip,
    ".venv/bin/pip": check_pip,
    ".venv/bin/lmscale": check_lmscale,
    "python3": check_venv,
    "podman": check_container,
    "docker": check_container,
    "python": check_python,
    ".": check_activation,
    "tensorboard": check_tensorboard,
    "ssh": check_through_ssh,
    "cp": names_what_is_there,
    "rsync": names_what_is_there,
    "tail": names_what_is_there,
    "py-spy": check_py_spy,
}


def check(shown: Shown) -> None:
    """Check a command by the rule of its program."""
    rule = RULES.get(shown.program)
    assert rule is not None, f"{shown.page}: no rule covers {shown.line}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's parsers and models: their own tests and ours look at these
        rule(shown)


@pytest.mark.parametrize("shown", all_commands(), ids=lambda shown: shown.line)
def test_command_of_the_documents(shown: Shown, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for setting in shown.settings:
        monkeypatch.setenv(*setting.split("=", 1))
    check(shown)


def test_documents_show_commands_of_every_kind() -> None:
    shown = all_commands()
    assert len(shown) > 100
    assert {command.words[1] for command in shown if command.program == "lmscale"} == set(LMSCALE)
    assert {command.program for command in shown} == set(RULES)


@pytest.mark.parametrize(
    "line",
    [
        "lmscale train launch/runs/quickstart.yaml --device 2",
        "lmscale trian launch/runs/quickstart.yaml",
        "lmscale checkpoint lst quickstart/run",
        "lmscale train launch/runs/quickstart.yaml optim.rl=1.0 --devices 2",
        "deepspeed --num_gpus 8 --moduel lmscale.pretrain --config launch/runs/quickstart.yaml",
        "torchrun --nproc_per_node=8 --module lmscale.pretrain --config launch/runs/nowhere.yaml",
        "make tests",
        "lmscale plan launch/runs/gpt3-175b-modern.yaml --devices 1024 --simulate-ranks first,middle",
        "lmscale plan launch/runs/gpt3-175b-modern.yaml --devices 1024 --simulate-ranks 1024",
        "podman run --rm -v .:/data --workdir /data lmscale-cpu train launch/runs/quickstart.yaml --devices 2",
        "pip install 'lmscale[nothing]'",
        "pip install --no-such-option lmscale",
        "python examples/make_tasks.py --no-such-option",
        "curl https://example.org",
        "python tools/cluster.py cut",
        "launch/multi_node.sh launch/runs/gpt3-1.3b-modern.yaml",
    ],
)
def test_wrong_command_is_noticed(line: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    shown = read_command("a page", line)
    assert shown is not None
    with pytest.raises((Exception, SystemExit)):
        check(shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_stands_in_a_block_that_is_tested(page: Path) -> None:
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(rf"^(?: {{4}}|\t)(?:{'|'.join(PROGRAMS)}) .*$", text, re.MULTILINE) == []
    assert set(re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)) <= {"sh", "yaml", "json", "text", "python"}
