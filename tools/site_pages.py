"""Pages of the site that are no files of docs/: a hook of mkdocs, named in mkdocs.yml.

Every command with its options, read from the command line's own definition; every module, by mkdocstrings from its
docstrings; and README's neighbours. Links of docs/ to those neighbours are turned to where they stand in the site.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lmscale.cli.main import COMMANDS, _load

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmscale"
MODULES = "reference/modules"
NEIGHBOURS = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "README.md": "index.md",
}
"""Files outside docs/, and their pages."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the modules into the navigation, and let mkdocstrings read the code from here."""
    pages = [{title: f"{MODULES}/{title.removeprefix('lmscale.')}.md"} for title, _ in _packages()]
    for section in config.nav or []:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else []:
                if isinstance(entry, dict) and "Modules" in entry:
                    entry["Modules"] = pages
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for path, content in _pages():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into links to their pages."""
    depth = page.file.src_uri.count("/")
    for path, target in NEIGHBOURS.items():
        markdown = markdown.replace(f"]({'../' * (depth + 1)}{path}", f"]({'../' * depth}{target}")
    return markdown


def _pages() -> Iterator[tuple[str, str]]:
    for path, target in NEIGHBOURS.items():
        if path != "README.md":
            yield target, _moved((ROOT / path).read_text(encoding="utf-8"), "../" * path.count("/"))
    yield "reference/commands.md", commands_page()
    for title, modules in _packages():
        yield f"{MODULES}/{title.removeprefix('lmscale.')}.md", _module_page(title, modules)


def _moved(text: str, up: str) -> str:
    """Make links right for a page that came from a directory beside docs/ into docs/ itself."""
    text = text.replace(f"]({up}docs/", "](")
    for path, target in NEIGHBOURS.items():
        text = text.replace(f"]({up}{path}", f"]({target}")
    return text


def _packages() -> Iterator[tuple[str, list[str]]]:
    """Yield each page's title and the modules on it: those at the top, then package by package."""
    top = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    yield "lmscale", [f"lmscale.{name}" for name in top]
    for package in sorted(path.parent for path in PACKAGE.glob("*/__init__.py")):
        names = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
        yield f"lmscale.{package.name}", [f"lmscale.{package.name}.{name}" for name in names]


def _module_page(title: str, modules: list[str]) -> str:
    start = PACKAGE / title.removeprefix("lmscale").strip(".") / "__init__.py"
    text = ast.get_docstring(ast.parse(start.read_text(encoding="utf-8"))) or ""
    return "\n\n".join([f"# {title}", text, *(f"::: {module}" for module in modules)]) + "\n"


def commands_page() -> str:
    """Write down each command: what it does, its arguments, its options with their defaults."""
    lines = ["# Commands", "Written from the command line's own definition; `lmscale COMMAND --help` says the same."]
    for name, entry in COMMANDS.items():
        command = _load(name, entry)
        below = getattr(command, "commands", None)
        for title, each in [(name, command)] if below is None else [(f"{name} {sub}", c) for sub, c in below.items()]:
            lines += [f"## lmscale {title}", _paragraphs(each.help or entry.help), *_parameters(each)]
    return "\n\n".join(lines) + "\n"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _parameters(command: Any) -> Iterator[str]:
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        is_option = parameter.opts[0].startswith("-")
        name = ", ".join(parameter.opts) if is_option else (parameter.metavar or parameter.name.upper())
        default = "required" if parameter.required else _default(parameter.default)
        rows.append([f"`{name}`", default, parameter.help or ""])
    if rows:
        cells = [["", "default", "meaning"], ["---"] * 3, *rows]
        yield "\n".join(
            "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in row) + " |" for row in cells
        )


def _default(value: Any) -> str:
    return "" if value is None or value is False or value in ((), []) else f"`{getattr(value, 'value', value)}`"
