"""What the model is trained to predict."""

from __future__ import annotations

from typing import Literal

from lmscale.config.base import Section


class ObjectiveConfig(Section):
    """The training objective."""

    name: Literal["causal_lm"] = "causal_lm"
    """causal_lm: each token from those before it."""
