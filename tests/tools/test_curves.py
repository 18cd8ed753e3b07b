from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_picture_names_its_curves_and_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "tools"))
    from curves import plot_curves

    path = tmp_path / "loss.svg"
    plot_curves(path, {"train": [(1, 2.0), (2, 1.5)], "held out": [(2, 1.6)]}, {"unigram": 1.25})
    svg = path.read_text()
    assert svg.startswith("<?xml")
    assert all(f">{name}<" in svg for name in ("train", "held out", "unigram 1.25", "step"))
    del sys.modules["curves"]
