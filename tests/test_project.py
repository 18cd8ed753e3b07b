"""What the project promises beside its code: documents, commands, configs, layers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import load_run

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))


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
