"""From an `adapt` section to edits of the list of layer specs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmscale.adapt.bitfit import bitfit_specs
from lmscale.adapt.bottleneck import bottleneck_specs
from lmscale.adapt.lora import lora_specs
from lmscale.adapt.prefix import prefix_specs
from lmscale.adapt.prompt import prompt_specs
from lmscale.config.adapt import AdaptConfig
from lmscale.models.context import ModelContext
from lmscale.models.specs import NamedSpecs

_EDITS: dict[str, Callable[[NamedSpecs, ModelContext, Any], NamedSpecs]] = {
    "adapter": bottleneck_specs,
    "bitfit": bitfit_specs,
    "lora": lora_specs,
    "p_tuning_v2": prefix_specs,
    "prefix_tuning": prefix_specs,
    "prompt_tuning": prompt_specs,
}
"""The methods that change layers; the others only choose what is trained (plan.adaptation)."""


def adapted_specs(specs: NamedSpecs, context: ModelContext, adapt: AdaptConfig | None) -> NamedSpecs:
    """Edit the list of layers of a model for an adaptation; None leaves it as it is."""
    edit = _EDITS.get(adapt.method) if adapt is not None else None
    return specs if edit is None else edit(specs, context, adapt)
