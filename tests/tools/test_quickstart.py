"""The parts of the quick start that do not train; `make quickstart` is the test of the whole."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.data.corpora import write_corpus

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "quickstart.py"


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def read_files(directory: Path) -> dict[str, list[dict[str, Any]]]:
    paths = sorted(directory.glob("*.jsonl"))
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def test_corpus_is_the_standard_library_with_some_files_held_out(quickstart: ModuleType) -> None:
    quickstart.write_corpus(quickstart.Quickstart())
    parts = read_files(Path("quickstart/text"))
    names = [document["file"] for documents in parts.values() for document in documents]
    assert "json/decoder.py" in names
    assert len(names) == len(set(names)) > 300
    assert not any("site-packages" in name for name in names)
    assert 5 < len(parts["valid"]) < len(names) / 10


def test_corpus_is_the_same_every_time(quickstart: ModuleType) -> None:
    quickstart.write_corpus(quickstart.Quickstart())
    first = read_files(Path("quickstart/text"))
    quickstart._clear()
    quickstart.write_corpus(quickstart.Quickstart())
    assert read_files(Path("quickstart/text")) == first


def test_unigram_entropy_is_that_of_the_counts(quickstart: ModuleType, tmp_path: Path) -> None:
    for name, tokens in (("train", [0, 0, 0, 1, 1, 2]), ("valid", [0, 3])):
        write_corpus(tmp_path / name, [tokens], vocab_size=4)
    entropy = quickstart.unigram_entropy(tmp_path / "train", tmp_path / "valid", 4)
    # Counts plus one: 4, 3, 2, 1 of 10.
    assert entropy == pytest.approx(-(math.log(0.4) + math.log(0.1)) / 2)


def test_report_holds_the_figures_and_a_curve_within_its_frame(quickstart: ModuleType) -> None:
    Path("quickstart").mkdir()
    work = quickstart.Quickstart(
        figures={"held-out loss": "4.1"}, commands=[("lmscale train X", 3.0)], sample="def f():"
    )
    metrics = [{"step": step, "train/lm_loss": 9 - step / 100} for step in range(10, 610, 10)]
    metrics[-1]["valid/stdlib/lm_loss"] = 4.1
    page = quickstart.write_report(work, metrics, unigram=6.2).read_text()
    assert "| held-out loss | 4.1 |" in page
    assert ".venv/bin/lmscale train X" in page
    curve = ElementTree.parse("quickstart/loss.svg").getroot()
    width, height = map(float, curve.attrib["viewBox"].split()[2:])
    for line in curve.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.attrib["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= width
            assert 0 <= y <= height


def test_clearing_leaves_what_the_quick_start_did_not_make(quickstart: ModuleType) -> None:
    home = Path("quickstart")
    (home / "run" / "checkpoints").mkdir(parents=True)
    for name in ("train.bin", "train.idx", "valid.bin", "report.md", "mine.txt"):
        (home / name).write_text("")
    quickstart._clear()
    assert [path.name for path in home.iterdir()] == ["mine.txt"]
