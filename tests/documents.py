"""The commands that the documents tell users to type."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("lmscale", "deepspeed", "torchrun", "python", "make", "pip", "sbatch", "docker", "podman")
_SETTING = re.compile(r"[A-Z][A-Z0-9_]*=")


@dataclass(frozen=True)
class Shown:
    """A command as a page shows it."""

    page: str
    """Path in the repository."""
    words: tuple[str, ...]
    """Program and arguments."""
    settings: tuple[str, ...] = ()
    """NAME=value in front of it."""

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def line(self) -> str:
        return " ".join((*self.settings, *self.words))


def read_command(page: str, line: str) -> Shown | None:
    """Take a line of a shell block apart; None for an empty one and a comment."""
    words = shlex.split(line, comments=True)
    settings = []
    while words and _SETTING.match(words[0]):
        settings.append(words.pop(0))
    return Shown(page, tuple(words), tuple(settings)) if words else None


def commands_of(page: Path) -> list[Shown]:
    """Read the commands of a page's ```sh blocks, lines that end with a backslash joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [found for line in lines if (found := read_command(str(page.relative_to(ROOT)), line))]


def commands_of_recipes() -> list[Shown]:
    """Read the commands in the headers of launch/runs/*.yaml and examples/*.yaml."""
    found = []
    for recipe in sorted([*(ROOT / "launch" / "runs").glob("*.yaml"), *(ROOT / "examples").glob("*.yaml")]):
        text = recipe.read_text().replace(" \\\n#", " ")
        lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#   ")]
        shown = [read_command(str(recipe.relative_to(ROOT)), line) for line in lines if line.startswith(PROGRAMS)]
        found += [command for command in shown if command]
    return found


def all_commands() -> list[Shown]:
    """Collect every command once, with the first page that shows it."""
    found: dict[tuple[tuple[str, ...], ...], Shown] = {}
    for shown in [*(shown for page in PAGES for shown in commands_of(page)), *commands_of_recipes()]:
        found.setdefault((shown.settings, shown.words), shown)
    return list(found.values())
