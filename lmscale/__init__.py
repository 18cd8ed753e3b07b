"""lmscale: pretraining and adaptation of language models on DeepSpeed and megatron-core."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lmscale.evaluate.inference import load

# megatron-core warns once for each module that would use Transformer Engine or apex; both are optional, and
# `lmscale doctor` says what is there.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)
warnings.filterwarnings("ignore", message="full scope is deprecated")

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import what needs torch only when it is asked for, so that the console answers at once."""
    if name == "load":
        from lmscale.evaluate.inference import load

        return load
    raise AttributeError(f"module 'lmscale' has no attribute {name!r}")
