"""The architectures that can be converted."""

from __future__ import annotations

from lmscale.config.model import ModelConfig
from lmscale.convert import bart, bert, gpt2, llama, roberta, t5
from lmscale.convert.family import Family
from lmscale.convert.hf_config import FILE, HfConfig
from lmscale.errors import ConversionError

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (gpt2, llama, bert, roberta, bart, t5)
}
"""By model_type."""


def family_to_import(hf: HfConfig) -> Family:
    """Find the architecture of a config.json.

    Raises:
        ConversionError: if it is none of ours, is quantized, or has a head that ours has not.
    """
    name = hf.get("model_type", None)
    if not isinstance(name, str) or name not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ConversionError(f"cannot be converted: there are {supported}", field=f"{FILE}: model_type", value=name)
    hf.only("quantization_config", None, rule="quantized weights cannot be taken")
    family = FAMILIES[name]
    for architecture in hf.get("architectures", None) or ():
        if architecture not in family.architectures:
            supported = ", ".join(family.architectures)
            raise ConversionError(
                f"cannot be converted: of {name} there are {supported}",
                field=f"{FILE}: architectures",
                value=architecture,
            )
    return family


def family_to_export(model: ModelConfig) -> Family:
    """Choose their architecture for a model of ours."""
    if model.architecture == "gpt":
        return FAMILIES["llama" if model.position_embedding == "rope" else "gpt2"]
    return FAMILIES[model.architecture]
