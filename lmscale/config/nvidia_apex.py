"""NVIDIA's apex, told from the toolkit for web pages of that name on PyPI by its files; nothing of either is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

_PARTS = {
    "adam": ("optimizers/fused_adam.py", "amp_C"),
    "norms": ("normalization/fused_layer_norm.py", "fused_layer_norm_cuda"),
}
"""A file of apex, and the compiled extension that it needs."""


def has_apex(part: Literal["adam", "norms"]) -> bool:
    """Tell whether NVIDIA's apex is installed and built with its fused Adam (or its fused norms)."""
    return apex_problem(part) is None


def apex_problem(part: Literal["adam", "norms"]) -> str | None:
    """Say what is missing for apex's fused Adam (or its fused norms); None where nothing is."""
    package = importlib.util.find_spec("apex")
    if package is None:
        return "is not installed"
    file, extension = _PARTS[part]
    if not any((Path(place) / file).is_file() for place in package.submodule_search_locations or ()):
        return "is not NVIDIA's: the package of that name on PyPI is another"
    if importlib.util.find_spec(extension) is None:
        return f"was built without its extension {extension}"
    return None
