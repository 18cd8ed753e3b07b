"""Probing: classifiers on what a frozen model computes, trained outside of it. `load_probe` reads one back.

Shapes in this package: n rows, u units (rows, or the words in them), s places of a row, h hidden, l layers, c outputs.
"""

from __future__ import annotations

from lmscale.probe.saved import Probe, load_probe

__all__ = ["Probe", "load_probe"]
