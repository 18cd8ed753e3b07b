"""What the project promises beside its code: documents, commands, configs, layers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import load_run

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


def shell_lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def commands(program: str) -> list[list[str]]:
    """Collect the arguments of each call of a program in the pages and in the headers of the recipes, once each."""
    lines = [line for page in PAGES for line in shell_lines(page)]
    for recipe in sorted((ROOT / "launch" / "runs").glob("*.yaml")):
        text = re.sub(r" \\\n# +", " ", recipe.read_text())
        lines += [line.removeprefix("#") for line in text.splitlines() if line.startswith("#   ")]
    words = (shlex.split(line, comments=True) for line in lines)
    found = {tuple(line[1:]) for line in words if line and Path(line[0]).name == program}
    return [list(arguments) for arguments in sorted(found)]


@cache
def help_of(*command: str) -> str:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [str(BIN / "lmscale"), *command, "--help"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_documents_show_commands() -> None:
    assert len(commands("lmscale")) > 8
    assert commands("deepspeed")


@pytest.mark.parametrize("arguments", commands("lmscale"), ids=" ".join)
def test_command_of_the_documents_exists_with_its_options(arguments: list[str]) -> None:
    num_words = 2 if arguments[0] in ("tokenizer", "data", "adapter", "checkpoint") else 1
    text = help_of(*arguments[:num_words])
    for option in (word.split("=")[0] for word in arguments[num_words:] if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", text), f"lmscale {arguments[0]} has no {option}"


@pytest.mark.parametrize("arguments", commands("deepspeed"), ids=" ".join)
def test_launch_line_of_the_documents_names_a_module_and_a_run(arguments: list[str]) -> None:
    module = arguments[arguments.index("--module") + 1]
    assert importlib.util.find_spec(module)
    config = arguments[arguments.index("--config") + 1]
    overrides = [word for word in arguments[arguments.index("--config") + 2 :] if "=" in word]
    load_run(ROOT / config, overrides)


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for page in PAGES for line in shell_lines(page)]
    mentioned = {name for line in lines for name in re.findall(r"\bmake ([a-z-]+)", line)}
    assert {"quickstart", "test"} <= mentioned <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_deepspeed_config_is_accepted(path: Path) -> None:
    assert json.loads(path.read_text())
    run = load_run(ROOT / "launch" / "runs" / "quickstart.yaml")
    stage = check_deepspeed(load_deepspeed(str(path)), run).stage
    named = re.search(r"zero(\d)", path.stem)
    assert named
    assert stage == int(named[1])


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "make_docs.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + "run `make docs`"


def test_imports_point_down() -> None:
    done = subprocess.run([str(BIN / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_constraints_pin_what_the_project_needs() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["tasks"],
        *project["optional-dependencies"]["lint"],
        *project["optional-dependencies"]["docs"],
    ]
    assert {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in wanted} <= pinned


def test_no_file_knows_the_machine_that_it_was_written_on() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: no list of the project's files")
    absolute = re.compile(r"(?<![\w.:/<])/(home|root|work|Users)/\w")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path.suffix in {".bin", ".idx", ".model", ".png", ".npz", ".gz", ".zst"} or not path.is_file():
            continue
        found = absolute.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{name} holds {found[0] if found else ''}..."
