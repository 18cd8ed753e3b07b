"""docs/troubleshooting.md: each message of its tables is in the code that is named beside it."""

from __future__ import annotations

import ast
import mmap
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"
VALUE = "…"
# Strings of compiled code, by the package that brings it.
LIBRARIES = {"torch": ["lib/libtorch_cpu.so", "lib/libtorch_python.so"]}


def rows() -> list[tuple[str, str]]:
    """Read (message, package) from the tables that have both."""
    lines = re.findall(r"^\| `(.+?)` \| ([\w.]+) \|", PAGE.read_text(), re.MULTILINE)
    return [(message, package) for message, package in lines]


@cache
def root_of(package: str) -> Path:
    """Find a package's directory without importing it."""
    places = [Path(place) / package.replace(".", "/") for place in sys.path]
    found = next((place for place in places if place.is_dir()), None)
    assert found is not None, f"{package} is not installed"
    return found


def texts(source: bytes) -> Iterator[str]:
    """Yield every string of a module; a value that is put into one stands as …"""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)


def is_in_python(message: str, package: str) -> bool:
    pieces = [piece.strip() for piece in message.split(VALUE)]
    pattern = re.compile(".*?".join(map(re.escape, pieces)), re.DOTALL)
    words = [word.encode() for word in re.findall(r"\w{3,}", message)]
    for path in root_of(package).rglob("*.py"):
        content = path.read_bytes()
        # Parsing takes a while: only where all words are there, wherever a line of the source breaks.
        if all(word in content for word in words) and any(map(pattern.search, texts(content))):
            return True
    return False


def is_in_library(message: str, package: str) -> bool:
    for name in LIBRARIES.get(package, []):
        with (
            (root_of(package) / name).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_,
        ):
            if bytes_.find(message.encode()) >= 0:
                return True
    return False


def test_page_has_messages_of_ours_and_of_others() -> None:
    assert len(rows()) > 35
    assert {"lmscale", "deepspeed", "torch", "megatron.core", "pip"} == {package for _, package in rows()}


def test_every_line_with_a_message_names_where_it_is_from() -> None:
    tables = [line for line in PAGE.read_text().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert len(tables) == len(rows())


@pytest.mark.parametrize(("message", "package"), rows(), ids=lambda value: value[:50])
def test_message_is_in_the_code(message: str, package: str) -> None:
    assert is_in_python(message, package) or is_in_library(message, package), f"{package} has no text {message!r}"


def test_a_message_that_nobody_has_is_noticed() -> None:
    assert not is_in_python("must be a multiple of nothing in particular", "lmscale")
    assert not is_in_library("this library says no such thing at all", "torch")
