"""Which adaptations of a table share a bank, and what the bank is built as."""

from __future__ import annotations

from lmscale.config.adapt import (
    AdaptConfig,
    AdapterConfig,
    BitFitConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningV2Config,
)
from lmscale.errors import ConfigError
from lmscale.plan.lora import lora_scale


def bank_key(adapt: AdaptConfig) -> str | None:
    """Name the bank of an adaptation; None where the method adds no modules.

    LoRA is told apart by its rank, and by whether it is beside a fused matrix as a whole or beside its parts.

    Raises:
        ConfigError: if the method has no place in a table.
    """
    if isinstance(adapt, LoraConfig):
        whole = [target for target in ("qkv", "fc1") if target in adapt.targets]
        return f"lora {adapt.rank} {' '.join(whole)}"
    if isinstance(adapt, PrefixTuningConfig | PTuningV2Config):
        return f"prefix {adapt.length}"
    if isinstance(adapt, PromptTuningConfig):
        return f"prompt {adapt.length}"
    if isinstance(adapt, AdapterConfig):
        return f"adapter {adapt.variant} {adapt.width} {adapt.activation} {adapt.scale}"
    if isinstance(adapt, BitFitConfig):
        return None
    raise ConfigError(
        "cannot be one of several that a batch chooses from",
        field="adapt.method",
        value=adapt.method,
        remedy="load it alone",
    )


def bank_config(adapt: AdaptConfig, slots: int) -> AdaptConfig:
    """Describe a bank that holds an adaptation: as the method, for inference, with an entry for each slot."""
    entries = max(2, slots)  # one entry alone has no dimension of its own
    if isinstance(adapt, LoraConfig):
        rank = adapt.rank
        return LoraConfig(rank=rank, alpha=float(rank), targets=sorted(adapt.targets), entries=entries)
    if isinstance(adapt, PrefixTuningConfig | PTuningV2Config):
        return PrefixTuningConfig(length=adapt.length, projection=None, entries=entries)
    if isinstance(adapt, PromptTuningConfig):
        return PromptTuningConfig(length=adapt.length, init="uniform_sym", entries=entries)
    return adapt.model_copy(update={"entries": entries, "norms": False})


def grown(bank: AdaptConfig, adapt: AdaptConfig) -> AdaptConfig:
    """Describe a bank that holds an adaptation too: of LoRA, with its targets added."""
    if isinstance(bank, LoraConfig) and isinstance(adapt, LoraConfig):
        return bank.model_copy(update={"targets": sorted({*bank.targets, *adapt.targets})})
    return bank


def folded_scale(adapt: AdaptConfig, name: str) -> float:
    """Return what a tensor is multiplied by on its way into a bank, whose LoRA has a scale of 1: B by its own."""
    return lora_scale(adapt) if isinstance(adapt, LoraConfig) and name.endswith(".b") else 1.0
