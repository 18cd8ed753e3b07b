"""Packages that look like NVIDIA's apex, or like the one of that name on PyPI, on sys.path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_ADAM = """
import torch
class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, adam_w_mode, bias_correction):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "bias_correction": bias_correction})
        self.adam_w_mode = adam_w_mode
"""
_NORMS = """
import torch
calls = []
def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
    calls.append("layernorm")
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6):
    calls.append("rmsnorm")
    return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
"""


_MODULES = [
    f"apex.{name}"
    for name in ("optimizers", "optimizers.fused_adam", "normalization", "normalization.fused_layer_norm")
]


def install_apex(monkeypatch: Any, directory: Path, *, nvidia: bool = True, extensions: bool = True) -> None:
    """Put a package named apex first on sys.path; importing PyPI's one would raise."""
    files = {"apex/__init__.py": "" if nvidia else "raise RuntimeError('nobody should import this')"}
    if nvidia:
        files |= {
            "apex/optimizers/__init__.py": "from apex.optimizers.fused_adam import FusedAdam",
            "apex/optimizers/fused_adam.py": _ADAM,
            "apex/normalization/__init__.py": "",
            "apex/normalization/fused_layer_norm.py": _NORMS,
        }
    if extensions:
        files |= {"amp_C.py": "", "fused_layer_norm_cuda.py": ""}
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in ["apex", *_MODULES, *(name for name in sys.modules if name.partition(".")[0] == "apex")]:
        monkeypatch.setitem(sys.modules, name, None)  # so that what a test imports is gone behind it
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(directory))
    importlib.invalidate_caches()
