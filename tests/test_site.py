"""The site: it builds without a warning, fetches nothing, and has a page for everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lmscale.cli.main import COMMANDS

pytest.importorskip("mkdocs", reason="the site is built with the extra docs: pip install 'lmscale[docs]'")
pytest.importorskip("mkdocstrings", reason="the site is built with the extra docs: pip install 'lmscale[docs]'")

ROOT = Path(__file__).resolve().parent.parent
# Attributes whose target a browser fetches by itself; a link that a reader clicks is no such thing.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Fetched(HTMLParser):
    """Collects what a browser fetches to show a page, and the anchors that the page has."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.add(values.get("id") or "")
        url = values.get(FETCHED.get(tag, ""))
        if url and values.get("rel") != "canonical":
            self.urls.append(url)


def parsed(page: Path) -> Fetched:
    parser = Fetched()
    parser.feed(page.read_text())
    return parser


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, with no way to any server."""
    directory = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return directory


def pages(site: Path) -> Iterator[Path]:
    yield from (page for page in site.rglob("*.html") if "assets" not in page.parts)


def test_every_document_has_a_page(site: Path) -> None:
    for source in (ROOT / "docs").rglob("*.md"):
        assert (site / source.relative_to(ROOT / "docs")).with_suffix(".html").is_file(), source


def test_a_browser_fetches_nothing_from_elsewhere(site: Path) -> None:
    found = {url for page in pages(site) for url in parsed(page).urls}
    assert len(found) > 5
    assert {url for url in found if re.match(r"(https?:)?//", url)} == set()
    sheets = [sheet for sheet in site.rglob("*.css") if re.search(r"url\(\s*['\"]?(https?:)?//", sheet.read_text())]
    assert sheets == []


def test_commands_and_config_classes_are_in_the_reference(site: Path) -> None:
    commands = parsed(site / "reference" / "commands.html").anchors
    for name, anchors in ((name, [a for a in commands if a.startswith(f"lmscale-{name}")]) for name in COMMANDS):
        assert anchors, f"lmscale {name} is not in the reference"
    config = parsed(site / "reference" / "modules" / "config.html").anchors
    assert {"lmscale.config.data.DataConfig.split", "lmscale.config.run.RunConfig.deepspeed"} <= config
    assert "lmscale.evaluate.inference.load" in parsed(site / "reference" / "modules" / "evaluate.html").anchors


def test_docstrings_are_rendered_with_their_sections(site: Path) -> None:
    text = (site / "reference" / "modules" / "data.html").read_text()
    assert "The output is the same for every number of workers" in text
    assert "globs of .txt and .jsonl files" in text
